"""Scores of segmentations into objects: neurites (Rand, information) and cells (SEG, F1 at IoU thresholds).

Sources: Arganda-Carreras et al. 2015 (Frontiers in Neuroanatomy 9:142), "Crowdsourcing the creation of image segmentation algorithms for
connectomics": Rand and information scores; Ulman et al. 2017 (Nature Methods 14): SEG; F1 at IoU thresholds: Caicedo et al. 2019 (Nature
Methods 16). The warping error is in `warping.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from torch import Tensor

from perpixel.metrics.pairs import integer_map
from perpixel.metrics.tallies import PerImage

Map = Tensor | np.ndarray
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # from `overlaps`


@dataclass(frozen=True)
class SplitMerge:
    """A score of two segmentations, with what splits and what merges cost of it: each 1 where there are none."""

    score: float
    split: float
    merge: float


def segments_of(inside: Map, connectivity: int = 4) -> np.ndarray:
    """(H, W) int32 objects 1..n of a mask, 0 outside: its connected components.

    `connectivity` is 4 (neurites: membranes of one pixel part them) or 8.
    """
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity is {connectivity}; pixels have 4 or 8 neighbours")
    mask = integer_map(inside, "inside") != 0
    return np.asarray(ndimage.label(mask, ndimage.generate_binary_structure(2, connectivity // 4))[0], np.int32)


def overlaps(truth: Map, predicted: Map) -> Pairs:
    """Pairs of segments that share pixels.

    Args:
        truth: (H, W) integers, a number for each segment; 0 is none (background, border, not to be scored).
        predicted: likewise.

    Returns:
        Numbers of the true segment, of the predicted one, and the pixels they share, int64 (n,) each; 0 included.
    """
    true, guess = integer_map(truth, "truth"), integer_map(predicted, "predicted")
    if true.shape != guess.shape:
        raise ValueError(f"truth is {true.shape} and predicted {guess.shape}; they must have the same (height, width)")
    true, guess = true.ravel().astype(np.int64), guess.ravel().astype(np.int64)
    rows, columns = (int(numbers.max(initial=0)) + 1 for numbers in (true, guess))
    if min(true.min(initial=0), guess.min(initial=0)) >= 0 and rows * columns <= 4 * true.size:
        table = np.bincount(true * columns + guess, minlength=1)  # without sorting
        pairs = np.flatnonzero(table)
        return *np.divmod(pairs, columns), table[pairs]
    true_numbers, row = np.unique(true, return_inverse=True)
    guess_numbers, column = np.unique(guess, return_inverse=True)
    pairs, shared = np.unique(row * max(len(guess_numbers), 1) + column, return_counts=True)
    row, column = np.divmod(pairs, max(len(guess_numbers), 1))
    return true_numbers[row], guess_numbers[column], shared.astype(np.int64)


class Segments:
    """Streaming Rand and information scores over the pixels of true segments, pairs of pixels within each image.

    All restrict the truth to its foreground and take predicted 0 for a segment like any other, so that thick membranes cost. Each image's
    shares are those of its own pixels, and the set is scored by the mean of its images. NaN where an image has no true segment.

    `rand_error` is 1 - F of pairs of different pixels, scikit-image's adapted Rand error; it differs from 1 - V_rand by O(1/pixels).

    None of these is what the boards of the EM challenge report: `thresholds.Board`.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._rows: list[tuple[float, ...]] = []

    def update(self, truth: Map, predicted: Map, name: str = "") -> None:
        """Add one image: (H, W) numbers of segments each, 0 for none (`segments_of`)."""
        pairs = overlaps(truth, predicted)
        rand, info = v_rand(pairs), v_info(pairs)
        self._rows.append((rand_error(pairs), rand.score, rand.split, rand.merge, info.score, info.split, info.merge))
        self.names.append(name)

    def merge(self, other: "Segments") -> None:
        """Append the images of another one."""
        self.names += other.names
        self._rows += other._rows

    @property
    def table(self) -> np.ndarray:
        """(N, 7) per image: rand_error, v_rand and its split and merge, v_info and its split and merge."""
        return np.array(self._rows, np.float64).reshape(-1, 7)

    def means(self) -> dict[str, float]:
        """Means over the images that have a score."""
        names = ("rand_error", "v_rand", "v_rand_split", "v_rand_merge", "v_info", "v_info_split", "v_info_merge")
        columns = zip(names, self.table.T, strict=True)
        return {name: math.nan if np.isnan(values).all() else float(np.nanmean(values)) for name, values in columns}


def rand_error(pairs: Pairs) -> float:
    """1 - F of pairs of different true-foreground pixels: precision is pairs together in both by those together in the prediction.

    `pairs` is from `overlaps`.
    """
    both, predicted, true = (int((counts * (counts - 1)).sum()) for counts in foreground(pairs))
    if predicted + true == 0:
        return 0.0 if len(foreground(pairs)[0]) else math.nan
    return 1 - 2 * both / (predicted + true)


