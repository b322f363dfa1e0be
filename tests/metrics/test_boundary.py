"""BF score against a matching by the Hungarian method on contours drawn with plain loops."""

import itertools
import math
import resource
import time

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from perpixel.metrics.boundary import BoundaryF, largest_matching
from perpixel.metrics.pairs import filled, labelled_pair

VOID = 255


def contour(labels, k):
    """Pixels whose 2x2 block (clipped at the border) holds class k and something else."""
    found = []
    for y, x in itertools.product(*map(range, labels.shape)):
        block = labels[y : y + 2, x : x + 2] == k
        if block.any() and not block.all():
            found.append((y, x))
    return found


def obvious_f(labels, predicted, k, tolerance):
    """F1 of class k, from precision and recall; NaN where neither has a contour."""
    labels, predicted = filled(*labelled_pair(labels, predicted, 4))  # tested in test_bands.py
    true, drawn = contour(labels, k), contour(predicted, k)
    if not true and not drawn:
        return math.nan
    if not true or not drawn:
        return 0.0
    near = np.array([[math.hypot(a - c, b - d) <= tolerance * math.hypot(*labels.shape) for c, d in true] for a, b in drawn])
    matched = near[linear_sum_assignment(near, maximize=True)].sum()
    p, r = matched / len(drawn), matched / len(true)
    return 2 * p * r / (p + r) if p + r else 0.0


