"""The compiled lattice against a slow one written from the paper (Adams, Baek & Davis 2010), and against the Gaussian sum it stands for."""

import math

import numpy as np
import pytest

from perpixel.refinement.mean_field_cpu import GaussianKernel, filtered
from perpixel.refinement.permutohedral_cpu import lattices


def lifted(feature):
    """The feature in the plane of d + 1 dimensions whose coordinates add up to 0 (section 3 of the paper), in float64."""
    d = len(feature)
    basis = np.zeros((d + 1, d))
    for i in range(d):
        basis[: i + 1, i] = 1
        basis[i + 1, i] = -(i + 1)
        basis[:, i] /= math.sqrt((i + 1) * (i + 2))
    return math.sqrt(2 / 3) * (d + 1) * basis @ feature


def slow_simplex(x):
    """The d + 1 lattice points around x, and its barycentric weights on them."""
    d = len(x) - 1
    corner = ((d + 1) * np.round(x / (d + 1))).astype(int)
    while corner.sum() > 0:
        corner[np.argmin(x - corner)] -= d + 1
    while corner.sum() < 0:
        corner[np.argmax(x - corner)] += d + 1
    order = np.argsort(corner - x)  # the largest remainder first
    rest = (x - corner)[order] / (d + 1)
    vertices, weights = [], []
    for r in range(d + 1):
        vertex = corner + r
        vertex[order[d + 1 - r :]] -= d + 1
        vertices.append(tuple(int(v) for v in vertex))
        weights.append(1 + rest[d] - rest[0] if r == 0 else rest[d - r] - rest[d - r + 1])
    return vertices, weights


def slow_filter(values, features):
    """Splat, blur and slice values (K, P) with a dictionary for the lattice; without the scale 1 / (1 + 2**-d)."""
    d = features.shape[1]
    simplices = [slow_simplex(lifted(feature)) for feature in features.astype(np.float64)]
    table = {}
    for p, (vertices, weights) in enumerate(simplices):
        for vertex, weight in zip(vertices, weights, strict=True):
            table[vertex] = table.get(vertex, 0) + weight * values[:, p].astype(np.float64)
    for axis in range(d + 1):
        step = np.ones(d + 1, int)
        step[axis] -= d + 1
        table = {
            vertex: row + 0.5 * (table.get(tuple(np.add(vertex, step)), 0) + table.get(tuple(np.subtract(vertex, step)), 0))
            for vertex, row in table.items()
        }
    return np.stack([sum(w * table[v] for v, w in zip(*simplex, strict=True)) for simplex in simplices], 1)


def slow_normalised(values, features, how):
    n = slow_filter(np.ones((1, len(features))), features) / (1 + 2.0 ** -features.shape[1])
    before = {"none": 1, "before": 1 / n, "after": 1, "symmetric": n**-0.5}[how]
    after = {"none": 1, "before": 1, "after": 1 / n, "symmetric": n**-0.5}[how]
    return slow_filter(values * before, features) / (1 + 2.0 ** -features.shape[1]) * after


def test_the_slow_lattice_is_right_about_itself():
    """A point is the weighted mean of its vertices, which are points of the lattice: all coordinates alike modulo d + 1, adding up to 0."""
    for d in range(1, 9):
        x = lifted(np.random.default_rng(d).normal(0, 3, d))
        vertices, weights = slow_simplex(x)
        np.testing.assert_allclose(np.array(weights) @ np.array(vertices), x, atol=1e-9)
        assert min(weights) >= 0
        assert sum(weights) == pytest.approx(1)
        assert all(sum(v) == 0 and len({c % (d + 1) for c in v}) == 1 for v in vertices)
        assert len(set(vertices)) == d + 1


@pytest.mark.parametrize("d", range(1, 10))
def test_filter_equals_the_slow_lattice_in_any_number_of_features(d):
    rng = np.random.default_rng(d)
    features = rng.normal(0, 1.5, (60, d)).astype(np.float32)
    values = rng.random((3, 60), np.float32)
    for threads in (1, 3):
        result = filtered(values, GaussianKernel(features, np.float32(-1), "after"), threads=threads)
        np.testing.assert_allclose(result, slow_normalised(values, features, "after"), rtol=2e-4)


