"""BF score: how well the contours of the classes are drawn, by one-to-one matching of contour pixels.

Source: Csurka et al. 2013 (BMVC, "What is a good evaluation measure for semantic segmentation?"); Badrinarayanan et al. 2017,
arXiv:1511.00561, section 4.1 (0.75 % of the diagonal, mean over the images); contours and one-to-one correspondence as in the Berkeley
benchmark, Martin et al. 2004 (PAMI 26/5).
"""

import math

import numpy as np
from numba import njit
from torch import Tensor

from perpixel.metrics.pairs import VOID, filled, labelled_pair
from perpixel.metrics.tallies import PerImage, dice

BUCKET = 8  # columns
TOLERANCE = 0.0075  # of the image's diagonal: Badrinarayanan et al. 2017, section 4.1


class BoundaryF:
    """Streaming BF score of K classes, image by image.

    A pixel is on the contour of a class where the 2x2 pixels to its right and below hold the class and something else; the image's border
    is no contour. Contour pixels of truth and prediction are matched one to one, as many as can be, each at most `tolerance` times the
    image's diagonal apart. Precision is matched / predicted, recall matched / true, and F1 = 2 matched / (predicted + true). The score of
    an image is the mean of F1 over the classes with a contour in truth or prediction (0 where only one has it); that of the set is the
    mean over the images with any contour. A pixel without truth is in both what the nearest pixel with truth is (`pairs.filled`).

    `images` keeps (K, 3) counts per image: matched, true and predicted contour pixels.

    Deviations: the Berkeley code solves a thinned assignment problem; ours is the exact maximum matching, which its
    result approaches. The authors' script draws contours into void; we do not. It counts an image without contours as 0; we leave it out.
    """

    def __init__(self, classes: int, tolerance: float = TOLERANCE) -> None:
        """`tolerance` is a fraction of the diagonal, at least 0."""
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance is {tolerance}; it is a fraction of the image's diagonal, from 0 to below 1")
        if classes < 1:
            raise ValueError(f"classes is {classes}; a score needs at least 1")
        self.classes = classes
        self.tolerance = tolerance
        self.images = PerImage((classes, 3))

    def update(self, labels: Tensor | np.ndarray, predicted: Tensor | np.ndarray, ignore: int = 255, name: str = "") -> None:
        """Add one image, (H, W) each; errors as in `labelled_pair`."""
        truth, guess = filled(*labelled_pair(labels, predicted, self.classes, ignore))
        self.images.add(matched_contours(truth, guess, self.classes, self.tolerance * math.hypot(*truth.shape)), name)

    def merge(self, other: "BoundaryF") -> None:
        """Append the images of another score of as many classes and the same tolerance."""
        if (other.classes, other.tolerance) != (self.classes, self.tolerance):
            raise ValueError("cannot merge BF scores of different classes or tolerances")
        self.images.merge(other.images)

    @property
    def per_image(self) -> np.ndarray:
        """(N,) the score of each image; NaN where no class has a contour."""
        return _nanmean(dice(self.images.table), axis=1)

    @property
    def per_class(self) -> np.ndarray:
        """(K,) mean F1 of each class over the images where it has a contour; NaN where it never has."""
        return _nanmean(dice(self.images.table), axis=0)

    @property
    def score(self) -> float:
        """The BF score of the set: the mean of `per_image`."""
        return float(_nanmean(self.per_image, axis=0))


def matched_contours(truth: np.ndarray, guess: np.ndarray, classes: int, distance: float) -> np.ndarray:
    """(K, 3) int64: matched, true and predicted contour pixels of each class.

    Args:
        truth: (H, W) int32, class indices or `VOID`.
        guess: likewise.
        classes: K.
        distance: largest between two matched pixels, in pixels.
    """
    true_sizes, true = _contours(truth, classes)
    drawn_sizes, drawn = _contours(guess, classes)
    counts = np.zeros((classes, 3), np.int64)
    counts[:, 1], counts[:, 2] = true_sizes, drawn_sizes
    for k, left, right in zip(
        range(classes), np.split(drawn, drawn_sizes.cumsum()[:-1]), np.split(true, true_sizes.cumsum()[:-1]), strict=True
    ):
        counts[k, 0] = largest_matching(left, right, distance)
    return counts