def pair(seed, shape=(23, 31), classes=4, void=0.1):
    """Blocks of classes, and the same with blocks moved and noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, classes, (shape[0] // 5 + 2, shape[1] // 5 + 2))
    fine = coarse.repeat(5, 0).repeat(5, 1)
    dy, dx = rng.integers(0, 4, 2)
    labels, predicted = fine[: shape[0], : shape[1]].astype(np.uint8), fine[dy:, dx:][: shape[0], : shape[1]].astype(np.uint8)
    predicted = np.where(rng.random(shape) < 0.1, rng.integers(0, classes, shape), predicted).astype(np.uint8)
    return np.where(rng.random(shape) < void, VOID, labels).astype(np.uint8), predicted


@pytest.mark.parametrize("tolerance", [0.0, 0.0075, 0.03, 0.08, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_bf_equals_a_hungarian_matching_of_the_contour_pixels(seed, tolerance):
    """Badrinarayanan et al. 2017, section 4.1: F1 of each class present in truth or prediction, averaged over them."""
    labels, predicted = pair(seed)
    score = BoundaryF(4, tolerance)
    score.update(labels, predicted)
    expected = [obvious_f(labels, predicted, k, tolerance) for k in range(4)]
    np.testing.assert_allclose(score.per_class, expected, atol=1e-6)
    assert score.score == pytest.approx(np.nanmean(expected), abs=1e-6)


def test_the_matching_is_the_largest_of_all_where_the_nearest_first_would_lose_a_pair():
    """In one row, predicted at 0 and 2, true at 1 and 4, reach 2: taking 2-1 first would leave 0 and 4 without a partner."""
    assert largest_matching(np.array([[0, 0], [0, 2]]), np.array([[0, 1], [0, 4]]), 2.0) == 2
    assert largest_matching(np.array([[0, 2], [1, 0]]), np.array([[0, 1], [0, 4]]), 2.0) == 2
    assert largest_matching(np.array([[0, 0], [0, 2]]), np.array([[0, 1], [0, 5]]), 2.0) == 1


@pytest.mark.parametrize("seed", range(12))
def test_matchings_of_scattered_pixels_are_as_large_as_those_of_hopcroft_and_karp(seed):
    """scipy.sparse.csgraph.maximum_bipartite_matching, on point sets from sparse to crowded."""
    rng = np.random.default_rng(seed)
    left, right = (np.argwhere(rng.random((40, 50)) < rng.uniform(0.02, 0.6)) for _ in range(2))
    distance = rng.uniform(0, 6)
    near = ((left[:, None] - right[None]) ** 2).sum(-1) <= distance**2
    expected = (maximum_bipartite_matching(csr_array(near), "column") >= 0).sum()
    assert largest_matching(left, right, distance) == expected


def test_one_to_one_matching_gives_a_thick_line_less_than_the_nearest_pixel_would():
    """Every pixel of a scribble near a straight contour has a true pixel within reach, but there are more of them than true pixels."""
    labels = np.zeros((40, 40), np.uint8)
    labels[:, 20:] = 1
    predicted = labels.copy()
    predicted[::2, 19] = 1  # a comb: its contour is longer
    score = BoundaryF(2, tolerance=3 / math.hypot(40, 40))
    score.update(labels, predicted)
    matched, true, drawn = score.images.total[1]
    assert matched == true == 40
    assert drawn > 50
    assert score.per_class[1] == pytest.approx(2 * 40 / (40 + drawn))


def test_a_perfect_prediction_scores_one_whatever_it_says_on_void():
    labels, predicted = pair(3)
    score = BoundaryF(4)
    score.update(labels, np.where(labels == VOID, predicted, labels))
    assert score.score == 1


def test_a_shift_by_one_pixel_is_free_within_the_tolerance_and_costs_all_without_it():
    """0.75 % of the diagonal of 360x480 is 4.5 pixels."""
    labels = np.zeros((360, 480), np.uint8)
    labels[100:200, 100:300] = 1
    exact, tolerant = BoundaryF(2, 0), BoundaryF(2)
    moved = np.roll(labels, (1, 1), (0, 1))
    exact.update(labels, moved)
    tolerant.update(labels, moved)
    assert tolerant.score == 1
    assert exact.score < 0.02
    far = BoundaryF(2)
    far.update(labels, np.roll(labels, 5, 1))
    assert far.score < 0.7


def test_an_image_without_contours_is_left_out_and_poisons_nothing():
    flat, void = np.zeros((9, 9), np.uint8), np.full((9, 9), VOID, np.uint8)
    score = BoundaryF(4)
    score.update(flat, flat, name="flat")
    score.update(void, flat, name="void")
    assert math.isnan(score.score)
    assert np.isnan(score.per_class).all()
    labels, _ = pair(0)
    score.update(labels, labels, name="labelled")
    assert score.score == 1
    assert np.isnan(score.per_image).tolist() == [True, True, False]


def test_a_contour_in_one_only_counts_as_zero():
    flat = np.zeros((9, 9), np.uint8)
    dot = flat.copy()
    dot[4, 4] = 1
    for labels, predicted in ((flat, dot), (dot, flat)):
        score = BoundaryF(3)
        score.update(labels, predicted)
        assert score.per_class[:2].tolist() == [0, 0]
        assert math.isnan(score.per_class[2])
        assert score.score == 0


def test_merged_parts_equal_one_stream_and_counts_are_whole_numbers():
    whole, parts = BoundaryF(4), [BoundaryF(4), BoundaryF(4)]
    for seed in range(4):
        whole.update(*pair(seed), name=str(seed))
        parts[seed // 2].update(*pair(seed), name=str(seed))
    parts[0].merge(parts[1])
    assert parts[0].score == whole.score
    assert parts[0].images.names == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(parts[0].images.table, whole.images.table)
    assert whole.images.table.dtype == np.int64
    with pytest.raises(ValueError, match="tolerances"):
        whole.merge(BoundaryF(4, 0.1))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2)])
def test_the_smallest_images_are_scored(shape):
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 2, (2, *shape)).astype(np.uint8)
    score = BoundaryF(2, 0.3)
    score.update(labels, predicted)
    np.testing.assert_allclose(score.per_class, [obvious_f(labels, predicted, k, 0.3) for k in range(2)])


def test_bad_input_is_named():
    score = BoundaryF(2)
    with pytest.raises(ValueError, match="one image at a time"):
        score.update(np.zeros((1, 4, 4), int), np.zeros((1, 4, 4), int))
    with pytest.raises(ValueError, match=r"predicted: 1 pixels .*\(5\)"):
        score.update(np.zeros((2, 2), int), np.array([[0, 5], [0, 0]]))
    with pytest.raises(ValueError, match="same"):
        score.update(np.zeros((2, 2), int), np.zeros((2, 3), int))
    with pytest.raises(TypeError, match="argmax"):
        score.update(np.zeros((2, 2), int), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="is one of the 300 classes"):
        BoundaryF(300).update(np.zeros((2, 2), int), np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="fraction"):
        BoundaryF(2, 4.5)
    assert len(score.images) == 0


def test_time_does_not_depend_on_which_side_has_more_pixels():
    """Once the smaller side is used up no pixel of the larger one looks for a partner any more; it took 25 times as long."""
    large, small = np.argwhere(np.ones((300, 300), bool)), np.argwhere(np.ones((100, 100), bool))
    assert largest_matching(large[:9], small[:9], 20.0) == 9  # compiled
    took = []
    for left, right in ((large, small), (small, large)):
        times = []
        for _ in range(3):
            start = time.process_time()
            assert largest_matching(left, right, 20.0) == len(small)
            times.append(time.process_time() - start)
        took.append(min(times))
    assert took[0] < 8 * took[1]


def test_memory_of_the_matching_does_not_grow_with_the_reach():
    """Noise of two classes: each of 160,000 contour pixels has 1,250 within reach, which as a list would take 800 MB."""
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 2, (2, 400, 400)).astype(np.uint8)
    BoundaryF(2, 0.01).update(labels[:30, :30], predicted[:30, :30])  # compiled code is in place
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    score = BoundaryF(2, 20 / math.hypot(400, 400))
    score.update(labels, predicted)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 100
    matched, true, drawn = score.images.total[0]
    assert min(true, drawn) > 120_000
    assert matched == min(true, drawn)
