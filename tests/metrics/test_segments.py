"""Scores of segments against scikit-image, scikit-learn and loops over pairs of pixels."""

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import label
from skimage.metrics import adapted_rand_error
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from perpixel.metrics.segments import (
    Objects,
    Segments,
    overlaps,
    rand_error,
    segments_of,
    v_info,
    v_rand,
)


def maps(seed, shape=(40, 50)):
    """Cells parted by membranes of one or two pixels, and a prediction with gaps in them and specks."""
    rng = np.random.default_rng(seed)
    cells = ndimage.gaussian_filter(rng.standard_normal((6, *shape)), (0, 4, 4)).argmax(0)
    inside = ndimage.morphological_gradient(cells, 3) == 0
    noisy = np.roll(inside, 1, 1) ^ (rng.random(shape) < 0.05)
    return inside, noisy


def segments(seed, shape=(40, 50)):
    return tuple(segments_of(inside) for inside in maps(seed, shape))


@pytest.mark.parametrize("connectivity", [4, 8])
def test_segments_are_the_connected_components_of_scikit_image(connectivity):
    for inside in maps(0):
        np.testing.assert_array_equal(segments_of(inside, connectivity), label(inside, connectivity=connectivity // 4))


@pytest.mark.parametrize("seed", range(4))
def test_rand_error_is_scikit_images_adapted_rand_error(seed):
    truth, predicted = segments(seed)
    assert rand_error(overlaps(truth, predicted)) == pytest.approx(adapted_rand_error(truth, predicted)[0])


def test_rand_error_is_one_minus_the_f_of_pairs_of_pixels_counted_one_by_one():
    truth, predicted = segments(5, (9, 10))
    inside = np.flatnonzero(truth)
    pairs = [(truth.flat[a] == truth.flat[b], predicted.flat[a] == predicted.flat[b]) for a, b in itertools.combinations(inside, 2)]
    both = sum(t and p for t, p in pairs)
    precision, recall = both / sum(p for _, p in pairs), both / sum(t for t, _ in pairs)
    assert rand_error(overlaps(truth, predicted)) == pytest.approx(1 - 2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("seed", range(4))
def test_v_rand_is_the_published_sum_over_shares(seed):
    """Arganda-Carreras et al. 2015: V = sum p_ij^2 / (sum s_i^2 / 2 + sum t_j^2 / 2) over the true foreground."""
    truth, predicted = segments(seed)
    inside = truth != 0
    p = np.zeros((predicted.max() + 1, truth.max() + 1))
    np.add.at(p, (predicted[inside], truth[inside]), 1 / inside.sum())
    s, t = p.sum(1), p.sum(0)
    got = v_rand(overlaps(truth, predicted))
    assert got.score == pytest.approx((p**2).sum() / ((s**2).sum() / 2 + (t**2).sum() / 2))
    assert got.split == pytest.approx((p**2).sum() / (t**2).sum())
    assert got.merge == pytest.approx((p**2).sum() / (s**2).sum())


@pytest.mark.parametrize("seed", range(4))
def test_v_info_is_the_normalised_mutual_information_of_scikit_learn(seed):
    truth, predicted = segments(seed)
    pairs = overlaps(truth, predicted)
    inside = truth != 0
    t, p = truth[inside], predicted[inside]
    got = v_info(pairs)
    assert got.score == pytest.approx(normalized_mutual_info_score(t, p, average_method="arithmetic"))
    assert got.split == pytest.approx(mutual_info_score(t, p) / mutual_info_score(p, p))
    assert got.merge == pytest.approx(mutual_info_score(t, p) / mutual_info_score(t, t))


def test_a_split_costs_split_and_a_merge_costs_merge():
    one, two = np.ones((4, 8), int), np.repeat([[1, 2]], 4, 0).repeat(4, 1)
    for score in (v_rand, v_info):
        split, merge = score(overlaps(one, two)), score(overlaps(two, one))
        assert split.split < 1 == split.merge
        assert merge.merge < 1 == merge.split


def test_names_of_segments_do_not_matter_and_perfect_is_one():
    truth, predicted = segments(1)
    renamed = np.random.default_rng(0).permutation(1000)[1 : predicted.max() + 2] + 1
    renamed[0] = 0
    for score in (rand_error, v_rand, v_info):
        assert score(overlaps(truth, renamed[predicted])) == score(overlaps(truth, predicted))
    both = overlaps(truth, truth)
    assert (rand_error(both), v_rand(both).score) == (0, 1)
    assert v_info(both).score == pytest.approx(1)
    objects = Objects()
    objects.update(truth, truth)
    assert objects.seg == 1
    assert (objects.f1 == 1).all()


def test_an_image_without_true_segments_gives_nan_and_poisons_nothing():
    truth, predicted = segments(2)
    scores, objects = Segments(), Objects()
    scores.update(np.zeros((5, 5), int), np.ones((5, 5), int))
    objects.update(np.zeros((5, 5), int), np.zeros((5, 5), int))
    assert all(math.isnan(value) for value in scores.means().values())
    assert math.isnan(objects.seg)
    assert np.isnan(objects.f1).all()
    scores.update(truth, predicted)
    assert scores.means()["v_rand"] == v_rand(overlaps(truth, predicted)).score
    assert Segments().table.shape == (0, 7)


def obvious_objects(truth, predicted, thresholds):
    """SEG's terms and the pairs at each threshold, by a mask for each object."""
    terms, table = [], []
    for r in range(1, truth.max() + 1):
        row, term = [], 0
        for s in range(1, predicted.max() + 1):
            shared, either = ((truth == r) & (predicted == s)).sum(), ((truth == r) | (predicted == s)).sum()
            row.append(shared / either)
            if shared > 0.5 * (truth == r).sum():
                term = shared / either
        terms.append(term)
        table.append(row)
    return terms, [(np.array(table) > threshold).sum() for threshold in thresholds]


def test_seg_and_f1_equal_those_of_masks_compared_one_by_one():
    """Ulman et al. 2017: the mean over true objects of IoU with the object holding more than half of theirs."""
    objects, terms, pairs, numbers = Objects(), [], 0, np.zeros(2, int)
    parts = [Objects(), Objects()]
    for seed in range(4):
        truth, predicted = (ndimage.label(ndimage.binary_erosion(mask))[0] for mask in maps(seed))
        objects.update(truth, predicted)
        parts[seed // 2].update(truth, predicted)
        more, found = obvious_objects(truth, predicted, objects.thresholds)
        terms, pairs, numbers = terms + more, pairs + np.array(found), numbers + np.array([truth.max(), predicted.max()])
    assert objects.seg == pytest.approx(np.mean(terms))
    np.testing.assert_allclose(objects.f1, 2 * pairs / numbers.sum())
    assert 0 < objects.f1[0] < 1
    parts[0].merge(parts[1])
    np.testing.assert_array_equal(parts[0].counts, objects.counts)
    assert parts[0].seg == pytest.approx(objects.seg)


def test_merged_parts_equal_one_stream():
    whole, parts = Segments(), [Segments(), Segments()]
    for seed in range(4):
        whole.update(*segments(seed), name=str(seed))
        parts[seed // 2].update(*segments(seed), name=str(seed))
    parts[0].merge(parts[1])
    assert parts[0].means() == whole.means()
    assert parts[0].names == whole.names


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="4 or 8"):
        segments_of(np.ones((2, 2), int), 6)
    with pytest.raises(ValueError, match="same"):
        overlaps(np.ones((2, 2), int), np.ones((2, 3), int))
    with pytest.raises(TypeError, match="integers"):
        overlaps(np.ones((2, 2)), np.ones((2, 2), int))
    with pytest.raises(ValueError, match=r"from 0\.5"):
        Objects([0.3])
    with pytest.raises(ValueError, match="cannot merge"):
        Objects().merge(Objects([0.5]))
