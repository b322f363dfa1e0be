"""Warping error: disagreements of two binary maps that no deformation of the truth can explain.

Source: Jain et al. 2010 (CVPR, "Boundary learning by optimization with topological constraints"); simple points: Kong & Rosenfeld 1989
(Computer Vision, Graphics and Image Processing 48); number of components around a pixel: Yokoi et al. 1975.
"""

import math

import numpy as np
from numba import njit
from torch import Tensor

from perpixel.metrics.bands import steps_to_change
from perpixel.metrics.pairs import integer_map
from perpixel.metrics.segments import segments_of
from perpixel.metrics.tallies import PerImage

# Around a pixel, as bits 0 to 7 of the index into a table: from the right neighbour counter-clockwise.
_AROUND = np.array([(0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)])
RADIUS = 20  # pixels; of the script that the EM challenge's page gives for its metrics


class Warping:
    """Streaming pixel error and warping error of binary maps (1: inside of cells, 0: membrane), over the pixels of the set.

    The warping error is the share of pixels in which the prediction differs from the warped truth (`warp`): what a shifted or thicker
    membrane costs in pixels is gone, and splits, mergers, holes and lost objects remain. `images` keeps of each image pixels, pixels that
    differ, and pixels that still differ after warping; `counts` are their sums.
    """

    def __init__(self, connectivity: int = 4, reach: int | None = None) -> None:
        """`connectivity` of the inside (4 or 8; the outside has the other); `reach` as in `warp`."""
        _check(connectivity, reach)
        self.connectivity = connectivity
        self.reach = reach
        self.images = PerImage((3,))

    def update(self, truth: Tensor | np.ndarray, predicted: Tensor | np.ndarray, known: np.ndarray | None = None, name: str = "") -> None:
        """Add one image: (H, W) each, 0 and anything else; only pixels that are `known` (bool) count, None: all."""
        warped = warp(truth, predicted, self.connectivity, self.reach)
        true, guess = _both(truth, predicted)
        counts = np.ones(true.shape, bool) if known is None else known
        self.images.add(np.array([counts.sum(), (counts & (true != guess)).sum(), (counts & (warped != guess)).sum()]), name)

    def merge(self, other: "Warping") -> None:
        """Append the images of another one with the same settings."""
        if (other.connectivity, other.reach) != (self.connectivity, self.reach):
            raise ValueError("cannot merge warping errors of different connectivity or reach")
        self.images.merge(other.images)

    @property
    def counts(self) -> np.ndarray:
        """(3,) int64: those of the set."""
        return self.images.total

    @property
    def pixel_error(self) -> float:
        """Share of the pixels that differ."""
        return self._share(1)

    @property
    def warping_error(self) -> float:
        """Share of the pixels that still differ when the truth is warped onto the prediction."""
        return self._share(2)

    def _share(self, place: int) -> float:
        counts = self.counts
        return int(counts[place]) / int(counts[0]) if counts[0] else math.nan


def warp(
    truth: Tensor | np.ndarray,
    predicted: Tensor | np.ndarray,
    connectivity: int = 4,
    reach: int | None = None,
    certainty: np.ndarray | None = None,
) -> np.ndarray:
    """The truth, deformed towards the prediction without a change of its topology.

    Pixels that differ are flipped one after the other where they are simple, that is where the flip joins, parts, opens and closes
    nothing, in passes until a pass flips none. The least number of remaining disagreements over all warps is hard to find; this is the
    greedy bound that the field reports, and it depends on the order: a pass goes from the most certain pixel to the least, equal ones
    column by column, as the program of the EM challenge does. Beyond the image's border is 0.

    Args:
        truth: (H, W) integers or booleans, 0 and anything else.
        predicted: likewise.
        connectivity: of the pixels that are not 0: 4 (a line of one pixel parts two cells) or 8; pixels of 0 have the other.
        reach: only pixels within as many steps (a king's) of the truth's boundary are flipped; None: all.
        certainty: (H, W) how sure the prediction is of each pixel, such as the distance of its probability to the threshold; None: alike.

    Returns:
        (H, W) bool.
    """
    _check(connectivity, reach)
    true, guess = _both(truth, predicted)
    free = true != guess
    if reach is not None:
        free &= steps_to_change(true.astype(np.int32), reach, border=False) <= reach
    columns, rows = np.nonzero(free.T)
    if certainty is not None:
        order = np.argsort(-certainty[rows, columns], kind="stable")
        rows, columns = rows[order], columns[order]
    warped = np.pad(true, 1)
    _flip(warped, rows + 1, columns + 1, simple_table(connectivity), _AROUND)
    return warped[1:-1, 1:-1]