@pytest.mark.parametrize("how", ["none", "before", "after", "symmetric"])
def test_normalisations_are_those_of_the_definition(how):
    rng = np.random.default_rng(0)
    features = rng.normal(0, 2, (80, 2)).astype(np.float32)
    values = rng.random((3, 80), np.float32)
    result = filtered(values, GaussianKernel(features, np.float32(-1), how), threads=1)
    np.testing.assert_allclose(result, slow_normalised(values, features, how), rtol=2e-4)
    if how == "after":
        np.testing.assert_allclose(filtered(np.ones((3, 80), np.float32), GaussianKernel(features, np.float32(-1), how)), 1, rtol=1e-5)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_filter_is_near_the_gaussian_sum(d):
    """The lattice is an approximation: a tenth of the values' spread, as specified."""
    rng = np.random.default_rng(d)
    features = rng.uniform(0, 3, (500, d)).astype(np.float32)
    values = np.stack([features.sum(1), np.sin(features[:, 0]), rng.random(500, np.float32)])
    squares = ((features[:, None].astype(float) - features[None]) ** 2).sum(-1)
    kernel = np.exp(-squares / 2)
    exact = values @ (kernel / kernel.sum(0))
    result = filtered(values, GaussianKernel(features, np.float32(-1), "after"), threads=1)
    for ours, theirs, value in zip(result, exact, values, strict=True):
        assert np.abs(ours - theirs).max() < 0.1 * np.ptp(value)
        assert np.abs(ours - theirs).max() < 0.4 * np.abs(ours - value).max()  # and much nearer than no filter at all


@pytest.mark.parametrize("d", [2, 5, 8])
def test_keys_that_do_not_fit_one_word_still_tell_vertices_apart(d):
    """Features that span 10,000 bandwidths need 17 bits a coordinate; pairs of pixels that coincide meet, all others do not."""
    rng = np.random.default_rng(d)
    features = np.repeat(rng.uniform(-5000, 5000, (40, d)), 2, axis=0).astype(np.float32)
    values = rng.random((3, 80), np.float32)
    expected = np.repeat(values.reshape(3, 40, 2).mean(2), 2, axis=1)
    np.testing.assert_allclose(filtered(values, GaussianKernel(features, np.float32(-1), "after"), threads=2), expected, rtol=1e-4)


@pytest.mark.parametrize("value", [1e9, np.inf, np.nan])
def test_features_beyond_float32_are_refused(value):
    with pytest.raises(ValueError, match="bandwidths"):
        filtered(np.ones((3, 2), np.float32), GaussianKernel(np.array([[0], [value]], np.float32), np.float32(-1)))


def test_more_vertices_than_the_first_table_has_room_for():
    """20,000 pixels far from one another have 60,000 vertices and no neighbours; every one has its own row."""
    side = np.arange(20000)
    features = np.stack([side % 141 * 20.0, side // 141 * 20.0], 1).astype(np.float32)
    for threads in (1, 2):
        found = lattices([features], threads)
        assert found.starts[-1] > 3 * 15000
        used = found.rows[np.abs(found.weights) > 0]
        assert used.min() >= 1
        assert used.max() < found.starts[-1]
    values = np.random.default_rng(0).random((3, 20000), np.float32)
    np.testing.assert_allclose(filtered(values, GaussianKernel(features, np.float32(-1), "after")), values, rtol=1e-4)


def test_kernels_side_by_side_share_no_row():
    rng = np.random.default_rng(0)
    one, two = rng.random((50, 5), np.float32), rng.random((50, 2), np.float32)
    found = lattices([one, two], 2)
    assert set(found.rows[:, :6].ravel()).isdisjoint(found.rows[:, 6:].ravel())
    np.testing.assert_allclose(found.weights[:, :6].sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.weights[:, 6:].sum(1), 1, rtol=1e-5)
