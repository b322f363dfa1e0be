"""Region scores from one confusion matrix over all pixels of a set.

Source of the definitions: Long et al. 2015, arXiv:1411.4038, section 5; Everingham et al. 2015 (Pascal VOC), section 5.1.3.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from perpixel.metrics.tallies import ABSENT_RULE


class Confusion:
    """Streaming confusion matrix of K classes.

    `counts` is an int64 (K, K) tensor [truth, prediction] on `device`, over all labelled pixels seen so far; processes may sum theirs
    with all_reduce. Scores are fractions, not percent, and NaN where there is nothing to score. `ABSENT_RULE` says which classes count.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        if classes < 1:
            raise ValueError(f"classes is {classes}; a confusion matrix needs at least 1")
        self.classes = classes
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def update(self, labels: Tensor | np.ndarray, predicted: Tensor | np.ndarray, ignore: int = 255) -> None:
        """Add pixels.

        Args:
            labels: integers of any shape: class indices 0..K-1, or `ignore` for pixels that do not count.
            predicted: integers of the same shape: class indices 0..K-1 wherever the label is not `ignore`.
            ignore: not one of the K classes (255; 65535 for uint16 labels).

        Raises:
            ValueError: if shapes differ or a value is no class; nothing has been added then.
        """
        if 0 <= ignore < self.classes:
            raise ValueError(f"ignore = {ignore} is one of the {self.classes} classes; use a value that is not (65535 above 255 classes)")
        truth = _integers(labels, "labels", self.counts.device)
        guess = _integers(predicted, "predicted", self.counts.device)
        if truth.shape != guess.shape:
            raise ValueError(f"labels are {tuple(truth.shape)} and predicted {tuple(guess.shape)}; they must have the same shape")
        void = truth == ignore
        truth, guess = truth.long().masked_fill(void, 0), guess.long().masked_fill(void, 0)
        for name, values in (("labels", truth), ("predicted", guess)):
            self._check_range(name, values)
        # Void goes to a cell of its own, dropped after counting: three times as fast as picking the labelled pixels.
        cells = (truth * self.classes + guess).masked_fill(void, self.classes**2).flatten()
        self.counts += torch.bincount(cells, minlength=self.classes**2 + 1)[:-1].view_as(self.counts)

    def merge(self, other: "Confusion") -> None:
        """Add the counts of another matrix of as many classes."""
        if other.classes != self.classes:
            raise ValueError(f"cannot merge confusion matrices of {self.classes} and {other.classes} classes")
        self.counts += other.counts.to(self.counts.device)

    @property
    def pixels(self) -> int:
        """Labelled pixels seen."""
        return int(self.counts.sum())

    @property
    def pixel_accuracy(self) -> float:
        """Share of the labelled pixels that are right (also called global accuracy)."""
        truth, _, hits = self._sums()
        return float(hits.sum() / truth.sum())

    @property
    def class_accuracy(self) -> Tensor:
        """(K,) float64: share of each class's pixels that are right (recall); NaN where the class has none."""
        truth, _, hits = self._sums()
        return hits / truth

    @property
    def mean_accuracy(self) -> float:
        """Mean of `class_accuracy` over the classes that occur in the truth."""
        return float(self.class_accuracy.nanmean())

    @property
    def iou(self) -> Tensor:
        """(K,) float64: intersection over union; NaN where a class is in neither truth nor prediction."""
        truth, guess, hits = self._sums()
        return hits / (truth + guess - hits)

    @property
    def miou(self) -> float:
        """Mean IoU, background included."""
        return float(self.iou.nanmean())

    @property
    def fwiou(self) -> float:
        """IoU weighted by the class's share of the truth."""
        truth, _, _ = self._sums()
        return float((truth * self.iou).nansum() / truth.sum())

    @property
    def dice(self) -> Tensor:
        """(K,) float64: 2 intersection / (truth + prediction), the F1 score; NaN where a class is in neither."""
        truth, guess, hits = self._sums()
        return 2 * hits / (truth + guess)

    @property
    def mean_dice(self) -> float:
        """Mean of `dice`."""
        return float(self.dice.nanmean())

    def to_dict(self, names: Sequence[str]) -> dict[str, object]:
        """All scores as plain JSON types, NaN as None.

        Args:
            names: of the K classes, in order.

        Returns:
            pixels, pixel_accuracy, mean_accuracy, miou, fwiou, mean_dice; classes: one {name, pixels, accuracy, iou, dice} each;
            confusion: K rows (truth) of K counts; absent_rule.
        """
        if len(names) != self.classes:
            raise ValueError(f"{len(names)} names for {self.classes} classes: {', '.join(names)}")
        columns = zip(names, self.counts.sum(1).tolist(), self.class_accuracy, self.iou, self.dice, strict=True)
        return {
            "pixels": self.pixels,
            "pixel_accuracy": _plain(self.pixel_accuracy),
            "mean_accuracy": _plain(self.mean_accuracy),
            "miou": _plain(self.miou),
            "fwiou": _plain(self.fwiou),
            "mean_dice": _plain(self.mean_dice),
            "classes": [
                {"name": name, "pixels": count, "accuracy": _plain(accuracy), "iou": _plain(iou), "dice": _plain(dice)}
                for name, count, accuracy, iou, dice in columns
            ],
            "confusion": self.counts.tolist(),
            "absent_rule": ABSENT_RULE,
        }

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels of each class in truth, in prediction, and in both, as float64 on the CPU (exact up to 2^53 pixels)."""
        counts = self.counts.cpu().double()  # in this order: some accelerators have no float64
        return counts.sum(1), counts.sum(0), counts.diagonal()

    def _check_range(self, name: str, values: Tensor) -> None:
        if not values.numel():
            return
        low, high = (int(value) for value in torch.aminmax(values))
        if low < 0 or high >= self.classes:
            wrong = values[(values < 0) | (values >= self.classes)]
            found = ", ".join(str(value) for value in wrong.unique()[:5].tolist())
            raise ValueError(
                f"{name}: {len(wrong)} pixels have a value that is not one of the {self.classes} classes 0..{self.classes - 1} ({found})"
            )


def _integers(values: Tensor | np.ndarray, name: str, device: torch.device) -> Tensor:
    tensor = torch.as_tensor(values, device=device)
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} are {tensor.dtype}; class indices must be integers (logits need argmax over the classes first)")
    # torch has no comparisons or indexing kernels for uint16 everywhere
    return tensor.int() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64, torch.bool) else tensor


def _plain(value: float | Tensor) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number
