"""Scores near boundaries: trimap accuracy and IoU in bands of growing width, and Boundary IoU.

Both need the chessboard distance of each pixel to the nearest pixel that differs, which two sweeps over the image give for all classes and
all widths at once; eroding each class's mask once per pixel of width gives the same, slowly.

Sources: trimap: Kohli et al. 2009 (IJCV 82); Chen et al. 2015, arXiv:1412.7062, section 5.2. Boundary IoU: Cheng et al. 2021,
arXiv:2103.16562.
"""

import math
from collections.abc import Sequence

import numpy as np
from numba import njit
from torch import Tensor

from perpixel.metrics.pairs import VOID, filled, labelled_pair
from perpixel.metrics.tallies import PerImage, class_mean, iou, pixel_accuracy

AROUND = ("changes", "void")
WIDTH = 0.02  # of the diagonal: Cheng et al. 2021


class Trimap:
    """Streaming scores in a band along the true boundaries, for many widths of the band at once.

    The band of width w has the labelled pixels with a boundary pixel in the square of side 2w + 1 around them. `around` says what a
    boundary is: "changes" a pixel of another value, void being one (any data set); "void" a void pixel (DeepLab on Pascal VOC, where thin
    void strips trace the objects). The border of the image is no boundary.

    `counts` is int64 (W, K, 3), shared, true and predicted pixels of each class in the band of each width, over the whole set;
    `images` keeps the same per image of the widths in `kept`.
    """

    def __init__(self, classes: int, widths: Sequence[int] = range(1, 41), around: str = "changes", kept: Sequence[int] = ()) -> None:
        """`widths` are whole pixels, at least 1, rising; `kept` are some of them."""
        if classes < 1:
            raise ValueError(f"classes is {classes}; a score needs at least 1")
        if not widths or min(widths) < 1 or list(widths) != sorted(set(widths)):
            raise ValueError(f"widths are {list(widths)}; they must be whole pixels from 1, rising")
        if around not in AROUND:
            raise ValueError(f"around is {around!r}; a band lies around {' or '.join(AROUND)}")
        self.classes = classes
        self.widths = tuple(widths)
        self.around = around
        if unknown := set(kept) - set(widths):
            raise ValueError(f"kept has {min(unknown)}, which is not one of the widths {list(widths)}")
        self.kept = tuple(kept)
        self.counts = np.zeros((len(self.widths), classes, 3), np.int64)
        self.images = PerImage((len(self.kept), classes, 3))

    def update(self, labels: Tensor | np.ndarray, predicted: Tensor | np.ndarray, ignore: int = 255, name: str = "") -> None:
        """Add one image, (H, W) each; errors as in `labelled_pair`."""
        truth, guess = labelled_pair(labels, predicted, self.classes, ignore)
        last = self.widths[-1]
        around = truth if self.around == "changes" else (truth == VOID).astype(np.int32)
        # Pixels at each distance are counted once; the band of a width is the sum of the distances up to it.
        rings = _ring_counts(truth, guess, steps_to_change(around, last, border=False), last, self.classes)
        counts = rings.cumsum(0)[np.array(self.widths)]
        self.counts += counts
        self.images.add(counts[[self.widths.index(width) for width in self.kept]], name)

    def merge(self, other: "Trimap") -> None:
        """Add the counts of another trimap of the same classes, widths and boundaries."""
        if (other.classes, other.widths, other.around, other.kept) != (self.classes, self.widths, self.around, self.kept):
            raise ValueError("cannot merge trimaps of different classes, widths or boundaries")
        self.counts += other.counts
        self.images.merge(other.images)

    @property
    def accuracy(self) -> np.ndarray:
        """(W,) share of the band's pixels that are right; NaN where the band is empty."""
        return pixel_accuracy(self.counts)

    @property
    def iou(self) -> np.ndarray:
        """(W, K) IoU of each class within the band."""
        return iou(self.counts)

    def miou(self, absent: str = "union") -> np.ndarray:
        """(W,) mean IoU within the band, by a rule of `ABSENT_RULES`."""
        return class_mean(self.iou, self.counts, absent)