def largest_matching(left: np.ndarray, right: np.ndarray, distance: float) -> int:
    """Pairs in a maximum matching of two sets of pixels, each (n, 2) rows and columns in raster order, at most `distance` pixels apart."""
    if not len(left) or not len(right):
        return 0
    left, right = left.astype(np.int32), right.astype(np.int32)
    rows, buckets = int(max(left[-1, 0], right[-1, 0])) + 1, int(right[:, 1].max()) // BUCKET + 1
    sizes = np.bincount(right[:, 0] * np.int64(buckets) + right[:, 1] // BUCKET, minlength=rows * buckets)
    ends = sizes.cumsum().reshape(rows, buckets)
    starts = np.concatenate([ends[:, :1] - sizes.reshape(rows, buckets)[:, :1], ends], 1).astype(np.int32)
    return int(_matching(left, right, starts, distance))


def _contours(labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Contour pixels per class (K,), and their (row, column) (n, 2), one class after the other."""
    found, places = _contour_pixels(labels)
    order = np.argsort(found, kind="stable")
    return np.bincount(found, minlength=classes), places[order]


@njit(cache=True, nogil=True)
def _contour_pixels(labels):  # type: ignore[no-untyped-def]
    height, width = labels.shape
    size = 0
    found, places = np.empty(1024, np.int64), np.empty((1024, 2), np.int64)
    block = np.empty(4, labels.dtype)
    for y in range(height):
        below = min(y + 1, height - 1)  # the last row has no row below: it is compared with itself
        for x in range(width):
            right = min(x + 1, width - 1)
            block[0], block[1], block[2], block[3] = labels[y, x], labels[y, right], labels[below, x], labels[below, right]
            if block[0] == block[1] and block[0] == block[2] and block[0] == block[3]:
                continue
            if size + 4 > len(found):
                found = np.concatenate((found, np.empty_like(found)))
                places = np.concatenate((places, np.empty_like(places)))
            for number in range(4):
                seen = block[number] == VOID
                for earlier in range(number):
                    seen |= block[earlier] == block[number]
                if not seen:
                    found[size], places[size, 0], places[size, 1] = block[number], y, x
                    size += 1
    return found[:size], places[:size]


# The pixels of `right` within reach of one of `left` are no list, which would take thousands of numbers a pixel where contours are dense
# and images large: they are in rising order, and the next or the one before is found by the rows of the disc. `starts` (rows, buckets + 1)
# says where in `right` each row's columns from 0, BUCKET, 2 BUCKET, ... on begin.


@njit(cache=True, nogil=True)
def _half_widths(distance):  # type: ignore[no-untyped-def]
    """Of the rows of a disc, from the uppermost on: columns to either side of its middle."""
    reach = int(distance)
    half = np.empty(2 * reach + 1, np.int64)
    for dy in range(-reach, reach + 1):
        half[dy + reach] = int(math.sqrt(distance * distance - dy * dy))
    return half


@njit(cache=True, nogil=True)
def _first_from(row, column, right, starts):  # type: ignore[no-untyped-def]
    """The first of `right` in a row that is not left of the column; the end of the row where there is none."""
    bucket = min(max(column, 0) // BUCKET, starts.shape[1] - 1)
    found, end = starts[row, bucket], starts[row, -1]
    while found < end and right[found, 1] < column:
        found += 1
    return found


@njit(cache=True, nogil=True)
def _next(y, x, place, right, starts, half):  # type: ignore[no-untyped-def]
    """The first of `right` within reach of (y, x) from `place` on; -1 where there is none."""
    if place >= len(right):
        return -1
    reach = len(half) // 2
    here = right[place, 0]
    for row in range(max(y - reach, here), min(y + reach + 1, len(starts))):
        width = half[row - y + reach]
        found = place if row == here and right[place, 1] >= x - width else _first_from(row, x - width, right, starts)
        if found < starts[row, -1] and right[found, 1] <= x + width:
            return found
    return -1


@njit(cache=True, nogil=True)
def _before(y, x, place, right, starts, half):  # type: ignore[no-untyped-def]
    """The last of `right` within reach of (y, x) up to `place`; -1 where there is none."""
    if place < 0:
        return -1
    reach = len(half) // 2
    here = right[place, 0]
    for row in range(min(y + reach, here), max(y - reach, 0) - 1, -1):
        width = half[row - y + reach]
        found = place if row == here and right[place, 1] <= x + width else _first_from(row, x + width + 1, right, starts) - 1
        if found >= starts[row, 0] and right[found, 1] >= x - width:
            return found
    return -1


@njit(cache=True, nogil=True)
def _matching(left, right, starts, distance):  # type: ignore[no-untyped-def]
    """Maximum matching by depth-first search with lookahead from every free pixel, in rounds (Pothen & Fan 1990)."""
    of_left, of_right = np.full(len(left), -1), np.full(len(right), -1)
    pairs = 0
    # Nearest first: few are left over for the search.
    radius = 0.0
    while radius < 2 * distance + 1 and pairs < min(len(left), len(right)):
        near = _half_widths(min(radius, distance))
        for i in range(len(left)):
            if of_left[i] < 0:
                j = _next(left[i, 0], left[i, 1], 0, right, starts, near)
                while j >= 0 and of_right[j] >= 0:
                    j = _next(left[i, 0], left[i, 1], j + 1, right, starts, near)
                if j >= 0:
                    of_left[i], of_right[j] = j, i
                    pairs += 1
        radius = 2 * radius if radius else 1.0
    half = _half_widths(distance)
    ahead = np.zeros(len(left), np.int64)  # no pixel before this one is free: a matched pixel never becomes free again
    seen, stack, place = np.zeros(len(right), np.int64), np.empty(len(left), np.int64), np.empty(len(left), np.int64)
    found, round_number = 1, 0
    while found and pairs < min(len(left), len(right)):
        found, round_number = 0, round_number + 1
        for i in range(len(left)):
            if of_left[i] < 0 and _augmented(i, left, right, starts, half, of_left, of_right, ahead, seen, round_number, stack, place):
                found += 1
        pairs += found
    return pairs


@njit(cache=True, nogil=True)
def _augmented(root, left, right, starts, half, of_left, of_right, ahead, seen, round_number, stack, place):  # type: ignore[no-untyped-def]
    """Whether an alternating path leads from the free pixel `root` to a free one; if so it is flipped. A round sees each pixel once."""
    forward = round_number % 2 == 1  # every other round goes backwards, so that no end of the lists is always served last
    begin = 0 if forward else len(right) - 1
    depth = 0
    stack[0], place[0] = root, begin
    while depth >= 0:
        i = stack[depth]
        y, x = left[i, 0], left[i, 1]
        j = _next(y, x, ahead[i], right, starts, half)
        while j >= 0 and of_right[j] >= 0:
            j = _next(y, x, j + 1, right, starts, half)
        ahead[i] = j + 1 if j >= 0 else len(right)
        if j >= 0:
            seen[j] = round_number
            for level in range(depth, -1, -1):
                before = of_left[stack[level]]
                of_left[stack[level]], of_right[j] = j, stack[level]
                j = before
            return True
        while True:
            j = _next(y, x, place[depth], right, starts, half) if forward else _before(y, x, place[depth], right, starts, half)
            place[depth] = (j + 1 if forward else j - 1) if j >= 0 else (len(right) if forward else -1)
            if j < 0 or seen[j] != round_number:
                break
        if j < 0:
            depth -= 1
        else:
            seen[j] = round_number
            depth += 1
            stack[depth], place[depth] = of_right[j], begin
    return False


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    counts = (~np.isnan(values)).sum(axis)
    return np.where(counts > 0, np.nansum(values, axis) / np.maximum(counts, 1), np.nan)