def v_rand(pairs: Pairs, alone: bool = False) -> SplitMerge:
    """Foreground-restricted Rand score; split is sum p_ij^2 / sum t_j^2 (truth), merge sum p_ij^2 / sum s_i^2 (prediction).

    Arguments as in `foreground`.
    """
    both, predicted, true = (float((counts.astype(np.float64) ** 2).sum()) for counts in foreground(pairs, alone))
    if true == 0:
        return SplitMerge(math.nan, math.nan, math.nan)
    return SplitMerge(2 * both / (predicted + true), both / true, both / predicted)


def v_info(pairs: Pairs, alone: bool = False) -> SplitMerge:
    """Foreground-restricted information score 2 I(S; T) / (H(S) + H(T)); split is I / H(S) (prediction), merge I / H(T).

    Where both are one segment there is nothing to tell apart, and the scores are 1. Arguments as in `foreground`.
    """
    counts = foreground(pairs, alone)
    if not counts[0].sum():
        return SplitMerge(math.nan, math.nan, math.nan)
    joint, of_predicted, of_true = (_entropy(values) for values in counts)
    shared = max(of_predicted + of_true - joint, 0.0)
    split = shared / of_predicted if of_predicted else 1.0
    merge = shared / of_true if of_true else 1.0
    total = of_predicted + of_true
    return SplitMerge(2 * shared / total if total else 1.0, split, merge)


class Objects:
    """Streaming scores of objects: SEG, and F1 of found objects at IoU thresholds.

    SEG: the mean over all true objects of all images of their IoU with the object that holds more than half of their pixels, 0 without
    one. F1 at a threshold t: a true and a predicted object are a pair where their IoU is above t; from 0.5 on there is at most one partner
    for each, which is why lower thresholds are refused.

    `images` keeps of each image true objects, predicted objects, and then the pairs at each threshold; `counts` are their sums.
    """

    def __init__(self, thresholds: Sequence[float] = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)) -> None:
        if not thresholds or min(thresholds) < 0.5 or max(thresholds) >= 1:
            raise ValueError(f"thresholds are {list(thresholds)}; they must be from 0.5 to below 1, so that no object has two partners")
        self.thresholds = tuple(thresholds)
        self.images = PerImage((2 + len(self.thresholds),))
        self.overlaps: list[float] = []  # of each image the sum of the IoU that SEG averages

    def update(self, truth: Map, predicted: Map, name: str = "") -> None:
        """Add one image: (H, W) numbers of objects each, 0 for background (`segments_of`)."""
        true, guess, shared = overlaps(truth, predicted)
        real = (true != 0) & (guess != 0)
        of_true, of_guess = _sizes(true, shared)[real], _sizes(guess, shared)[real]
        shared = shared[real]
        iou = shared / (of_true + of_guess - shared)
        found = [(iou > threshold).sum() for threshold in self.thresholds]
        self.images.add(np.array([len(np.unique(true[true != 0])), len(np.unique(guess[guess != 0])), *found]), name)
        self.overlaps.append(float(iou[2 * shared > of_true].sum()))

    def merge(self, other: "Objects") -> None:
        """Add the counts of another one with the same thresholds."""
        if other.thresholds != self.thresholds:
            raise ValueError(f"cannot merge objects scored at {other.thresholds} and {self.thresholds}")
        self.images.merge(other.images)
        self.overlaps += other.overlaps

    @property
    def counts(self) -> np.ndarray:
        """(2 + T,) int64: those of the set."""
        return self.images.total

    @property
    def seg(self) -> float:
        """SEG; NaN without a true object."""
        counts = self.counts
        return sum(self.overlaps) / int(counts[0]) if counts[0] else math.nan

    @property
    def f1(self) -> np.ndarray:
        """(T,) F1 at each threshold; NaN where there are neither true nor predicted objects."""
        counts = self.counts
        total = counts[0] + counts[1]
        return 2 * counts[2:] / total if total else np.full(len(self.thresholds), np.nan)


def foreground(pairs: Pairs, alone: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of each pair, each predicted and each true segment, within the true foreground.

    Args:
        pairs: from `overlaps`.
        alone: whether each pixel predicted to be 0 is a segment of its own, as on the boards of the EM challenge; else they are one
            segment together.
    """
    true, guess, shared = (values[pairs[0] != 0] for values in pairs)
    of_true = _summed(true, shared)
    if not alone:
        return shared, _summed(guess, shared), of_true
    outside = np.ones(shared[guess == 0].sum(), np.int64)
    guess, shared = guess[guess != 0], shared[guess != 0]
    return np.concatenate([shared, outside]), np.concatenate([_summed(guess, shared), outside]), of_true


def _sizes(numbers: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Pixels of the whole segment that each pair belongs to."""
    return _summed(numbers, pixels)[np.unique(numbers, return_inverse=True)[1].ravel()]


def _summed(numbers: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    found, places = np.unique(numbers, return_inverse=True)
    sums = np.zeros(len(found), np.int64)
    np.add.at(sums, places.ravel(), pixels)
    return sums


def _entropy(counts: np.ndarray) -> float:
    """In nats."""
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())
