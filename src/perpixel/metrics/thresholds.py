"""Neurite scores as the boards of the EM segmentation challenge report them: the best over thresholds of the inside's probability.

Sources: Arganda-Carreras et al. 2015 (Frontiers in Neuroanatomy 9:142) and the challenge's page on its evaluation; what these leave open
is as in the organisers' program for ImageJ (Trainable Segmentation, package metrics): thresholds in steps of a tenth, pixels predicted to
be outside as segments of their own, the pixel error from the F-score of the inside, the warping error from splits and mergers alone, pairs
and pixels summed over the sections for the board of 2012, and for that of 2015 the mean of the sections, with the prediction's membranes
thinned to one pixel by a watershed.
"""

import math
from collections.abc import Sequence

import numpy as np
from numba import njit
from torch import Tensor

from perpixel.metrics.pairs import integer_map
from perpixel.metrics.segments import foreground, overlaps, segments_of, v_info, v_rand
from perpixel.metrics.tallies import PerImage, dice
from perpixel.metrics.warping import splits_and_mergers, warp

THRESHOLDS = tuple(tenth / 10 for tenth in range(10))


class Board:
    """Streaming scores of the EM challenge at several thresholds of the probability of the inside of cells.

    Segments are 4-connected. A true-inside pixel that is predicted to be outside is a segment of its own, so a thick membrane costs pairs
    that are lost, and never pairs that are wrong. Where nothing is inside in either there is no F-score, and the errors from it are NaN.

    Attributes:
        pairs: of each image (T, 3) pairs of true-inside pixels, each with itself too, that are together in both, in the prediction and in
            the truth.
        insides: of each image (T, 3) pixels that are inside in both, in the prediction and in the truth.
        pixels: of each image (T, 3) pixels, pixels that differ, and those that split or merge after warping (`warping.splits_and_mergers`).
        thinned: per image (T, 2) V_rand and V_info of the thinned prediction (`thinned_segments`); NaN where there is no true inside.
    """

    def __init__(self, thresholds: Sequence[float] = THRESHOLDS) -> None:
        """`thresholds` rise, between 0 and 1; inside is what lies above."""
        if not thresholds or list(thresholds) != sorted(set(thresholds)) or min(thresholds) < 0 or max(thresholds) >= 1:
            raise ValueError(f"thresholds are {list(thresholds)}; they must rise, from 0 to below 1")
        self.thresholds = tuple(thresholds)
        self.pairs, self.insides, self.pixels = (PerImage((len(self.thresholds), 3)) for _ in range(3))
        self._thinned: list[np.ndarray] = []

    def update(self, truth: Tensor | np.ndarray, inside: Tensor | np.ndarray, known: np.ndarray | None = None, name: str = "") -> None:
        """Add one image.

        Args:
            truth: (H, W) integers or booleans, 0 outside.
            inside: (H, W) probability of the inside, 0 to 1.
            known: (H, W) bool; other pixels are outside in both, and are not counted. None: all.

        Raises:
            ValueError: if shapes differ or a probability is not from 0 to 1.
        """
        counted = np.ones(np.shape(truth), bool) if known is None else known
        true = (integer_map(truth, "truth") != 0) & counted
        probability = inside.detach().cpu().numpy() if isinstance(inside, Tensor) else np.asarray(inside)
        if probability.shape != true.shape:
            raise ValueError(f"truth is {true.shape} and inside {probability.shape}; they must have the same (height, width)")
        if not ((probability >= 0) & (probability <= 1)).all():
            raise ValueError("inside has values that are not from 0 to 1; it must be a probability (logits need softmax first)")
        segments = segments_of(true)
        pairs, insides, pixels, scores = [], [], [], []
        for threshold in self.thresholds:
            guess = (probability > threshold) & counted
            drawn = segments_of(guess)
            pairs.append([int((counts**2).sum()) for counts in foreground(overlaps(segments, drawn), alone=True)])
            insides.append(((true & guess).sum(), guess.sum(), true.sum()))
            certainty = abs(probability - np.float64(threshold)).astype(np.float32)
            breaks = splits_and_mergers(warp(true, guess, certainty=certainty), guess)
            pixels.append((counted.sum(), ((true != guess) & counted).sum(), (breaks & counted).sum()))
            thin = overlaps(segments, np.where(counted, thinned_segments(drawn), 0))
            scores.append((v_rand(thin, alone=True).score, v_info(thin, alone=True).score))
        self.pairs.add(np.array(pairs), name)
        self.insides.add(np.array(insides), name)
        self.pixels.add(np.array(pixels), name)
        self._thinned.append(np.array(scores))

    def merge(self, other: "Board") -> None:
        """Append the images of another one with the same thresholds."""
        if other.thresholds != self.thresholds:
            raise ValueError(f"cannot merge scores at thresholds {other.thresholds} and {self.thresholds}")
        self.pairs.merge(other.pairs)
        self.insides.merge(other.insides)
        self.pixels.merge(other.pixels)
        self._thinned += other._thinned

    @property
    def thinned(self) -> np.ndarray:
        """(N, T, 2)."""
        return np.stack(self._thinned) if self._thinned else np.zeros((0, len(self.thresholds), 2))

    def curves(self) -> dict[str, np.ndarray]:
        """Score -> (T,) its value at each threshold; NaN where there is none."""
        thinned = self.thinned
        has = (~np.isnan(thinned)).sum(0)
        means = np.where(has > 0, np.nansum(thinned, 0) / np.maximum(has, 1), np.nan)
        pixels = self.pixels.total
        shares = np.divide(pixels[:, 1:], pixels[:, :1], out=np.full((len(pixels), 2), np.nan), where=pixels[:, :1] > 0)
        return {
            "rand_error": 1 - dice(self.pairs.total),
            "warping_error": shares[:, 1],
            "pixel_error": 1 - dice(self.insides.total),
            "differing_pixels": shares[:, 0],
            "v_rand_thinned": means[:, 0],
            "v_info_thinned": means[:, 1],
        }

    def best(self) -> dict[str, tuple[float, float]]:
        """Score -> its best value and the threshold that has it; NaN where there is none."""
        found = {}
        for name, curve in self.curves().items():
            if np.isnan(curve).all():
                found[name] = (math.nan, math.nan)
            else:
                place = int(np.nanargmax(curve) if name.startswith("v_") else np.nanargmin(curve))
                found[name] = (float(curve[place]), self.thresholds[place])
        return found


