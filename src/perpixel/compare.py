"""Compare: is one run better than another, or were its images only easier? Paired differences, with intervals, from files of scores.

Both runs are scored on the same images, and each bootstrap resample draws the same of them for both, so what makes an image hard for all
cancels (Efron & Tibshirani 1993, chapter 8). No image is looked at again: the files hold the counts of each.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perpixel.metrics import ABSENT_RULES, tallies
from perpixel.metrics.intervals import FEW, Interval, difference, value_mean, values_table
from perpixel.metrics.tallies import PerImage
from perpixel.scores import plain

HOW = "Such a file is written by `perpixel evaluate --json-out FILE`, and by `perpixel train` as RUN/evaluation.json."
NAMED = 5  # images on each side, in the table for people


@dataclass
class RunScores:
    """The counts of each image of one run.

    Attributes:
        region: (N, K, 3) pixels of each class.
        contours: (N, K, 3) contour pixels of each class; None where they were not scored.
        losses: (N,), NaN where nothing is labelled and infinite where the scores overflowed.
    """

    name: str
    classes: list[str]
    images: list[str]
    region: np.ndarray
    contours: np.ndarray | None
    losses: np.ndarray

    def chosen(self, images: Sequence[int], classes: Sequence[int]) -> "RunScores":
        """Only these images and classes, in this order."""
        contours = None if self.contours is None else self.contours[np.ix_(images, classes)]
        names, labels = [self.images[place] for place in images], [self.classes[place] for place in classes]
        return RunScores(self.name, labels, names, self.region[np.ix_(images, classes)], contours, self.losses[images])


@dataclass
class Pairing:
    """A run beside the first one.

    Attributes:
        differences: score -> this run's minus the first's, with its interval; "iou" is that of each class, (K,). A lower "cost" is better.
        values: score -> of the first and of this run.
        iou: of each class, (K,) of the first and of this run.
        wins: image -> difference of its own mIoU, where the two are not equal.
        holding: (K,) in how many images the truth has a class.
    """

    first: str
    second: str
    classes: list[str]
    images: int
    absent: str
    differences: dict[str, Interval]
    values: dict[str, tuple[float, float]]
    iou: tuple[np.ndarray, np.ndarray]
    wins: dict[str, float]
    holding: np.ndarray
    notes: list[str]

    @property
    def verdict(self) -> str:
        """One line: whether the difference in mIoU is real."""
        found = self.differences["miou"]
        gain = f"{100 * found.value:+.2f} points of mIoU (95 % {100 * found.low:+.2f} to {100 * found.high:+.2f}, {self.images} images)"
        if found.images < FEW or not np.isfinite(found.low):
            return f"{self.second} against {self.first}: {gain}; so few images tell nothing of others"
        if found.above_zero or found.below_zero:
            better = self.second if found.above_zero else self.first
            return f"{self.second} against {self.first}: {gain}: the difference is real, {better} is better"
        return f"{self.second} against {self.first}: {gain}: no difference is shown, the interval holds zero"

    def to_json(self) -> dict[str, Any]:
        """Plain types; None where there is no number."""
        iou = self.differences["iou"]
        columns = (*self.iou, *(np.asarray(part) for part in (iou.value, iou.low, iou.high)))
        real = np.asarray((iou.above_zero | iou.below_zero) & (self.holding >= FEW)).tolist()
        keys = ("name", "first", "second", "difference", "low", "high", "real")
        rows = [(name, *map(plain, row), told) for name, told, *row in zip(self.classes, real, *columns, strict=True)]
        won = sorted(self.wins, key=lambda name: -self.wins[name])
        return {
            "first": self.first,
            "second": self.second,
            "images": self.images,
            "absent_rule": ABSENT_RULES[self.absent],
            "scores": {
                name: {
                    "first": plain(self.values[name][0]),
                    "second": plain(self.values[name][1]),
                    "difference": plain(found.value),
                    "low": plain(found.low),
                    "high": plain(found.high),
                    "real": bool(found.above_zero or found.below_zero),
                }
                for name, found in self.differences.items()
                if name != "iou"
            },
            "classes": [dict(zip(keys, row, strict=True)) for row in rows],  # IoU
            "won_by_second": {name: self.wins[name] for name in won if self.wins[name] > 0},
            "won_by_first": {name: -self.wins[name] for name in reversed(won) if self.wins[name] < 0},
            "verdict": self.verdict,
            "notes": self.notes,
        }


def compare(runs: Sequence[Path | str], absent: str = "truth") -> list[Pairing]:
    """Each run beside the first.

    Args:
        runs: at least two files of scores, or folders of `perpixel train`, which hold one.
        absent: the rule for absent classes in every mean, of `ABSENT_RULES`. Not "union" as in `evaluate`: by it a single pixel
            of a class that no image holds costs a run as much as all of another class.

    Raises:
        ValueError: no file of scores, no image or class in both, or the truth of an image is not the same in both.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run given; a comparison needs at least 2")
    if absent not in ABSENT_RULES:
        raise ValueError(f"absent is {absent!r}; the rules for absent classes are {', '.join(ABSENT_RULES)}")
    first, *others = (read_scores(Path(run)) for run in runs)
    return [_paired(first, other, absent) for other in others]


