"""Surface distances against all pairs of surface pixels, and scikit-image's Hausdorff distance."""

import math

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage.metrics import hausdorff_distance
from test_bands import VOID, pair

from perpixel.metrics.pairs import filled, labelled_pair
from perpixel.metrics.surface import SurfaceDistance

CROSS = ndimage.generate_binary_structure(2, 1)


def surface(mask):
    return mask & ~ndimage.binary_erosion(mask, CROSS)  # outside the image counts as not of the class


def distances(labels, predicted, k, spacing=(1, 1)):
    """All distances there and all distances back."""
    labels, predicted = filled(*labelled_pair(labels, predicted, 4))
    table = cdist(*(np.argwhere(surface(values == k)) * spacing for values in (labels, predicted)))
    return table.min(1), table.min(0)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.5, 2.0)])
def test_both_distances_equal_those_over_all_pairs_of_surface_pixels(spacing):
    score, assd, hausdorff = SurfaceDistance(4, spacing=spacing), [], []
    for seed in range(3):
        labels, predicted = pair(seed)
        score.update(labels, predicted)
        both = [distances(labels, predicted, k, spacing) for k in range(3)]
        assd.append([np.concatenate(two).mean() for two in both])
        hausdorff.append([max(np.percentile(one, 95) for one in two) for two in both])
    np.testing.assert_allclose(score.table[:, :3, 0], assd)
    np.testing.assert_allclose(score.assd[:3], np.mean(assd, 0))
    np.testing.assert_allclose(score.hausdorff[:3], np.mean(hausdorff, 0))
    assert math.isnan(score.assd[3])
    assert score.missed.sum() == score.invented.sum() == 0


def test_the_hundredth_percentile_is_scikit_images_hausdorff_distance():
    labels, predicted = pair(4)
    score = SurfaceDistance(4, percentile=100)
    score.update(labels, predicted)
    labels, predicted = filled(*labelled_pair(labels, predicted, 4))
    expected = [hausdorff_distance(surface(labels == k), surface(predicted == k)) for k in range(3)]
    np.testing.assert_allclose(score.hausdorff[:3], expected)


def test_squares_one_pixel_apart_are_worked_out_by_hand():
    """Two 1x1 squares three pixels apart: every distance is 3."""
    labels = np.zeros((9, 9), np.uint8)
    labels[4, 2] = 1
    score = SurfaceDistance(2)
    score.update(labels, np.roll(labels, 3, 1))
    assert score.assd[1] == score.hausdorff[1] == 3


def test_perfect_is_zero_and_a_class_in_one_only_is_counted_not_averaged():
    labels = np.zeros((9, 9), np.uint8)
    labels[2:5, 2:5] = 1
    score = SurfaceDistance(3)
    score.update(labels, labels)
    score.update(labels, np.zeros_like(labels))
    score.update(labels, np.where(labels, 1, 2))
    score.update(np.full((9, 9), VOID), labels)
    assert score.assd.tolist()[1] == score.hausdorff.tolist()[1] == 0
    assert score.missed.tolist() == [1, 1, 0]
    assert score.invented.tolist() == [0, 0, 1]
    assert np.isnan(score.table[3]).all()


def test_merged_parts_equal_one_stream():
    whole, parts = SurfaceDistance(4), [SurfaceDistance(4), SurfaceDistance(4)]
    for seed in range(4):
        whole.update(*pair(seed), name=str(seed))
        parts[seed // 2].update(*pair(seed), name=str(seed))
    parts[0].merge(parts[1])
    np.testing.assert_array_equal(parts[0].table, whole.table)
    assert parts[0].names == whole.names
    with pytest.raises(ValueError, match="spacings"):
        whole.merge(SurfaceDistance(4, spacing=(1, 2)))


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="percentile"):
        SurfaceDistance(2, 0)
    with pytest.raises(ValueError, match="spacing"):
        SurfaceDistance(2, spacing=(1,))
