"""Trimap and Boundary IoU against dilations and erosions of masks, one class and one width at a time."""

import math

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import confusion_matrix

from perpixel.metrics.bands import BoundaryIoU, Trimap, steps_to_change
from perpixel.metrics.boundary import BoundaryF
from perpixel.metrics.pairs import filled, labelled_pair
from perpixel.metrics.surface import SurfaceDistance

VOID = 255
SQUARE = np.ones((3, 3), bool)


def pair(seed, shape=(50, 41), classes=4):
    """Smooth regions with some void, and a prediction moved by two pixels with noise; the last class does not occur."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.standard_normal((classes - 1, shape[0] + 4, shape[1] + 4)), (0, 4, 4))
    regions = fields.argmax(0).astype(np.uint8)
    labels, predicted = regions[2:-2, 2:-2].copy(), regions[4:, :-4].copy()
    noise = rng.random(shape) < 0.05
    predicted[noise] = rng.integers(0, classes - 1, noise.sum())
    labels[ndimage.gaussian_filter(rng.standard_normal(shape), 2) > 0.18] = VOID
    return labels, predicted


def band(labels, width, around):
    """Labelled pixels with a boundary pixel in the (2w + 1) square, by dilation."""
    if around == "void":
        near = ndimage.maximum_filter(labels == VOID, 2 * width + 1)
    else:
        near = np.zeros(labels.shape, bool)
        for value in np.unique(labels):
            near |= (labels == value) & ndimage.maximum_filter(labels != value, 2 * width + 1)
    return near & (labels != VOID)


@pytest.mark.parametrize("around", ["void", "changes"])
@pytest.mark.parametrize("seed", range(2))
def test_every_width_equals_a_confusion_matrix_over_the_dilated_boundary(seed, around):
    """Chen et al. 2015, section 5.2, as DeepLab's evaluation script has it; the matrix is scikit-learn's."""
    trimap = Trimap(4, around=around)
    images = [pair(10 * seed + number) for number in range(2)]
    for labels, predicted in images:
        trimap.update(labels, predicted)
    for place, width in enumerate(range(1, 41)):
        inside = [(labels[where], predicted[where]) for labels, predicted in images for where in [band(labels, width, around)]]
        truth, guess = (np.concatenate(values) for values in zip(*inside, strict=True))
        matrix = confusion_matrix(truth, guess, labels=range(4))
        hits = matrix.diagonal()
        np.testing.assert_array_equal(trimap.counts[place], np.stack([hits, matrix.sum(1), matrix.sum(0)], 1))
        with np.errstate(invalid="ignore"):
            iou = hits / (matrix.sum(1) + matrix.sum(0) - hits)
        np.testing.assert_allclose(trimap.iou[place], iou)
        assert trimap.accuracy[place] == pytest.approx(hits.sum() / matrix.sum())
        assert trimap.miou()[place] == pytest.approx(np.nanmean(iou))
    assert np.isnan(trimap.iou[:, 3]).all()


def test_distances_to_a_change_equal_the_chessboard_transform_of_each_mask():
    """scipy.ndimage.distance_transform_cdt, class by class."""
    labels = pair(5)[0]
    for border in (False, True):
        expected = np.zeros(labels.shape, int)
        for value in np.unique(labels):
            mask = np.pad(labels == value, 1, constant_values=not border)
            expected[labels == value] = ndimage.distance_transform_cdt(mask, "chessboard")[1:-1, 1:-1][labels == value]
        np.testing.assert_array_equal(steps_to_change(labels, 1000, border), expected)
        np.testing.assert_array_equal(steps_to_change(labels, 3, border), np.minimum(expected, 4))
    assert (steps_to_change(np.zeros((3, 4), int), 7, border=False) == 8).all()


def obvious_boundary_counts(labels, predicted, classes, width):
    """Pad with zeros, erode d times with a 3x3 square, take what was lost (Cheng et al. 2021)."""
    d, known = max(1, round(width * math.hypot(*labels.shape))), labels != VOID
    labels, predicted = filled(*labelled_pair(labels, predicted, classes))
    counts = []
    for k in range(classes):
        true, drawn = (
            known & mask & ~ndimage.binary_erosion(np.pad(mask, 1), SQUARE, d)[1:-1, 1:-1] for mask in (labels == k, predicted == k)
        )
        counts.append([(true & drawn).sum(), true.sum(), drawn.sum()])
    return np.array(counts)


@pytest.mark.parametrize("width", [0.005, 0.02, 0.1, 0.5])
def test_boundary_iou_equals_repeated_erosion_of_each_class(width):
    score, total = BoundaryIoU(4, width), np.zeros((4, 3), int)
    for seed in range(4):
        labels, predicted = pair(seed)
        score.update(labels, predicted)
        total += obvious_boundary_counts(labels, predicted, 4, width)
    np.testing.assert_array_equal(score.images.total, total)
    with np.errstate(invalid="ignore"):
        expected = total[:, 0] / (total[:, 1] + total[:, 2] - total[:, 0])
    np.testing.assert_allclose(score.per_class, expected)
    assert score.mean() == pytest.approx(np.nanmean(expected))


@pytest.mark.parametrize("known", [None, 1, 5, 40])
def test_void_is_filled_from_a_nearest_known_pixel(known):
    """Void as it comes, and all but a few pixels, so that whole rows and columns have none."""
    labels, predicted = pair(1)
    if known:
        kept = np.random.default_rng(0).choice(np.flatnonzero(labels != VOID), known, replace=False)
        labels = np.where(np.isin(np.arange(labels.size), kept).reshape(labels.shape), labels, VOID)
    truth, guess = filled(*labelled_pair(labels, predicted, 4))
    places = np.argwhere(labels != VOID)
    for y, x in np.argwhere(labels == VOID)[::7]:
        far = ((places - (y, x)) ** 2).sum(1)
        nearest = places[far == far.min()]
        assert (truth[y, x], guess[y, x]) in [(labels[a, b], predicted[a, b]) for a, b in nearest]
    assert (truth[labels != VOID] == labels[labels != VOID]).all()


def test_an_object_that_void_surrounds_keeps_its_contour():
    labels = np.zeros((60, 60), np.uint8)
    labels[12:48, 12:48], labels[15:45, 15:45] = VOID, 1
    missed, stray = np.zeros_like(labels), np.where(labels == VOID, 0, labels)
    stray[2, 2] = 1
    for predicted, expected in ((labels, 1.0), (missed, 0.0), (stray, 0.99)):
        contour, band, distance = BoundaryF(2), BoundaryIoU(2, 0.05), SurfaceDistance(2)
        for score in (contour, band, distance):
            score.update(labels, np.where(predicted == VOID, 0, predicted))
        assert contour.per_class[1] == pytest.approx(expected, abs=0.02)
        assert band.per_class[1] == pytest.approx(expected, abs=0.02)
        assert distance.missed[1] == (expected == 0)


def test_a_single_colour_gets_no_credit_for_the_edges_of_void():
    labels = np.zeros((40, 40), np.uint8)
    labels[:, 20:], labels[:, 19:22] = 1, VOID
    for score in (BoundaryIoU(2, 0.05), BoundaryF(2), SurfaceDistance(2)):
        score.update(labels[3:-3, 3:-3], np.zeros((34, 34), np.uint8))
        if isinstance(score, BoundaryIoU):
            along_void = score.images.total[0, 0]
            score.update(np.zeros((34, 34), np.uint8), np.zeros((34, 34), np.uint8))
            assert along_void < score.images.total[0, 0] - along_void, "the border of the image alone"
        elif isinstance(score, BoundaryF):
            assert score.images.total[:, 0].sum() == 0
        else:
            assert score.missed[1] == 1


def test_a_shift_by_one_pixel_costs_little_iou_and_much_boundary_iou():
    labels = np.zeros((100, 100), np.uint8)
    labels[20:80, 20:80] = 1
    moved = np.roll(labels, 1, 1)
    score = BoundaryIoU(2, 0.01)  # a band of one pixel
    score.update(labels, moved)
    assert ((labels & moved).sum() / (labels | moved).sum()) > 0.96
    assert score.per_class[1] == pytest.approx(118 / (2 * 236 - 118))  # rings of 236: top and bottom share 59 pixels each


def test_a_perfect_prediction_scores_one_whatever_it_says_on_void():
    labels, predicted = pair(1)
    perfect = np.where(labels == VOID, predicted, labels)
    score, trimap = BoundaryIoU(4), Trimap(4)
    score.update(labels, perfect)
    trimap.update(labels, perfect)
    assert score.mean() == 1
    assert (trimap.accuracy == 1).all()
    assert (trimap.miou() == 1).all()


def test_void_alone_and_no_boundary_give_nan_and_poison_nothing():
    void, flat = np.full((8, 8), VOID, np.uint8), np.zeros((8, 8), np.uint8)
    score, trimap = BoundaryIoU(4), Trimap(4)
    score.update(void, flat)
    trimap.update(void, flat)
    trimap.update(flat, flat)
    assert math.isnan(score.mean())
    assert np.isnan(trimap.accuracy).all()
    labels, _ = pair(1)
    for each in (score, trimap):
        each.update(labels, np.where(labels == VOID, 0, labels))
    assert score.mean() == 1
    assert (trimap.accuracy == 1).all()


def test_merged_parts_equal_one_stream():
    for make in (lambda: BoundaryIoU(4), lambda: Trimap(4, kept=(1, 5))):
        whole, parts = make(), [make(), make()]
        for seed in range(4):
            whole.update(*pair(seed), name=str(seed))
            parts[seed // 2].update(*pair(seed), name=str(seed))
        parts[0].merge(parts[1])
        np.testing.assert_array_equal(parts[0].images.table, whole.images.table)
        assert whole.images.table.dtype == np.int64
    np.testing.assert_array_equal(whole.counts, parts[0].counts)
    np.testing.assert_array_equal(whole.counts[[0, 4]], whole.images.total)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2)])
def test_the_smallest_images_are_scored(shape):
    labels, predicted = np.random.default_rng(3).integers(0, 2, (2, *shape)).astype(np.uint8)
    score, trimap = BoundaryIoU(2), Trimap(2)
    score.update(labels, predicted)
    trimap.update(labels, predicted)
    np.testing.assert_array_equal(score.images.total, obvious_boundary_counts(labels, predicted, 2, 0.02))
    assert trimap.counts[-1, :, 1].sum() == (labels.size if len(np.unique(labels)) == 2 else 0)


def test_bad_settings_are_named():
    for widths in ([], [0, 1], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match="widths"):
            Trimap(2, widths)
    with pytest.raises(ValueError, match="changes or void"):
        Trimap(2, around="edges")
    with pytest.raises(ValueError, match="fraction"):
        BoundaryIoU(2, 15)
    with pytest.raises(ValueError, match="different"):
        Trimap(2).merge(Trimap(2, [1, 2]))
    with pytest.raises(ValueError, match="different"):
        Trimap(2).merge(Trimap(2, kept=[3]))
    with pytest.raises(ValueError, match="kept has 41, which is not one of the widths"):
        Trimap(2, kept=[41])
    with pytest.raises(ValueError, match="different"):
        BoundaryIoU(2).merge(BoundaryIoU(3))
