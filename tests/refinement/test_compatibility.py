"""Label costs learned from masks, against counting pixel by pixel, arithmetic by hand, and scipy's shortest paths."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import floyd_warshall

from perpixel.refinement.compatibility import (
    as_metric,
    border_counts,
    fit_compatibility,
    is_metric,
    label_costs,
    likeliest_neighbours,
)

SKY, BIRD, SEA, FISH = range(4)
# Sky over sea, a bird in the one and a fish in the other.
SCENE = np.array(
    [
        [SKY, SKY, SKY, SKY, SKY],
        [SKY, BIRD, SKY, SKY, SKY],
        [SKY, SKY, SKY, SKY, SKY],
        [SEA, SEA, SEA, SEA, SEA],
        [SEA, SEA, SEA, FISH, SEA],
        [SEA, SEA, SEA, SEA, SEA],
    ]
)


def counted_slowly(mask, classes, ignore, neighbours, distance):
    """Every pixel looks at every neighbour."""
    counts = np.zeros((classes, classes), int)
    steps = [(0, 1), (1, 0), (0, -1), (-1, 0)] + [(1, 1), (1, -1), (-1, 1), (-1, -1)] * (neighbours == 8)
    height, width = mask.shape
    for y, x in itertools.product(range(height), range(width)):
        for (down, right), far in itertools.product(steps, range(1, distance + 1)):
            v, u = y + down * far, x + right * far
            if 0 <= v < height and 0 <= u < width and ignore not in (mask[y, x], mask[v, u]):
                counts[mask[y, x], mask[v, u]] += 1
    return counts


@pytest.mark.parametrize(("neighbours", "distance"), [(4, 1), (8, 1), (4, 3), (8, 9)])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 5)])
def test_borders_are_counted_as_by_looking_from_every_pixel(neighbours, distance, size):
    masks = [np.random.default_rng(seed).choice([0, 1, 2, 255], size).astype(np.uint8) for seed in range(3)]
    masks[0][0, 0] = 1
    counts = border_counts(iter(masks), 3, neighbours=neighbours, distance=distance)
    expected = sum(counted_slowly(mask, 3, 255, neighbours, distance) for mask in masks)
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts.numpy(), expected)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(4)))
def test_renaming_the_classes_renames_the_costs(order):
    renamed = np.array(order)[SCENE]
    for method in ("pmi", "conditional"):
        costs, other = fit_compatibility([SCENE], 4, method=method), fit_compatibility([renamed], 4, method=method)
        torch.testing.assert_close(other[order][:, order], costs)


@pytest.mark.parametrize("method", ["pmi", "conditional"])
def test_next_to_sky_bird_is_likelier_than_fish(method):
    costs = fit_compatibility([SCENE], 4, method=method)
    assert costs[SKY, BIRD] < costs[SKY, FISH]
    assert costs[SEA, FISH] < costs[SEA, BIRD]
    sky = likeliest_neighbours(costs, ["sky", "bird", "sea", "fish"], count=2)[SKY]
    assert "bird" in [name for name, _ in sky.likeliest]
    assert sky.unlikeliest[0] == ("fish", float(costs[SKY, FISH]))
    assert str(sky).startswith("next to sky: likeliest")


@pytest.mark.parametrize("method", ["pmi", "conditional"])
def test_costs_have_an_empty_diagonal_mean_one_off_it_and_are_symmetric_to_the_bit(method):
    costs = fit_compatibility([np.random.default_rng(0).integers(0, 21, (60, 70)) ** 2 // 21], 21, method=method)
    assert not costs.diagonal().any()
    assert (costs >= 0).all()
    assert float(costs.sum()) == pytest.approx(21 * 20)
    assert torch.equal(costs, costs.T)


def test_pmi_costs_equal_the_arithmetic_by_hand():
    """Counts 8, 2 and 0 with one added: 9, 3 and 1 of 13 pairs; PMI = log(P(l, l') / (P(l) P(l'))), shifted, then divided by the mean."""
    counts = torch.tensor([[50, 8, 2], [8, 70, 0], [2, 0, 9]])
    both = {(0, 1): 9 / 26, (0, 2): 3 / 26, (1, 2): 1 / 26}
    single = [12 / 26, 10 / 26, 4 / 26]
    pmi = {pair: math.log(p / (single[pair[0]] * single[pair[1]])) for pair, p in both.items()}
    costs = label_costs(counts, cheapest=0.25)
    found = {pair: float(costs[pair]) for pair in both}
    assert min(found.values()) == pytest.approx(0.25)
    assert sum(found.values()) == pytest.approx(3)
    # An affine map of -PMI: differences keep their proportion.
    assert (found[1, 2] - found[0, 1]) / (found[0, 2] - found[0, 1]) == pytest.approx((pmi[1, 2] - pmi[0, 1]) / (pmi[0, 2] - pmi[0, 1]))
    assert max(pmi, key=pmi.get) == min(found, key=found.get)


def test_conditional_costs_equal_the_arithmetic_by_hand_and_may_stay_asymmetric():
    counts = torch.tensor([[50, 8, 2], [8, 70, 0], [2, 0, 9]])
    share = [[None, 9 / 12, 3 / 12], [9 / 10, None, 1 / 10], [3 / 4, 1 / 4, None]]
    raw = torch.tensor([[0.0 if p is None else -math.log(p) for p in row] for row in share], dtype=torch.float64)
    one_way = label_costs(counts, method="conditional", symmetric=False)
    torch.testing.assert_close(one_way, raw / raw.sum() * 6)
    assert not torch.equal(one_way, one_way.T)
    torch.testing.assert_close(label_costs(counts, method="conditional"), (raw + raw.T) / 2 / raw.sum() * 6)


def test_a_class_that_touched_no_other_has_neutral_costs_and_leaves_the_others_alone():
    with_absent = fit_compatibility([SCENE], 6)
    assert (with_absent[4:, :4] == 1).all()
    assert with_absent[4, 5] == 1
    # One smoothed pair more for absent classes shifts the shares a little; the order stays.
    alone = fit_compatibility([SCENE], 4)
    assert torch.equal(with_absent[:4, :4].argsort(), alone.argsort())
    assert float(with_absent.sum()) == pytest.approx(6 * 5)


def test_more_smoothing_draws_costs_together():
    spreads = [float(fit_compatibility([SCENE], 4, method="conditional", smoothing=s).max()) for s in (0.1, 1, 10, 1000)]
    assert spreads == sorted(spreads, reverse=True)


def test_two_classes_cost_what_potts_costs():
    for method in ("pmi", "conditional"):
        costs = fit_compatibility([torch.tensor([[0, 1], [1, 1]])], 2, method=method)
        assert torch.equal(costs, torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))


def test_a_larger_distance_sees_across_the_void_between_objects():
    mask = np.array([[0, 0, 255, 255, 1, 1]])
    assert not border_counts([mask], 2, distance=2).fill_diagonal_(0).any()
    assert border_counts([mask], 2, distance=3)[0, 1] == 1
    with pytest.raises(ValueError, match="a larger distance"):
        fit_compatibility([mask], 2)


@pytest.mark.parametrize(
    ("masks", "classes", "options", "message"),
    [
        ([SCENE], 1, {}, "at least 2 classes"),
        ([SCENE], 3, {}, r"mask 0: 1 pixels have a value that is neither one of the 3 classes 0..2 nor ignore = 255 \(3\)"),
        ([SCENE, -SCENE], 4, {}, r"mask 1: .*\(-3, -2, -1\)"),
        ([np.full((3, 3), 255)], 4, {}, "no pixel of 1 masks is labelled"),
        ([], 4, {}, "no pixel of 0 masks is labelled"),
        ([SCENE[None]], 4, {}, r"shape \(1, 6, 5\)"),
        ([SCENE], 256, {}, "ignore must not be one of them"),
        ([SCENE], 4, {"neighbours": 6}, "4 or 8"),
        ([SCENE], 4, {"distance": 0}, "1 pixel or more"),
        ([SCENE], 4, {"method": "pmii"}, "known: pmi, conditional"),
        ([SCENE], 4, {"smoothing": 0}, "more than 0"),
        ([SCENE], 4, {"cheapest": 1}, "less than 1"),
        ([SCENE], 4, {"symmetric": False}, "symmetric by its definition"),
    ],
)
def test_bad_input_is_refused_with_what_is_legal(masks, classes, options, message):
    with pytest.raises(ValueError, match=message):
        fit_compatibility(masks, classes, **options)
    with pytest.raises(TypeError, match="must be integers"):
        fit_compatibility([SCENE.astype(float)], 4)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 9), st.integers(0, 10**6))
def test_the_metric_is_scipys_shortest_paths_and_nothing_above_it_is_one(classes, seed):
    costs = torch.rand(classes, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1e-3
    costs = (costs + costs.T).fill_diagonal_(0)
    closed = as_metric(costs)
    np.testing.assert_allclose(closed.numpy(), floyd_warshall(costs.numpy()), rtol=1e-12)
    assert is_metric(closed)
    torch.testing.assert_close(as_metric(closed), closed, rtol=1e-12, atol=0)  # a sum in another order rounds differently
    triangle = all(costs[a, c] <= costs[a, b] + costs[b, c] + 1e-12 for a, b, c in itertools.product(range(classes), repeat=3))
    assert is_metric(costs) == triangle


def test_asymmetric_costs_are_no_metric_and_are_not_made_one():
    costs = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert not is_metric(costs)
    with pytest.raises(ValueError, match="average them with their transpose"):
        as_metric(costs)
    for bad in (torch.ones(2, 2), torch.tensor([[0.0, -1.0], [-1.0, 0.0]]), torch.tensor([[0.0, math.inf], [math.inf, 0.0]])):
        with pytest.raises(ValueError, match="diagonal of 0"):
            is_metric(bad)


@pytest.mark.shared_data
def test_costs_of_a_real_set_say_what_everyone_knows(shared):
    """Microsoft's 21 classes: boats lie in water, cows on grass, cars on roads; a boat on a road, or a cow beside a bicycle, is rare."""
    from PIL import Image

    root = shared / "data" / "msrc21"
    names = (root / "classes.txt").read_text().split()
    stems = (root / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    costs = fit_compatibility((np.array(Image.open(root / "SegmentationClass" / f"{stem}.png")) for stem in stems), len(names))
    best = {row.name: row.likeliest[0][0] for row in likeliest_neighbours(costs, names)}
    assert (best["boat"], best["cow"], best["car"]) == ("water", "grass", "road")
    at = {name: i for i, name in enumerate(names)}
    assert costs[at["sky"], at["bird"]] < costs[at["sky"], at["book"]]
    assert costs[at["boat"], at["road"]] > 1 > costs[at["boat"], at["water"]]