def thinned_segments(segments: Tensor | np.ndarray) -> np.ndarray:
    """(H, W) int32: segments grown into the 0 between them until one pixel of it is left, that is, membranes thinned to lines.

    All grow by one step of the four neighbours at a time, as a watershed of a membrane map does; a pixel that two would take stays 0.

    Args:
        segments: (H, W) numbers of segments, 0 between them (`segments.segments_of`).
    """
    grown = np.ascontiguousarray(integer_map(segments, "segments"), np.int32).copy()
    _grow(grown)
    return grown


@njit(cache=True, nogil=True)
def _grow(grown):  # type: ignore[no-untyped-def]
    height, width = grown.shape
    queue = np.empty((grown.size, 2), np.int32)
    waiting = np.zeros(grown.shape, np.bool_)  # or has waited: each pixel is looked at once
    head, tail = 0, 0
    for y in range(height):
        for x in range(width):
            if grown[y, x] == 0 and _neighbour(grown, y, x) != 0:
                queue[tail, 0], queue[tail, 1], waiting[y, x] = y, x, True
                tail += 1
    while head < tail:
        y, x = queue[head]
        head += 1
        taken = _neighbour(grown, y, x)
        if taken > 0:
            grown[y, x] = taken
            for dy, dx in ((-1, 0), (0, -1), (0, 1), (1, 0)):
                v, u = y + dy, x + dx
                if 0 <= v < height and 0 <= u < width and grown[v, u] == 0 and not waiting[v, u]:
                    queue[tail, 0], queue[tail, 1], waiting[v, u] = v, u, True
                    tail += 1


@njit(cache=True, nogil=True)
def _neighbour(grown, y, x):  # type: ignore[no-untyped-def]
    """The segment that touches a pixel by its side; 0: none, -1: several."""
    found = 0
    for dy, dx in ((-1, 0), (0, -1), (0, 1), (1, 0)):
        v, u = y + dy, x + dx
        if 0 <= v < grown.shape[0] and 0 <= u < grown.shape[1] and grown[v, u] != 0:
            if found != 0 and found != grown[v, u]:
                return -1
            found = grown[v, u]
    return found
