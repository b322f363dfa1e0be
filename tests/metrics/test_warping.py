"""Warping error against topology counted by scipy and an exhaustive search over all warps of tiny maps."""

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage
from test_segments import maps

from perpixel.metrics.warping import Warping, simple_table, splits_and_mergers, warp

FOUR, EIGHT = ndimage.generate_binary_structure(2, 1), ndimage.generate_binary_structure(2, 2)


def structures(connectivity):
    return (FOUR, EIGHT) if connectivity == 4 else (EIGHT, FOUR)


def tree(mask, connectivity):
    """Components of both kinds, the frame beyond the border being 0: numbers that no homotopic warp changes."""
    inside, outside = structures(connectivity)
    framed = np.pad(mask, 1)
    return ndimage.label(framed, inside)[1], ndimage.label(~framed, outside)[1]


def is_simple(mask, y, x, connectivity):
    """Exactly one component of 1s and one of 0s of the 3x3 neighbourhood touches the pixel (Kong & Rosenfeld 1989)."""
    around = np.pad(mask, 1)[y : y + 3, x : x + 3].copy()
    touching = []
    for kind, structure in zip((around, ~around), structures(connectivity), strict=True):
        kind = kind.copy()
        kind[1, 1] = False
        numbers = ndimage.label(kind, structure)[0][structure]
        touching.append(len(set(numbers[numbers > 0].tolist())))
    return touching == [1, 1]


@pytest.mark.parametrize("connectivity", [4, 8])
def test_the_table_of_simple_points_equals_components_counted_in_all_256_neighbourhoods(connectivity):
    ring = [(0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)]
    for pattern in range(256):
        mask = np.zeros((3, 3), bool)
        for bit, (dy, dx) in enumerate(ring):
            mask[1 + dy, 1 + dx] = pattern >> bit & 1
        assert simple_table(connectivity)[pattern] == is_simple(mask, 1, 1, connectivity), f"{pattern:08b}"


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_a_warp_keeps_the_topology_and_leaves_no_simple_disagreement(seed, connectivity):
    truth, predicted = maps(seed)
    warped = warp(truth, predicted, connectivity)
    assert tree(warped, connectivity) == tree(truth, connectivity)
    assert not ((warped != predicted) & (truth == predicted)).any()
    left = np.argwhere(warped != predicted)
    assert 0 < len(left) < (truth != predicted).sum()
    assert not any(is_simple(warped, y, x, connectivity) for y, x in left)


def least(truth, predicted, connectivity):
    """The least disagreement over every map that flips of simple pixels reach from the truth."""
    seen, front = {truth.tobytes()}, [truth]
    best = (truth != predicted).sum()
    while front:
        mask = front.pop()
        best = min(best, (mask != predicted).sum())
        for y, x in itertools.product(*map(range, mask.shape)):
            if is_simple(mask, y, x, connectivity):
                other = mask.copy()
                other[y, x] ^= True
                if other.tobytes() not in seen:
                    seen.add(other.tobytes())
                    front.append(other)
    return best


def test_on_tiny_maps_no_warp_at_all_is_better_than_the_bound_and_nearly_always_none_is_worse():
    rng = np.random.default_rng(0)
    gaps = []
    for _ in range(24):
        truth, predicted = rng.random((2, 3, 3)) < 0.5
        gaps.append((warp(truth, predicted) != predicted).sum() - least(truth, predicted, 4))
    assert min(gaps) >= 0
    assert np.mean(np.array(gaps) == 0) >= 0.7


def test_a_shift_and_a_thicker_membrane_cost_nothing_and_a_gap_one_pixel():
    """Two cells and a membrane of one pixel between them, inside a frame of membrane."""
    truth = np.ones((20, 21), bool)
    truth[:, 10] = truth[[0, -1]] = truth[:, [0, -1]] = False
    moved, thick, gap = truth.copy(), truth.copy(), truth.copy()
    moved[1:-1, 10], moved[1:-1, 11] = True, False
    thick[:, 11] = False
    gap[10, 10] = True
    scores = []
    for predicted in (moved, thick, gap, truth):
        score = Warping()
        score.update(truth, predicted)
        scores.append((score.pixel_error * truth.size, score.warping_error * truth.size))
    np.testing.assert_allclose(scores, [(36, 0), (18, 0), (1, 1), (0, 0)])


