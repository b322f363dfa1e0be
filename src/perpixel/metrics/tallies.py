"""Scores from three counts per class, of a set or of each of its images.

A tally is an integer array (..., K, 3): for each of K classes the size of what truth and prediction share, of the truth, and of the
prediction. Pixels give the region scores (Long et al. 2015, arXiv:1411.4038, section 5), pixels of inner bands give Boundary IoU, contour
pixels matched one to one give the BF score. Tallies add, so a set is the sum of its images, and a resampled set a weighted sum.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

# Who uses which: "union" FCN's score.py and Pascal VOC; "truth" SIFT Flow; "zero" SegNet's script, which divides by the number of classes.
ABSENT_RULES = {
    "union": (
        "A class absent from both truth and prediction is left out of every mean; a class predicted but absent from the truth counts "
        "as IoU 0 and Dice 0, and is left out of mean accuracy."
    ),
    "truth": "A class absent from the truth is left out of every mean, even where it is predicted.",
    "zero": "A class absent from the truth counts as 0 in every mean, so that the divisor is always the number of classes.",
}
ABSENT_RULE = ABSENT_RULES["union"]


def recall(tally: np.ndarray) -> np.ndarray:
    """(..., K): shared / truth, the accuracy of each class; NaN where the truth has none."""
    return _ratio(tally[..., 0], tally[..., 1])


def precision(tally: np.ndarray) -> np.ndarray:
    """(..., K): shared / prediction; NaN where nothing is predicted."""
    return _ratio(tally[..., 0], tally[..., 2])


def iou(tally: np.ndarray) -> np.ndarray:
    """(..., K): shared / (truth + prediction - shared); NaN where a class is in neither."""
    return _ratio(tally[..., 0], tally[..., 1] + tally[..., 2] - tally[..., 0])


def dice(tally: np.ndarray) -> np.ndarray:
    """(..., K): 2 shared / (truth + prediction), the F1 score; NaN where a class is in neither."""
    return _ratio(2 * tally[..., 0], tally[..., 1] + tally[..., 2])


def class_mean(values: np.ndarray, tally: np.ndarray, absent: str = "union") -> np.ndarray:
    """(...): the mean over the classes that count by the rule `absent` (a key of `ABSENT_RULES`); NaN where none does.

    Args:
        values: (..., K) a score of each class, NaN where it has none.
        tally: (..., K, 3) what they were computed from.
        absent: "union", "truth" or "zero".
    """
    if absent not in ABSENT_RULES:
        raise ValueError(f"absent is {absent!r}; the rules for absent classes are {', '.join(ABSENT_RULES)}")
    in_truth = tally[..., 1] > 0
    if absent == "zero":
        anything = in_truth.any(-1)
        return np.where(anything, np.where(in_truth, values, 0.0).mean(-1), np.nan)
    counts = ~np.isnan(values) if absent == "union" else in_truth
    return _ratio(np.where(counts, values, 0.0).sum(-1), counts.sum(-1))


def without_missed(tally: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """(..., K, 3): tallies of resampled sets without the predictions of classes that a resample's truth misses by chance.

    Resamples say how scores would come out on other sets like the `whole` one (K, 3). A class that the whole has and a resample does not
    would be scored there by false predictions alone, as 0 under "union", which pulls the interval down and says nothing of the class.
    """
    missed = (tally[..., 1] == 0) & (whole[:, 1] > 0)
    return np.where(missed[..., None], 0, tally)


def of_resamples(score: Callable[..., np.ndarray], sums: np.ndarray, whole: np.ndarray, absent: str) -> np.ndarray:
    """A mean over classes, such as `miou`, of resampled sets (R, K, 3), over the classes that the `whole` one (K, 3) is scored by.

    Under "union" a class that is predicted but in no truth is 0 in every resample, whether or not it drew the prediction. Under "zero" the
    mean over a resample's classes is scaled by the share of classes that the whole holds.
    """
    sums = without_missed(sums, whole)
    if absent == "zero":
        return score(sums, "truth") * (whole[:, 1] > 0).mean()
    if absent == "union":
        stray = (whole[:, 1] == 0) & (whole[:, 2] > 0)
        sums = np.where(stray[:, None] & (np.arange(3) == 2), np.maximum(sums, 1), sums)
    return score(sums, absent)


def with_stray(table: np.ndarray) -> np.ndarray:
    """(N, K, 3): a table in which classes that are predicted, and in no truth, are predicted in every image with a count: 0 in every
    resample."""
    whole = table.sum(0)
    stray = (whole[:, 1] == 0) & (whole[:, 2] > 0)
    counts = np.asarray(table.any((1, 2)))[:, None, None]
    return np.where(counts & stray[:, None] & (np.arange(3) == 2), np.maximum(table, 1), table)


def resampled_mean(score: Callable[..., np.ndarray], whole: np.ndarray, absent: str, sums: np.ndarray) -> np.ndarray:
    """As `of_resamples`, for sums of several runs on one truth, `whole`; under "union" of tables that `with_stray` made."""
    return of_resamples(score, sums, whole, absent) if absent == "zero" else score(without_missed(sums, whole), absent)


def holding(table: np.ndarray) -> np.ndarray:
    """(K,): in how many images (N, K, 3) the truth has a class; what an interval of its score rests on."""
    return (table[..., 1] > 0).sum(0)


def pixel_accuracy(tally: np.ndarray) -> np.ndarray:
    """(...): share of the labelled pixels that are right (also called global accuracy)."""
    return _ratio(tally[..., 0].sum(-1), tally[..., 1].sum(-1))


def mean_accuracy(tally: np.ndarray, absent: str = "union") -> np.ndarray:
    """(...): mean of `recall`."""
    return class_mean(recall(tally), tally, absent)


def miou(tally: np.ndarray, absent: str = "union") -> np.ndarray:
    """(...): mean of `iou`, background included."""
    return class_mean(iou(tally), tally, absent)


def mean_dice(tally: np.ndarray, absent: str = "union") -> np.ndarray:
    """(...): mean of `dice`."""
    return class_mean(dice(tally), tally, absent)


def fwiou(tally: np.ndarray) -> np.ndarray:
    """(...): IoU weighted by each class's share of the truth, so that no rule for absent classes is needed."""
    truth = tally[..., 1]
    return _ratio(np.where(truth > 0, truth * iou(tally), 0.0).sum(-1), truth.sum(-1))


