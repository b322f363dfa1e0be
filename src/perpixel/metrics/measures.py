"""Scores of a set as functions of sums over its images, so that each can be resampled, stored and compared between runs.

A table holds counts of each image, (N, *shape); what is a mean over images is held as its value and whether there is one
(`intervals.values_table`). Summed over the images of the set, or of a resampled one, it gives the score. Each group of `perpixel.scores`
makes its tables, by the names used here, and `MEASURES` says what is made of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from perpixel.metrics import tallies
from perpixel.metrics.intervals import Interval, Score, difference, interval, value_mean, values_table

TRIMAP_KEPT = (1, 5, 20)  # widths of bands, in pixels, of which the counts of each image are kept

Bind = Callable[[Sequence[np.ndarray], str], tuple[list[np.ndarray], Score]]


@dataclass(frozen=True)
class Measure:
    """One score.

    Attributes:
        name: its key in files; words: for people.
        table: what it is computed from; where `by_class` that has the classes as its second axis.
        bind: tables of one or of two runs with the same truth, and the rule for absent classes -> tables and score of their sums.
        bind_classes: the same for a score of each class (..., K); None: there is none.
        of_images: whether it is a mean over images, not a score of the whole set.
        of_classes: whether it is a mean over classes of scores of the set, each of which rests on the images that hold the class.
        less: whether less is better.
        unit: "points" (hundredths), "pixels", "nats", or "" for a plain number.
        digits: behind the point, for people.
    """

    name: str
    words: str
    table: str
    bind: Bind
    bind_classes: Bind | None = None
    by_class: bool = True
    of_images: bool = False
    of_classes: bool = False
    less: bool = False
    unit: str = "points"
    digits: int = 2

    def interval(self, table: np.ndarray, absent: str) -> Interval:
        """Of one run."""
        (bound,), score = self.bind([table], absent)
        return interval(bound, score, held=_held(table, bound) if self.of_classes else None, bounds=(0, self.most))

    def text(self, value: float | None, sign: str = "", dash: str = "-") -> str:
        """For people: shares in hundredths, a dash where there is no number."""
        if value is None or not math.isfinite(value):
            return dash
        return f"{100 * value if self.unit == 'points' else value:{sign}.{self.digits}f}"

    @property
    def most(self) -> float:
        """The largest value there can be."""
        return math.inf if self.unit in ("pixels", "nats") else 1.0

    def values(self, first: np.ndarray, second: np.ndarray, absent: str) -> tuple[float, float]:
        """Of two runs on the same images."""
        tables, score = self.bind([first, second], absent)
        one, two = (float(score(table.sum(0))) for table in tables)
        return one, two

    def difference(self, first: np.ndarray, second: np.ndarray, absent: str) -> Interval:
        """Of the second run less the first, on the same images in the same order."""
        (one, two), score = self.bind([first, second], absent)
        return difference(one, two, score, held=_held(first, one) if self.of_classes else None, bounds=(-self.most, self.most))

    def class_differences(self, first: np.ndarray, second: np.ndarray, absent: str) -> tuple[np.ndarray, np.ndarray, Interval]:
        """(K,) of each run, and the difference of each class; for measures with `bind_classes`."""
        if self.bind_classes is None:
            raise ValueError(f"{self.words} has no score of each class")
        (one, two), score = self.bind_classes([first, second], absent)
        found = difference(one, two, score, held=_held(first, one), bounds=(-self.most, self.most))
        return score(one.sum(0)), score(two.sum(0)), found


def _held(table: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """(K,): images that hold a class, from a table and what `bind` made of it.

    Of contours those of the truth: what a run draws where the class is not is no image of it. Of distances (N, K, D, 2) those with a value,
    which needs every run.
    """
    if table.shape[2:] == (3,):
        return tallies.holding(table)
    return np.asarray(bound[..., 1].any(axis=tuple(range(2, bound.ndim - 1))).sum(0))


def _of_classes(mean: Callable[..., np.ndarray]) -> Bind:
    """A mean over classes of tallies (N, K, 3), by the rule for absent ones."""

    def bind(tables: Sequence[np.ndarray], absent: str) -> tuple[list[np.ndarray], Score]:
        whole = tables[0].sum(0)  # of its truth, which is that of all
        bound = [tallies.with_stray(table) for table in tables] if absent == "union" else list(tables)
        return bound, partial(tallies.resampled_mean, mean, whole, absent)

    return bind


def _each_class(score: Score) -> Bind:
    """A score of each class of tallies (N, K, 3)."""

    def bind(tables: Sequence[np.ndarray], absent: str) -> tuple[list[np.ndarray], Score]:
        whole = tables[0].sum(0)
        return list(tables), lambda sums: score(tallies.without_missed(sums, whole))

    return bind


def _plainly(score: Score) -> Bind:
    """A score of the sums as they are."""
    return lambda tables, absent: (list(tables), score)


def _of_images(value: Callable[[np.ndarray], np.ndarray]) -> Bind:
    """The mean over images of a value of each."""
    return lambda tables, absent: ([values_table(value(table)) for table in tables], value_mean)


def _share(above: int, below: Sequence[int], times: float = 1.0) -> Bind:
    """One of the sums as a share of others."""

    def score(sums: np.ndarray) -> np.ndarray:
        whole = np.asarray(sums[..., list(below)].sum(-1), np.float64)
        return np.divide(times * sums[..., above], whole, out=np.full(whole.shape, np.nan), where=whole > 0)

    return _plainly(score)


def _distance(place: int, mean: bool) -> Bind:
    """A surface distance from a table (N, K, 2, 2), over the images where every run has one, so that to miss a class gains nothing."""

    def score(sums: np.ndarray) -> np.ndarray:
        values = value_mean(sums[..., place, :])
        if not mean:
            return values
        has = ~np.isnan(values)
        return np.divide(np.where(has, values, 0).sum(-1), has.sum(-1), out=np.full(values.shape[:-1], np.nan), where=has.any(-1))

    def bind(tables: Sequence[np.ndarray], absent: str) -> tuple[list[np.ndarray], Score]:
        both = np.all([table[..., 1] > 0 for table in tables], axis=0)
        return [np.where(both[..., None], table, 0) for table in tables], score

    return bind


def _best(scores: Score, less: bool) -> Bind:
    """The best over thresholds of scores (..., T): chosen anew in each resample, as it is on the set."""

    def score(sums: np.ndarray) -> np.ndarray:
        values = scores(sums)
        worst = np.inf if less else -np.inf
        found = np.where(np.isnan(values), worst, values)
        found = found.min(-1) if less else found.max(-1)
        return np.where(np.isfinite(found), found, np.nan)

    return _plainly(score)


def _shares_at(place: int) -> Score:
    def scores(sums: np.ndarray) -> np.ndarray:
        whole = np.asarray(sums[..., 0], np.float64)
        return np.divide(sums[..., place], whole, out=np.full(whole.shape, np.nan), where=whole > 0)

    return scores


_REGION = (
    Measure("miou", "mIoU", "region", _of_classes(tallies.miou), _each_class(tallies.iou), of_classes=True),
    Measure("pixel_accuracy", "pixel accuracy", "region", _plainly(tallies.pixel_accuracy)),
    Measure("mean_accuracy", "mean accuracy", "region", _of_classes(tallies.mean_accuracy), _each_class(tallies.recall), of_classes=True),
    Measure("fwiou", "frequency-weighted IoU", "region", _plainly(tallies.fwiou)),
    Measure("mean_dice", "mean Dice", "region", _of_classes(tallies.mean_dice), of_classes=True),
)
_BOUNDARY = (
    # Each run's mean is over its own images with a contour, as in its own scores: one that invents contours is not spared.
    Measure("bf", "boundary F (BF)", "contours", _of_images(lambda table: tallies.class_mean(tallies.dice(table), table)),
            _of_images(tallies.dice), of_images=True),
    Measure("boundary_iou", "Boundary IoU", "bands", _of_classes(tallies.miou), _each_class(tallies.iou), of_classes=True),
    *(Measure(f"trimap_{width}", f"mIoU within {width} px", f"trimap_{width}", _of_classes(tallies.miou), of_classes=True)
      for width in TRIMAP_KEPT),
    *(
        Measure(name, words, "surface", _distance(place, True), _distance(place, False),
                of_images=True, of_classes=True, less=True, unit="pixels")
        for place, (name, words) in enumerate((("assd", "mean surface distance (ASSD)"), ("hausdorff", "95 % Hausdorff distance")))
    ),
)  # fmt: skip
_MEANS_OF_IMAGES = ("segments", "board_thinned")  # tables; the others of neurites are summed over the set
_NEURITE = tuple(
    Measure(
        name,
        words,
        table,
        bind,
        by_class=False,
        of_images=table in _MEANS_OF_IMAGES,
        less="error" in name or "differing" in name,
        unit="",
        digits=6 if "warping" in name else 4,
    )
    for name, words, table, bind in (
        ("pixel_error", "pixel error", "flips", _share(1, [0])),
        ("warping_error", "warping error", "flips", _share(2, [0])),
        ("rand_error", "adapted Rand error", "segments", _plainly(lambda sums: value_mean(sums[..., 0, :]))),
        ("v_rand", "V_rand", "segments", _plainly(lambda sums: value_mean(sums[..., 1, :]))),
        ("v_info", "V_info", "segments", _plainly(lambda sums: value_mean(sums[..., 2, :]))),
        ("seg", "SEG", "objects", _share(3, [0])),
        ("f1", "F1 of objects at IoU 0.5", "objects", _share(2, [0, 1], 2.0)),
        ("board_rand_error", "Rand error, best threshold", "board_pairs", _best(lambda sums: 1 - tallies.dice(sums), True)),
        ("board_warping_error", "splits and mergers, best threshold", "board_breaks", _best(_shares_at(2), True)),
        ("board_pixel_error", "pixel error (1 - F), best threshold", "board_insides", _best(lambda sums: 1 - tallies.dice(sums), True)),
        ("board_differing_pixels", "differing pixels, best threshold", "board_breaks", _best(_shares_at(1), True)),
        ("board_v_rand", "V_rand thinned, best threshold", "board_thinned", _best(lambda sums: value_mean(sums[..., 0, :]), False)),
        ("board_v_info", "V_info thinned, best threshold", "board_thinned", _best(lambda sums: value_mean(sums[..., 1, :]), False)),
    )
)
COST = Measure("cost", "cost", "losses", _of_images(lambda table: table), by_class=False, of_images=True, less=True, unit="nats", digits=4)
MEASURES: Mapping[str, Measure] = {measure.name: measure for measure in (*_REGION, *_BOUNDARY, COST, *_NEURITE)}
CLASS_TABLES = {measure.table for measure in MEASURES.values() if measure.by_class}
