"""Region scores from one confusion matrix over all pixels of a set.

Source of the definitions: Long et al. 2015, arXiv:1411.4038, section 5; Everingham et al. 2015 (Pascal VOC), section 5.1.3.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from perpixel.metrics import tallies


class Confusion:
    """Streaming confusion matrix of K classes.

    `counts` is an int64 (K, K) tensor [truth, prediction] on `device`, over all labelled pixels seen so far; processes may sum theirs
    with all_reduce. Scores are fractions, not percent, and NaN where there is nothing to score. Means follow `tallies.ABSENT_RULE`,
    and `to_dict` any of `tallies.ABSENT_RULES`.
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
        counts, legal = _count_on_processor(truth, guess, self.classes, ignore) if truth.device.type == "cpu" else (None, True)
        if counts is None or not legal:
            counts = self._count_by_bins(truth, guess, ignore)  # which also names what is no class
        self.counts += counts

    def _count_by_bins(self, truth: Tensor, guess: Tensor, ignore: int) -> Tensor:
        void = truth == ignore
        truth, guess = truth.long().masked_fill(void, 0), guess.long().masked_fill(void, 0)
        for name, values in (("labels", truth), ("predicted", guess)):
            self._check_range(name, values)
        # Void goes to a cell of its own, dropped after counting: three times as fast as picking the labelled pixels.
        cells = (truth * self.classes + guess).masked_fill(void, self.classes**2).flatten()
        return torch.bincount(cells, minlength=self.classes**2 + 1)[:-1].view_as(self.counts)

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
    def tally(self) -> np.ndarray:
        """(K, 3) int64: pixels of each class in both, in truth and in prediction; what the scores are computed from."""
        return torch.stack([self.counts.diagonal(), self.counts.sum(1), self.counts.sum(0)], 1).cpu().numpy()

    @property
    def pixel_accuracy(self) -> float:
        """Share of the labelled pixels that are right (also called global accuracy)."""
        return float(tallies.pixel_accuracy(self.tally))

    @property
    def class_accuracy(self) -> Tensor:
        """(K,) float64: share of each class's pixels that are right (recall); NaN where the class has none."""
        return torch.from_numpy(tallies.recall(self.tally))

    @property
    def mean_accuracy(self) -> float:
        """Mean of `class_accuracy` over the classes that occur in the truth."""
        return float(tallies.mean_accuracy(self.tally))

    @property
    def iou(self) -> Tensor:
        """(K,) float64: intersection over union; NaN where a class is in neither truth nor prediction."""
        return torch.from_numpy(tallies.iou(self.tally))

    @property
    def miou(self) -> float:
        """Mean IoU, background included."""
        return float(tallies.miou(self.tally))

    @property
    def fwiou(self) -> float:
        """IoU weighted by the class's share of the truth."""
        return float(tallies.fwiou(self.tally))

    @property
    def dice(self) -> Tensor:
        """(K,) float64: 2 intersection / (truth + prediction), the F1 score; NaN where a class is in neither."""
        return torch.from_numpy(tallies.dice(self.tally))

    @property
    def mean_dice(self) -> float:
        """Mean of `dice`."""
        return float(tallies.mean_dice(self.tally))

    def to_dict(self, names: Sequence[str], absent: str = "union") -> dict[str, object]:
        """All scores as plain JSON types, NaN as None.

        Args:
            names: of the K classes, in order.
            absent: the rule of every mean, a key of `ABSENT_RULES`.

        Returns:
            pixels, pixel_accuracy, mean_accuracy, miou, fwiou, mean_dice; classes: one {name, pixels, accuracy, iou, dice} each;
            confusion: K rows (truth) of K counts; absent_rule.
        """
        if len(names) != self.classes:
            raise ValueError(f"{len(names)} names for {self.classes} classes: {', '.join(names)}")
        columns = zip(names, self.counts.sum(1).tolist(), self.class_accuracy, self.iou, self.dice, strict=True)
        return {
            "pixels": self.pixels,
            **{name: _plain(float(value)) for name, value in tallies.scores(self.tally, absent).items()},
            "classes": [
                {"name": name, "pixels": count, "accuracy": _plain(accuracy), "iou": _plain(iou), "dice": _plain(dice)}
                for name, count, accuracy, iou, dice in columns
            ],
            "confusion": self.counts.tolist(),
            "absent_rule": tallies.ABSENT_RULES[absent],
        }

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


class Region:
    """Streaming region scores of K classes per set and per image: one confusion matrix of all, and a tally of each image.

    The IoU of a set is not the mean of its images': an image with little of a class weighs as much as one full of it, and the two
    differ by several points. `side_by_side` gives both.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.confusion = Confusion(classes, device)
        self.images = tallies.PerImage((classes, 3))

    def update(self, labels: Tensor | np.ndarray, predicted: Tensor | np.ndarray, ignore: int = 255, name: str = "") -> None:
        """Add one image; arguments and errors as in `Confusion.update`."""
        image = Confusion(self.confusion.classes, self.confusion.counts.device)
        image.update(labels, predicted, ignore)
        self.add(image, name)

    def add(self, image: Confusion, name: str = "") -> None:
        """Add one image that has been counted."""
        self.confusion.merge(image)
        self.images.add(image.tally, name)

    def merge(self, other: "Region") -> None:
        """Add the counts of another one of as many classes."""
        self.confusion.merge(other.confusion)
        self.images.merge(other.images)

    def side_by_side(self, absent: str = "union") -> dict[str, dict[str, float]]:
        """Scores of the set under "set", and under "images" their means over the images that have one.

        The rule `absent` (a key of `ABSENT_RULES`) holds within each image for the latter, so "zero" counts every class that an image
        does not show as 0 there.
        """
        each = tallies.scores(self.images.table, absent)
        return {
            "set": {name: float(value) for name, value in tallies.scores(self.confusion.tally, absent).items()},
            "images": {name: float(np.nanmean(values)) if not np.isnan(values).all() else math.nan for name, values in each.items()},
        }


def _count_on_processor(truth: Tensor, guess: Tensor, classes: int, ignore: int) -> tuple[Tensor, bool]:
    # Loaded here: numba takes half a second, which those who count on a GPU, or only ask for the rule, need not wait.
    from perpixel.metrics.counting import pair_counts

    counts, legal = pair_counts(truth.numpy().ravel(), guess.numpy().ravel(), classes, ignore)
    return torch.from_numpy(counts), legal


def _integers(values: Tensor | np.ndarray, name: str, device: torch.device) -> Tensor:
    tensor = torch.as_tensor(values, device=device)
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} are {tensor.dtype}; class indices must be integers (logits need argmax over the classes first)")
    # torch has no comparisons or indexing kernels for uint16 everywhere
    return tensor.int() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64, torch.bool) else tensor


def _plain(value: float | Tensor) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number