MEANS = {"mean_accuracy": mean_accuracy, "miou": miou, "mean_dice": mean_dice}  # over classes, by a rule for absent ones


def scores(tally: np.ndarray, absent: str = "union") -> dict[str, np.ndarray]:
    """Name -> (...) of every region score, the means by the rule `absent`."""
    return {
        "pixel_accuracy": pixel_accuracy(tally),
        "mean_accuracy": mean_accuracy(tally, absent),
        "miou": miou(tally, absent),
        "fwiou": fwiou(tally),
        "mean_dice": mean_dice(tally, absent),
    }


class PerImage:
    """Counts of each image in the order seen, all of one shape; a process keeps its own and the parts are merged."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.names: list[str] = []
        self._rows: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, counts: np.ndarray, name: str = "") -> None:
        """Keep the counts of one image; its name lets two runs be paired."""
        if counts.shape != self.shape:
            raise ValueError(f"counts of one image have shape {counts.shape}; this table has {self.shape} for each")
        self.names.append(name)
        self._rows.append(np.array(counts, dtype=np.int64))

    def merge(self, other: "PerImage") -> None:
        """Append the images of another table of the same shape."""
        if other.shape != self.shape:
            raise ValueError(f"cannot merge counts of shape {self.shape} and {other.shape} for each image")
        self.names += other.names
        self._rows += other._rows

    @property
    def table(self) -> np.ndarray:
        """(N, *shape) int64: a row for each image."""
        return np.stack(self._rows) if self._rows else np.zeros((0, *self.shape), np.int64)

    @property
    def total(self) -> np.ndarray:
        """(*shape) int64: the counts of the set."""
        return np.asarray(self.table.sum(0))

    def paired_with(self, other: "PerImage") -> tuple[np.ndarray, np.ndarray]:
        """Both tables with the same images in the same order; ValueError where the images are not the same or not told apart by name."""
        for table in (self, other):
            if len(set(table.names)) < len(table.names):
                raise ValueError("images are paired by name, and two have the same one; give each a name of its own")
        missing = set(self.names) ^ set(other.names)
        if missing:
            raise ValueError(
                f"{len(missing)} images are in one of the two runs only, such as {min(missing)}; score both on the same images"
            )
        place = {name: number for number, name in enumerate(other.names)}
        return self.table, other.table[[place[name] for name in self.names]]


def packed(table: np.ndarray) -> list[list[float]]:
    """A table (N, *shape) as plain JSON types, short where most of it is 0: of each image the place in the flattened row and the value,
    in turns; what is no whole number with seven digits."""
    whole = table.dtype.kind in "iu"
    rows = []
    for row in table.reshape(len(table), math.prod(table.shape[1:])):
        places = np.flatnonzero(row)
        values = row[places].tolist() if whole else [float(f"{value:.7g}") for value in row[places].tolist()]
        rows.append([part for pair in zip(places.tolist(), values, strict=True) for part in pair])
    return rows


def unpacked(shape: Sequence[int], names: Sequence[str], rows: Sequence[Sequence[float]]) -> np.ndarray:
    """The table (N, *shape) that `packed` gave; ValueError where it does not fit the shape or the names of the images."""
    if len(names) != len(rows):
        raise ValueError(f"counts of {len(rows)} images for {len(names)} names")
    size = math.prod(shape)
    fractions = any(isinstance(value, float) for row in rows for value in row)
    table = np.zeros((len(names), size), np.float64 if fractions else np.int64)
    for name, row, pairs in zip(names, table, rows, strict=True):
        places, values = np.array(pairs[0::2], np.int64), np.array(pairs[1::2], row.dtype)
        if len(places) != len(values) or (places < 0).any() or (places >= size).any() or not ((values >= 0) & np.isfinite(values)).all():
            raise ValueError(f"the counts of {name} do not belong to a table of {tuple(shape)}")
        row[places] = values
    return table.reshape(len(names), *shape)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below in float64 (exact up to 2^53), NaN where there is nothing below."""
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.divide(above, below, out=np.full(np.broadcast_shapes(above.shape, below.shape), np.nan), where=below > 0)