def test_reach_keeps_the_warp_near_the_boundary():
    truth, predicted = np.zeros((2, 30, 30), bool)
    truth[5:25, 5:10] = True
    predicted[5:25, 5:20] = True
    assert (warp(truth, predicted) == predicted).all()
    assert (warp(truth, predicted, reach=3) != predicted).sum() == 20 * (20 - 13)


def test_counts_add_up_over_processes_and_nothing_gives_nan():
    whole, parts = Warping(), [Warping(), Warping()]
    assert math.isnan(whole.warping_error)
    for seed in range(4):
        whole.update(*maps(seed))
        parts[seed // 2].update(*maps(seed))
    parts[0].merge(parts[1])
    np.testing.assert_array_equal(parts[0].counts, whole.counts)
    assert whole.counts.dtype == np.int64
    assert whole.pixel_error == pytest.approx(np.mean([np.mean(a != b) for a, b in map(maps, range(4))]))


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="4 or 8"):
        Warping(6)
    with pytest.raises(ValueError, match="reach"):
        warp(np.ones((2, 2), int), np.ones((2, 2), int), reach=0)
    with pytest.raises(ValueError, match="same"):
        warp(np.ones((2, 2), int), np.ones((2, 3), int))
    with pytest.raises(ValueError, match="cannot merge"):
        Warping().merge(Warping(8))


@pytest.mark.parametrize("seed", range(6))
def test_splits_and_mergers_are_those_found_by_flipping_each_pixel_that_differs_and_labelling_anew(seed):
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal((2, 30, 34)), (0, 1.5, 1.5))
    truth, predicted = smooth[0] > -0.03, smooth[0] + 0.6 * smooth[1] > -0.03
    warped = warp(truth, predicted)
    expected = np.zeros_like(truth)
    for y, x in np.argwhere(warped != predicted):
        ring = np.ones((3, 3), bool)
        ring[1, 1] = False
        around = lambda numbers: {*np.pad(numbers, 1)[y : y + 3, x : x + 3][ring].tolist()} - {0}  # noqa: B023, E731
        segments = around(ndimage.label(warped)[0])
        without = warped.copy()
        without[y, x] = False
        expected[y, x] = len(segments) > 1 or (warped[y, x] and len(around(ndimage.label(without)[0])) > 1)
    found = splits_and_mergers(warped, predicted, radius=40)
    np.testing.assert_array_equal(found, expected)
    assert found.any()
    assert (found != (warped != predicted)).any()  # holes, and objects that come or go, do not count


def test_a_gap_in_a_membrane_and_a_line_through_a_cell_count_and_a_hole_and_a_lost_cell_do_not():
    truth = np.ones((9, 20), bool)
    truth[:, 10] = False
    merged, split, holed, lost = (truth.copy() for _ in range(4))
    merged[4, 10] = True
    split[:, 5] = False
    holed[3:6, 3:6] = False
    lost[:, 10:] = False
    counts = [splits_and_mergers(warp(truth, predicted), predicted).sum() for predicted in (merged, split, holed, lost)]
    assert counts == [1, 1, 0, 0]  # a line is warped into a slit up to its last pixel


def test_a_cut_through_a_ring_counts_where_its_ends_meet_only_farther_off_than_the_radius():
    ring = np.zeros((61, 61), bool)
    ring[1:-1, 1:-1], ring[6:-6, 6:-6] = True, False
    cut = ring.copy()
    cut[1:6, 30] = False
    warped = warp(ring, cut)
    assert [splits_and_mergers(warped, cut, radius).sum() for radius in (20, 60)] == [1, 0]


def test_numbers_and_booleans_of_a_map_split_and_merge_alike():
    truth, predicted = maps(0)
    numbers = splits_and_mergers(255 * truth.astype(np.uint8), predicted.astype(int))
    np.testing.assert_array_equal(numbers, splits_and_mergers(truth, predicted))
    with pytest.raises(ValueError, match="same"):
        splits_and_mergers(truth, predicted[1:])


def test_a_pass_goes_from_the_most_certain_pixel_to_the_least():
    """A membrane of five pixels that the prediction lacks is eaten from where it is surest; one line of it stays, as it parts two cells."""
    truth = np.ones((9, 25), bool)
    truth[:, 10:15] = False
    for line in range(10, 15):
        certainty = abs(np.arange(25) - line) * np.ones((9, 1))
        left = warp(truth, np.ones_like(truth), certainty=certainty) != True  # noqa: E712
        assert np.flatnonzero(left.any(0)).tolist() == [line]
