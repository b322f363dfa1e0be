"""Suspected label errors: places where the model is sure of another class than the mask, ranked by how odd that is.

A region is suspect where the prediction is one other class throughout, at least as confident as the model is on average where the mask
does name that class (the rule of confident learning: Northcutt et al. 2021, arXiv:1911.00068, eq. 2), and thicker than a badly drawn
boundary. Among those, large ones and ones whose confusion is rare elsewhere come first: a class that is often taken for another says more
of the model than of the mask.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from perpixel.report.confusions import Crop, crop_of
from perpixel.report.seen import Seen

DEPTH = 0.004  # of the diagonal: what lies nearer to the region's edge may be a boundary drawn generously
PER_IMAGE, KEPT = 4, 96


@dataclass(frozen=True)
class Suspect:
    """A region of one image that may be labelled wrongly.

    Attributes:
        truth: what the mask says.
        guess: what the model says.
        pixels: of the region without its edge.
        confidence: mean probability of `guess` in it.
        margin: mean of the probability of `guess` minus that of `truth`.
        rarity: 1 / (1 + ln(N / pixels)), with N pixels of `truth` taken for `guess` over the set; 1 where all of them are these.
        score: margin x rarity x square root of the region's share of the image; what suspects are ranked by.
    """

    truth: int
    guess: int
    pixels: int
    confidence: float
    margin: float
    rarity: float
    score: float
    crop: Crop


@dataclass(frozen=True)
class _Region:
    truth: int
    guess: int
    pixels: int
    confidence: float
    margin: float
    weight: float  # margin x square root of the share
    crop: Crop


class Suspects:
    """Streaming search for suspected label errors; keeps at most `KEPT` candidates, drawn small."""

    def __init__(self, colors: Sequence[tuple[int, int, int]]) -> None:
        self.colors, classes = list(colors), len(colors)
        self.pairs = np.zeros((classes, classes), np.int64)  # [truth, guess] pixels
        self.confidences = np.zeros(classes)  # sums of the probability of a class over the pixels labelled so
        self._regions: list[_Region] = []

    def add(self, seen: Seen) -> None:
        """Look at one image."""
        classes, known = len(self.colors), seen.known
        truth = seen.truth[known]
        self.pairs += np.bincount(truth * classes + seen.guess[known], minlength=classes**2).reshape(classes, classes)
        self.confidences += np.bincount(truth, seen.truth_probability[known], classes)
        self._keep(self._candidates(seen))

    def merge(self, other: "Suspects") -> None:
        """Add what another one with the same classes has seen."""
        self.pairs += other.pairs
        self.confidences += other.confidences
        self._keep(other._regions)

    def _keep(self, regions: Sequence[_Region]) -> None:
        """The heaviest of each pair of classes in turn, sure ones first, so that one weakness of the model does not push out the rare."""
        found: dict[tuple[int, int], list[_Region]] = {}
        sure = self.thresholds - 1e-6
        for region in sorted([*self._regions, *regions], key=lambda region: (region.confidence < sure[region.guess], -region.weight)):
            found.setdefault((region.truth, region.guess), []).append(region)
        turns = itertools.zip_longest(*found.values())
        self._regions = [region for turn in turns for region in turn if region is not None][:KEPT]

    @property
    def thresholds(self) -> np.ndarray:
        """(K,) mean probability of each class over the pixels labelled so; 1 for a class that no mask has."""
        labelled = self.pairs.sum(1)
        return np.divide(self.confidences, labelled, out=np.ones(len(labelled)), where=labelled > 0)

    def ranked(self, count: int = 24) -> list[Suspect]:
        """The most suspect regions of what has been seen so far, the most suspect first."""
        thresholds = self.thresholds
        found = [
            Suspect(r.truth, r.guess, r.pixels, r.confidence, r.margin, odd, r.weight * odd, r.crop)
            for r in self._regions
            for odd in [1 / (1 + math.log(self.pairs[r.truth, r.guess] / r.pixels))]
            if r.confidence >= thresholds[r.guess] - 1e-6  # both are sums of float32, rounded
        ]
        return sorted(found, key=lambda suspect: -suspect.score)[:count]

    def _candidates(self, seen: Seen) -> list[_Region]:
        """The regions of an image, without those thinner than a boundary may be off."""
        classes, size = len(self.colors), seen.truth.size
        # Half: a class with less is not what the model is sure of, and the final thresholds are known only at the end.
        sure = seen.wrong & (seen.confidence > 0.5)
        depth = max(2, round(DEPTH * math.hypot(*seen.truth.shape)))
        least = max(16, size // 5000)
        code = np.where(sure, seen.truth * classes + seen.guess, -1)
        pairs, counts = np.unique(code[sure], return_counts=True)
        found = []
        for pair in pairs[counts >= least]:
            core, regions = ndimage.label(ndimage.binary_erosion(code == pair, iterations=depth))
            for number, place in enumerate(ndimage.find_objects(core)[:regions], 1):
                inside = core[place] == number
                if (pixels := int(inside.sum())) < least // 4:
                    continue
                confidence = seen.confidence[place][inside]
                margin = float((confidence - seen.truth_probability[place][inside]).mean())
                found.append((margin * math.sqrt(pixels / size), int(pair), pixels, float(confidence.mean()), margin, place))
        found.sort(key=lambda region: -region[0])
        drawn = []
        for weight, pair, pixels, sureness, margin, (rows, columns) in found[:PER_IMAGE]:
            crop = crop_of(seen, (rows.start, columns.start, rows.stop, columns.stop), weight, self.colors, side=240)
            drawn.append(_Region(*divmod(pair, classes), pixels, sureness, margin, weight, crop))
        return drawn
