"""Maximum flow on the grid against scipy's, on the same network written out edge by edge."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_flow

from perpixel.refinement.max_flow import SOURCE, frame_index, max_flow, new_flow

STEPS = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)]


def random_network(rng, height, width, neighbours, highest=20, empty=0.3):
    """Integer capacities of terminals (H, W), signed, and of edges (H, W, D), zero towards the frame."""
    terminal = rng.integers(-highest, highest + 1, (height, width))
    edges = rng.integers(0, highest, (height, width, neighbours)) * (rng.random((height, width, neighbours)) > empty)
    for d, (dy, dx) in enumerate(STEPS[:neighbours]):
        for y, x in np.ndindex(height, width):
            if not (0 <= y + dy < height and 0 <= x + dx < width):
                edges[y, x, d] = 0
    return terminal, edges


def ours(terminal, edges):
    height, width, neighbours = edges.shape
    flow = new_flow(height, width, neighbours)
    pixels = frame_index(height, width)
    flow.terminal[pixels], flow.residual[pixels] = terminal, edges
    total = max_flow(flow, pixels.ravel())
    return total, flow.tree[pixels] == SOURCE


def scipys(terminal, edges):
    height, width, neighbours = edges.shape
    node = np.arange(height * width).reshape(height, width)
    source, sink = height * width, height * width + 1
    rows, columns, capacity = [], [], []
    for (y, x), value in np.ndenumerate(terminal):
        tail, head = (source, node[y, x]) if value > 0 else (node[y, x], sink)
        rows, columns, capacity = [*rows, tail], [*columns, head], [*capacity, abs(value)]
        for d, (dy, dx) in enumerate(STEPS[:neighbours]):
            if edges[y, x, d]:
                rows, columns, capacity = [*rows, node[y, x]], [*columns, node[y + dy, x + dx]], [*capacity, edges[y, x, d]]
    graph = coo_array((np.array(capacity, dtype=np.int32), (rows, columns)), shape=(sink + 1, sink + 1)).tocsr()
    return maximum_flow(graph, source, sink).flow_value


def cut_value(terminal, edges, side):
    """Capacity of the edges that leave the source's side."""
    value = terminal[(terminal > 0) & ~side].sum() - terminal[(terminal < 0) & side].sum()
    for y, x in np.argwhere(side):
        for d, (dy, dx) in enumerate(STEPS[: edges.shape[2]]):
            if edges[y, x, d] and not side[y + dy, x + dx]:
                value += edges[y, x, d]
    return value


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.sampled_from([4, 8]), st.sampled_from([2, 20, 10**6]))
@settings(max_examples=300, deadline=None)
def test_flow_equals_scipys_and_the_cut_found_has_just_that_capacity(seed, height, width, neighbours, highest):
    terminal, edges = random_network(np.random.default_rng(seed), height, width, neighbours, highest)
    total, side = ours(terminal, edges)
    assert total == scipys(terminal, edges)
    assert cut_value(terminal, edges, side) == total  # flow = cut: both are optimal (Ford & Fulkerson 1956)


@pytest.mark.parametrize("neighbours", [4, 8])
def test_flow_equals_scipys_on_a_grid_where_trees_are_deep(neighbours):
    """Source and sink at opposite ends, so that every path is long and adoption has work."""
    rng = np.random.default_rng(1)
    terminal, edges = random_network(rng, 40, 60, neighbours, empty=0.1)
    terminal[:, 3:-3] = 0
    terminal[:, :3], terminal[:, -3:] = rng.integers(1, 100, (40, 3)), -rng.integers(1, 100, (40, 3))
    total, side = ours(terminal, edges)
    assert total == scipys(terminal, edges)
    assert cut_value(terminal, edges, side) == total


def test_flow_with_real_capacities_equals_the_cut_it_finds():
    rng = np.random.default_rng(2)
    terminal, edges = random_network(rng, 50, 50, 8)
    terminal, edges = terminal * rng.random(terminal.shape), edges * rng.random(edges.shape)
    total, side = ours(terminal, edges)
    np.testing.assert_allclose(total, cut_value(terminal, edges, side), rtol=1e-12)


def test_a_network_used_again_on_some_of_its_pixels_gives_the_flow_of_a_fresh_one():
    rng = np.random.default_rng(3)
    terminal, edges = random_network(rng, 12, 12, 4)
    pixels = frame_index(12, 12)
    flow = new_flow(12, 12, 4)
    flow.terminal[pixels], flow.residual[pixels] = terminal, edges
    max_flow(flow, pixels.ravel())
    part = np.s_[2:9, 3:11]
    inner = edges[part].copy()
    inner[:, -1, 0], inner[:, 0, 1], inner[-1, :, 2], inner[0, :, 3] = 0, 0, 0, 0
    flow.terminal[:], flow.residual[:], flow.tree[:] = 0, 0, 0
    flow.terminal[pixels[part]], flow.residual[pixels[part]] = terminal[part], inner
    assert max_flow(flow, pixels[part].ravel()) == scipys(terminal[part], inner)