class BoundaryIoU:
    """Streaming Boundary IoU of K classes: IoU of the inner bands of truth and prediction.

    The band of a class has its pixels within d steps (a king's) of a pixel that is not of the class, or of the outside of the image;
    d = max(1, round(`width` x diagonal)). Sizes of intersection and bands are summed over the set. A pixel without truth does not
    count; for the bands of others it is what the nearest pixel with truth is, in each of the two (`pairs.filled`).

    `images` keeps (K, 3) counts per image: pixels in both bands, in the true and in the predicted one.
    """

    def __init__(self, classes: int, width: float = WIDTH) -> None:
        """`width` is a fraction of the diagonal, above 0."""
        if not 0 < width < 1:
            raise ValueError(f"width is {width}; it is a fraction of the image's diagonal, between 0 and 1")
        if classes < 1:
            raise ValueError(f"classes is {classes}; a score needs at least 1")
        self.classes = classes
        self.width = width
        self.images = PerImage((classes, 3))

    def update(self, labels: Tensor | np.ndarray, predicted: Tensor | np.ndarray, ignore: int = 255, name: str = "") -> None:
        """Add one image, (H, W) each; errors as in `labelled_pair`."""
        truth, guess = labelled_pair(labels, predicted, self.classes, ignore)
        d = max(1, round(self.width * math.hypot(*truth.shape)))
        known = truth != VOID
        true, drawn = (np.where(known & (steps_to_change(values, d, border=True) <= d), values, VOID) for values in filled(truth, guess))
        self.images.add(_band_counts(true, drawn, self.classes), name)

    def merge(self, other: "BoundaryIoU") -> None:
        """Append the images of another score of as many classes and the same width."""
        if (other.classes, other.width) != (self.classes, self.width):
            raise ValueError("cannot merge Boundary IoU of different classes or widths")
        self.images.merge(other.images)

    @property
    def per_class(self) -> np.ndarray:
        """(K,) Boundary IoU of the set; NaN where a class is in neither truth nor prediction."""
        return iou(self.images.total)

    def mean(self, absent: str = "union") -> float:
        """Mean over the classes, by a rule of `ABSENT_RULES`."""
        return float(class_mean(self.per_class, self.images.total, absent))


def steps_to_change(labels: np.ndarray, limit: int, border: bool) -> np.ndarray:
    """King's moves from each pixel to the nearest pixel with another value.

    Args:
        labels: (H, W) integers.
        limit: no distance above this is told apart, in pixels.
        border: whether the outside of the image is another value.

    Returns:
        (H, W) int32 from 1 to limit + 1, the latter where there is none within the limit.
    """
    steps = np.full(labels.shape, limit + 1, np.int32)
    _sweep(labels, steps, border)
    return steps


@njit(cache=True, nogil=True)
def _sweep(labels, steps, border):  # type: ignore[no-untyped-def]
    height, width = labels.shape
    for y in range(height):
        for x in range(width):
            change = border and (y == 0 or x == 0 or y == height - 1 or x == width - 1)
            here, nearest = labels[y, x], steps[y, x]
            for dy in range(-1, 2):
                if 0 <= y + dy < height:
                    for dx in range(-1, 2):
                        if 0 <= x + dx < width:
                            change |= labels[y + dy, x + dx] != here
                            if dy < 0 or (dy == 0 and dx < 0):
                                nearest = min(nearest, steps[y + dy, x + dx] + 1)
            steps[y, x] = 1 if change else nearest
    for y in range(height - 1, -1, -1):
        for x in range(width - 1, -1, -1):
            nearest = steps[y, x]
            if x + 1 < width:
                nearest = min(nearest, steps[y, x + 1] + 1)
            if y + 1 < height:
                for dx in range(-1, 2):
                    if 0 <= x + dx < width:
                        nearest = min(nearest, steps[y + 1, x + dx] + 1)
            steps[y, x] = nearest


@njit(cache=True, nogil=True)
def _ring_counts(truth, guess, steps, last, classes):  # type: ignore[no-untyped-def]
    """(last + 1, K, 3): shared, true and predicted pixels at each distance; those further away are not counted."""
    rings = np.zeros((last + 1, classes, 3), np.int64)
    for y in range(truth.shape[0]):
        for x in range(truth.shape[1]):
            t, g, d = truth[y, x], guess[y, x], steps[y, x]
            if t != VOID and d <= last:
                rings[d, t, 1] += 1
                rings[d, g, 2] += 1
                if t == g:
                    rings[d, t, 0] += 1
    return rings


@njit(cache=True, nogil=True)
def _band_counts(truth, guess, classes):  # type: ignore[no-untyped-def]
    """(K, 3): shared, true and predicted pixels, where each may be void alone."""
    counts = np.zeros((classes, 3), np.int64)
    for y in range(truth.shape[0]):
        for x in range(truth.shape[1]):
            t, g = truth[y, x], guess[y, x]
            if t != VOID:
                counts[t, 1] += 1
                if t == g:
                    counts[t, 0] += 1
            if g != VOID:
                counts[g, 2] += 1
    return counts
