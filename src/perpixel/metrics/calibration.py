"""Whether probabilities mean what they say: calibration error, reliability curve, Brier score; and the temperature that mends them.

Sources: Guo et al. 2017, arXiv:1706.04599 (expected calibration error, temperature scaling); Brier 1950.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

BINS = 15  # Guo et al. 2017, their tables


class Calibration:
    """Streaming calibration of the most probable class, and Brier score, over all labelled pixels.

    Bins are of equal width over confidences from 0 to 1, each with its upper end. `counts` is int64 (B, 2): pixels, and those that are
    right; `confidences` float64 (B,) the sum of their confidences.
    """

    def __init__(self, bins: int = BINS) -> None:
        if bins < 1:
            raise ValueError(f"bins is {bins}; a reliability curve needs at least 1")
        self.bins = bins
        self.counts = np.zeros((bins, 2), np.int64)
        self.confidences = np.zeros(bins)
        self._squares = 0.0

    def update(self, logits: Tensor, labels: Tensor, ignore: int = 255) -> None:
        """Add images.

        Args:
            logits: (N, K, H, W) real scores before softmax, or log-probabilities.
            labels: (N, H, W) integers, class indices 0..K-1 or `ignore`, on the same device.

        Raises:
            ValueError: if shapes do not agree, a score is not finite or a label is no class; nothing has been added then.
        """
        scores, truth = _labelled(logits, labels, ignore)
        if not len(truth):
            return
        probability = scores.softmax(1)
        confidence, guess = probability.max(1)
        # Rounding may lift a confidence above 1; 0 belongs to the first bin.
        place = (confidence * self.bins).ceil().long().clamp(1, self.bins) - 1
        right = (guess == truth).long()
        pixels = torch.bincount(place, minlength=self.bins)
        hits = torch.zeros(self.bins, dtype=torch.int64, device=place.device).index_add_(0, place, right)
        sums = torch.zeros(self.bins, dtype=confidence.dtype, device=place.device).index_add_(0, place, confidence)
        self.counts += torch.stack([pixels, hits], 1).cpu().numpy()
        self.confidences += sums.cpu().numpy()
        chosen = probability.gather(1, truth[:, None])[:, 0]
        self._squares += float((probability.square().sum(1) - 2 * chosen + 1).sum())

    def merge(self, other: "Calibration") -> None:
        """Add the counts of another one of as many bins."""
        if other.bins != self.bins:
            raise ValueError(f"cannot merge calibrations of {self.bins} and {other.bins} bins")
        self.counts += other.counts
        self.confidences += other.confidences
        self._squares += other._squares

    @property
    def pixels(self) -> int:
        """Labelled pixels seen."""
        return int(self.counts[:, 0].sum())

    @property
    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean confidence and accuracy of each bin, (B,) each; NaN where a bin is empty."""
        pixels, hits = self.counts.T.astype(np.float64)
        filled = pixels > 0
        nothing = np.full(self.bins, np.nan)
        confidence = np.divide(self.confidences, pixels, out=nothing.copy(), where=filled)
        return confidence, np.divide(hits, pixels, out=nothing, where=filled)

    @property
    def error(self) -> float:
        """Expected calibration error: mean over the pixels of their bin's |accuracy - confidence|; NaN without pixels."""
        if not self.pixels:
            return math.nan
        return float(np.abs(self.counts[:, 1] - self.confidences).sum() / self.pixels)

    @property
    def brier(self) -> float:
        """Mean over the pixels of the sum over the classes of (probability - truth)^2, from 0 to 2; NaN without pixels."""
        return self._squares / self.pixels if self.pixels else math.nan


LIMITS = (0.05, 20.0)  # of a temperature: scores that ask for more or less mean nothing


def fit_temperature(
    batches: Iterable[tuple[Tensor, Tensor]],
    ignore: int = 255,
    limits: tuple[float, float] = LIMITS,
    tolerance: float = 1e-6,
) -> float:
    """The temperature T for which softmax(logits / T) has the least cross-entropy on a validation set.

    The cross-entropy is convex in 1/T, so one number is searched by Newton's method within a bracket; each step looks at all batches once
    (five to ten in all), and nothing of them is kept.

    Args:
        batches: (logits (N, K, H, W), labels (N, H, W)), gone through more than once: a list, or an object that loads anew on each `iter`.
        limits: least and largest temperature. A set without a mistake asks for the least, a hopeless one for the largest.
        tolerance: of ln T.

    Raises:
        ValueError: if no pixel is labelled, `batches` can be gone through only once, or an input is wrong (`Calibration.update`).
    """
    if iter(batches) is batches:
        raise ValueError("batches can be gone through only once (an iterator); give a list, or an object that starts anew")
    if not 0 < limits[0] < limits[1]:
        raise ValueError(f"limits are {limits}; give a least and a larger temperature above 0")
    low, high = 1 / limits[1], 1 / limits[0]
    sharpness = min(max(1.0, low), high)
    for _ in range(100):
        slope, bend = _slope(batches, sharpness, ignore)
        low, high = (sharpness, high) if slope < 0 else (low, sharpness)
        newton = sharpness - slope / bend if bend > 0 else math.inf if slope < 0 else 0.0
        # A step out of the bracket halves it instead, on the scale of ln T.
        following = newton if low < newton < high else math.sqrt(low * high)
        if slope == 0 or abs(math.log(following / sharpness)) < tolerance:
            return 1 / following if slope else 1 / sharpness
        sharpness = following
    return 1 / sharpness


def _slope(batches: Iterable[tuple[Tensor, Tensor]], sharpness: float, ignore: int) -> tuple[float, float]:
    """First and second derivative of the mean cross-entropy of softmax(sharpness * logits)."""
    slope, bend, pixels = 0.0, 0.0, 0
    for logits, labels in batches:
        scores, truth = _labelled(logits, labels, ignore)
        probability = (sharpness * scores).softmax(1)
        mean = (probability * scores).sum(1)
        slope += float((mean - scores.gather(1, truth[:, None])[:, 0]).sum())
        bend += float((probability * (scores - mean[:, None]).square()).sum())
        pixels += len(truth)
    if not pixels:
        raise ValueError("no labelled pixel to fit a temperature on")
    return slope / pixels, bend / pixels


def _labelled(logits: Tensor, labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Scores (n, K) in float64, or float32 where the device has no other, and labels (n,) int64 of the labelled pixels."""
    if logits.ndim != 4 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)}; give (N, K, H, W) and (N, H, W)")
    known = labels.long() != ignore
    truth = labels.long()[known]
    if len(truth) and (int(truth.min()) < 0 or int(truth.max()) >= logits.shape[1]):
        raise ValueError(f"labels: {int(truth.min())} to {int(truth.max())} are not all among the {logits.shape[1]} classes, nor ignored")
    scores = logits.movedim(1, -1)[known]
    if not torch.isfinite(scores).all():
        raise ValueError(f"logits: {int((~torch.isfinite(scores)).sum())} values are NaN or infinite")
    scores = scores.float() if scores.device.type == "mps" else scores.double()
    return scores - scores.amax(1, keepdim=True), truth  # so that sums of products lose nothing to a common offset