def splits_and_mergers(warped: Tensor | np.ndarray, predicted: Tensor | np.ndarray, radius: int = RADIUS) -> np.ndarray:
    """Where a disagreement that is left after warping splits a segment or merges several: all that the board of the EM challenge counts.

    Of holes and of objects that come or go nothing is counted. Segments are 4-connected, as those of `warp` are by default.

    Args:
        warped: (H, W) integers or booleans, from `warp`.
        predicted: likewise.
        radius: a segment is split where its parts are not joined within so many pixels up, down and to the sides.

    Returns:
        (H, W) bool: outside pixels with more than one segment among their eight neighbours, which the prediction joins, and inside pixels
        without which these neighbours belong to more than one segment, which the prediction parts.

    Source: the "minimum splits and mergers warping error" of the challenge's page, as its organisers' program and script have it.
    """
    before, after = _both(warped, predicted)
    numbers = np.pad(segments_of(before), 1)
    return np.asarray(_splits_and_mergers(numbers, np.pad(before != after, 1), radius, _AROUND)[1:-1, 1:-1])


def simple_table(connectivity: int) -> np.ndarray:
    """(256,) bool: whether a pixel is simple, by the bits of its neighbours as in `_AROUND`.

    A pixel is simple where exactly one component of each kind touches it, which one number tells: Yokoi's, over the 4-connected kind.
    """
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    if connectivity == 8:
        bits = 1 - bits  # then it is the pixels of 0 that are 4-connected
    straight, diagonal, after = bits[:, 0::2], bits[:, 1::2], np.roll(bits[:, 0::2], -1, 1)
    return np.asarray((straight - straight * diagonal * after).sum(1) == 1)


def _check(connectivity: int, reach: int | None) -> None:
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity is {connectivity}; pixels have 4 or 8 neighbours")
    if reach is not None and reach < 1:
        raise ValueError(f"reach is {reach}; give at least 1 pixel, or None for no limit")


def _both(one: Tensor | np.ndarray, two: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction as (H, W) bool each."""
    true, guess = integer_map(one, "truth") != 0, integer_map(two, "predicted") != 0
    if true.shape != guess.shape:
        raise ValueError(f"truth is {true.shape} and predicted {guess.shape}; they must have the same (height, width)")
    return true, guess


@njit(cache=True, nogil=True)
def _flip(warped, rows, columns, simple, around):  # type: ignore[no-untyped-def]
    """Flip simple pixels of `warped`, which has a frame of False, among these, in passes in their order; each once."""
    left = np.arange(len(rows))
    flipped = True
    while flipped:
        flipped, kept = False, 0
        for place in left:
            y, x = rows[place], columns[place]
            pattern = 0
            for bit in range(8):
                if warped[y + around[bit, 0], x + around[bit, 1]]:
                    pattern |= 1 << bit
            if simple[pattern]:
                warped[y, x] = not warped[y, x]
                flipped = True
            else:
                left[kept] = place
                kept += 1
        left = left[:kept]


@njit(cache=True, nogil=True)
def _splits_and_mergers(numbers, differs, radius, around):  # type: ignore[no-untyped-def]
    """See `splits_and_mergers`; all have a frame of 0, and `numbers` are those of the warped segments."""
    height, width = numbers.shape
    found = np.zeros((height, width), np.bool_)
    seen = np.zeros((height, width), np.int64)  # the last pixel from whose neighbour it was reached
    queue = np.empty(((2 * radius + 1) ** 2, 2), np.int32)
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            if not differs[y, x]:
                continue
            own, first, start = numbers[y, x], 0, -1
            for bit in range(8):
                number = numbers[y + around[bit, 0], x + around[bit, 1]]
                if number and first and number != first:
                    found[y, x] = True
                first = first or number
                if number == own:
                    start = bit
            if found[y, x] or not own or start < 0:
                continue
            # All neighbours inside are of this segment: are they still together without the pixel?
            mark, size, head = y * width + x, 1, 0
            queue[0] = y + around[start, 0], x + around[start, 1]
            seen[y, x] = seen[queue[0, 0], queue[0, 1]] = mark
            while head < size:
                v, u = queue[head]
                head += 1
                for bit in range(0, 8, 2):  # straight neighbours
                    b, a = v + around[bit, 0], u + around[bit, 1]
                    if numbers[b, a] == own and seen[b, a] != mark and abs(b - y) <= radius and abs(a - x) <= radius:
                        seen[b, a] = mark
                        queue[size] = b, a
                        size += 1
            for bit in range(8):
                v, u = y + around[bit, 0], x + around[bit, 1]
                if numbers[v, u] == own and seen[v, u] != mark:
                    found[y, x] = True
    return found