def read_scores(path: Path) -> RunScores:
    """The counts of each image that a file of scores holds, or that of a run's folder; ValueError where there are none."""
    file = path / "evaluation.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file. {HOW}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not a file of scores ({error}). {HOW}") from None
    if not isinstance(content, dict) or "per_image" not in content:
        raise ValueError(f"{file}: holds no counts of each image. {HOW}")
    try:
        stored, losses = content["per_image"], content["losses"]
        names, classes = stored["names"], [row["name"] for row in content["classes"]]
        shape = (len(classes), 3)
        region = PerImage.unpacked(shape, names, stored["region"]).table
        contours = PerImage.unpacked(shape, names, stored["contours"]).table if "contours" in stored else None
        values = np.array([np.inf if (loss := losses.get(name, np.nan)) is None else loss for name in names], np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: its scores are damaged: {error}. {HOW}") from None
    return RunScores(str(path), classes, names, region, contours, values)


def _paired(first: RunScores, second: RunScores, absent: str) -> Pairing:
    notes: list[str] = []
    classes = _in_both(first, second, lambda run: run.classes, "classes", notes)
    images = _in_both(first, second, _image_names(first, second), "images", notes)
    one, two = first.chosen(images[0], classes[0]), second.chosen(images[1], classes[1])
    unlike = np.flatnonzero((one.region[..., 1] != two.region[..., 1]).any(1))
    if len(unlike):
        raise ValueError(
            f"{second.name}: the truth of {len(unlike)} images is not that of {first.name}, such as {one.images[unlike[0]]}: "
            "other masks, or another label map. Score both on the same"
        )
    differences, values = {}, {}
    for name, score, tables in _measures(one, two, absent):
        differences[name] = difference(*tables, score)
        if name != "iou":
            values[name] = (float(score(tables[0].sum(0))), float(score(tables[1].sum(0))))
    if "cost" not in differences:
        notes.append("the cost is not compared: the scores of some images overflowed")
    holding = tallies.holding(one.region)
    iou = (tallies.iou(one.region.sum(0)), tallies.iou(two.region.sum(0)))
    own = tallies.miou(two.region, absent) - tallies.miou(one.region, absent)
    wins = {name: float(gain) for name, gain in zip(one.images, own, strict=True) if gain and np.isfinite(gain)}
    return Pairing(first.name, second.name, one.classes, len(one.images), absent, differences, values, iou, wins, holding, notes)


def _measures(
    one: RunScores, two: RunScores, absent: str
) -> list[tuple[str, Callable[[np.ndarray], np.ndarray], tuple[np.ndarray, np.ndarray]]]:
    """Name, score of summed counts, and the tables of both runs."""
    whole = one.region.sum(0)  # the truth of both is the same
    region = (one.region, two.region) if absent != "union" else (_with_stray(one.region), _with_stray(two.region))
    scores: dict[str, Callable[[np.ndarray], np.ndarray]] = {"pixel_accuracy": tallies.pixel_accuracy, "fwiou": tallies.fwiou}
    for name, mean in tallies.MEANS.items():
        scores[name] = partial(_mean_of_resamples, mean, whole, absent)
    scores["iou"] = lambda sums: tallies.iou(tallies.without_missed(sums, whole))
    found = [(name, scores[name], region) for name in ("miou", "pixel_accuracy", "mean_accuracy", "fwiou", "mean_dice", "iou")]
    if one.contours is not None and two.contours is not None:
        per_image = [tallies.class_mean(tallies.dice(table), table) for table in (one.contours, two.contours)]
        # Each run's mean is over its own images with a contour, as in its own scores: one that invents contours is not spared.
        found.append(("bf", value_mean, (values_table(per_image[0]), values_table(per_image[1]))))
    if not np.isinf([one.losses, two.losses]).any():
        found.append(("cost", value_mean, (values_table(one.losses), values_table(two.losses))))
    return found


def _mean_of_resamples(mean: Callable[..., np.ndarray], whole: np.ndarray, absent: str, sums: np.ndarray) -> np.ndarray:
    if absent == "zero":
        return tallies.of_resamples(mean, sums, whole, absent)
    return mean(tallies.without_missed(sums, whole), absent)


def _with_stray(region: np.ndarray) -> np.ndarray:
    """Classes that a run predicts and no truth has are predicted in every image, so that they are 0 in every resample."""
    whole = region.sum(0)
    stray = (whole[:, 1] == 0) & (whole[:, 2] > 0)
    return np.where(stray[:, None] & (np.arange(3) == 2), np.maximum(region, 1), region)


def _in_both(
    first: RunScores, second: RunScores, names_of: Callable[[RunScores], list[str]], what: str, notes: list[str]
) -> tuple[list[int], list[int]]:
    """Places of what both runs have, in the first's order; says what is in one of them only."""
    one, two = names_of(first), names_of(second)
    place = {name: number for number, name in enumerate(two)}
    shared = [name for name in one if name in place]
    if not shared:
        raise ValueError(
            f"{first.name} and {second.name} have no {what} in common: {', '.join(one[:3])} ... and {', '.join(two[:3])} ... "
            "Score both runs on the same set"
        )
    alone = [(first, len(one) - len(shared)), (second, len(two) - len(shared))]
    told = " and ".join(f"{count} only in {run.name}" for run, count in alone if count)
    if told:
        notes.append(f"{len(shared)} {what} are in both and compared; left out are {told}")
    own = {name: number for number, name in enumerate(one)}
    return [own[name] for name in shared], [place[name] for name in shared]


def _image_names(first: RunScores, second: RunScores) -> Callable[[RunScores], list[str]]:
    """How images are told apart: by their files as given; or, where these share none (another machine, another way to write the folder),
    by what follows the folder that all of a run's images lie in; or by file name alone."""
    ways: list[Callable[[RunScores], list[str]]] = [lambda run: run.images, _below_the_common_folder, _file_names]
    for way in ways:
        one, two = way(first), way(second)
        unique = all(count == 1 for names in (one, two) for count in Counter(names).values())
        if unique and set(one) & set(two):
            return way
    return ways[0]


def _below_the_common_folder(run: RunScores) -> list[str]:
    common = os.path.commonpath([os.path.dirname(os.path.normpath(name)) for name in run.images]) if run.images else ""
    return [os.path.relpath(os.path.normpath(name), common or os.curdir) for name in run.images]


def _file_names(run: RunScores) -> list[str]:
    return [os.path.basename(name) for name in run.images]


def render(pairings: Sequence[Pairing], console: Console) -> None:
    """Each pairing as tables for people, with its verdict last."""
    for pairing in pairings:
        content = pairing.to_json()
        for note in pairing.notes:
            console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
        console.print(_score_table(content))
        console.print(_class_table(content))
        for who, won in ((pairing.second, content["won_by_second"]), (pairing.first, content["won_by_first"])):
            console.print(
                f"{escape(who)} is better on {len(won)} of {pairing.images} images" + (", most on:" if won else ""), soft_wrap=True
            )
            for name, gain in list(won.items())[:NAMED]:
                console.print(f"  {100 * gain:6.1f} points  {escape(name)}", soft_wrap=True)
        console.print(f"[dim]{ABSENT_RULES[pairing.absent]}[/]", soft_wrap=True)
        console.print(f"[bold]{escape(pairing.verdict)}[/]", soft_wrap=True)


def _score_table(content: Mapping[str, Any]) -> Table:
    table = Table("score", "first", "second", "difference", "95 %")
    for name, row in content["scores"].items():
        digits, unit = (4, 1) if name == "cost" else (2, 100)
        values = [None if row[key] is None else unit * row[key] for key in ("first", "second", "difference", "low", "high")]
        one, two = ("-" if value is None else f"{value:.{digits}f}" for value in values[:2])
        table.add_row(name.replace("_", " "), one, two, *_signed(values[2:], digits))
    return _right(table)


def _class_table(content: Mapping[str, Any]) -> Table:
    table = Table("class", "IoU: difference", "95 %", "real")
    for row in content["classes"]:
        values = [None if row[key] is None else 100 * row[key] for key in ("difference", "low", "high")]
        table.add_row(escape(row["name"]), *_signed(values, 2), "yes" if row["real"] else "")
    return _right(table)


def _signed(values: Sequence[float | None], digits: int) -> tuple[str, str]:
    value, low, high = values
    between = "-" if low is None or high is None else f"{low:+.{digits}f} to {high:+.{digits}f}"
    return "-" if value is None else f"{value:+.{digits}f}", between


def _right(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table
