"""Compare: is one run better than another, or were its images only easier? Paired differences, with intervals, from files of scores.

Both runs are scored on the same images, and each bootstrap resample draws the same of them for both, so what makes an image hard for all
cancels (Efron & Tibshirani 1993, chapter 8). No image is looked at again: the files hold the counts of each.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perpixel.metrics import ABSENT_RULES, tallies
from perpixel.metrics.intervals import FEW, Interval
from perpixel.metrics.measures import CLASS_TABLES, MEASURES, Measure
from perpixel.scores import plain

HOW = "Such a file is written by `perpixel evaluate --json-out FILE`, and by `perpixel train` as RUN/evaluation.json."
OF_ANY_IMAGE = ("region", "losses")  # tables that hold also images that were scored block by block
WAYS = {  # key in the file -> words, and what stands for none
    "precision": ("precision of the network", "float32"),
    "refined": ("refinement", "none"),
    "augment": ("views of each image", "one"),
}
NAMED = 5  # images on each side, in the table for people


@dataclass
class RunScores:
    """What one run's file holds of each image.

    Attributes:
        tables: name -> (N, *shape), as `metrics.measures` knows it: counts of pixels, contour pixels, segments, and losses (N,), NaN where
            nothing is labelled and infinite where the scores overflowed.
        whole: (N,) whether each image was held whole; one that was scored block by block is in no table but those of pixels and losses.
        inside: the class that neurite scores took for the inside; "" without any.
    """

    name: str
    classes: list[str]
    images: list[str]
    tables: dict[str, np.ndarray]
    whole: np.ndarray
    inside: str = ""
    ways: Mapping[str, str] = field(default_factory=dict)  # how the scores came about: each key of `WAYS`, where the file has it

    @property
    def region(self) -> np.ndarray:
        """(N, K, 3) pixels of each class."""
        return self.tables["region"]

    def chosen(self, images: Sequence[int], classes: Sequence[int]) -> "RunScores":
        """Only these images and classes, in this order."""
        tables = {name: table[images][:, list(classes)] if name in CLASS_TABLES else table[images] for name, table in self.tables.items()}
        names, chosen = [self.classes[place] for place in classes], [self.images[place] for place in images]
        return RunScores(self.name, names, chosen, tables, self.whole[images], self.inside, self.ways)


@dataclass
class ClassScores:
    """One score of each class, beside the first run: (K,) of the first, of the second, and the differences."""

    measure: Measure
    first: np.ndarray
    second: np.ndarray
    found: Interval

    def rows(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """A row of plain types for each class."""
        found = self.found
        real = np.asarray(found.above_zero | found.below_zero).tolist()
        columns = (self.first, self.second, *(np.asarray(part) for part in (found.value, found.low, found.high)))
        keys = ("name", "first", "second", "difference", "low", "high", "real")
        rows = [(name, *map(plain, row), told) for name, told, *row in zip(classes, real, *columns, strict=True)]
        return [dict(zip(keys, row, strict=True)) for row in rows]


@dataclass
class Pairing:
    """A run beside the first one.

    Attributes:
        differences: name of a measure -> this run's score minus the first's, with its interval.
        values: the same -> of the first and of this run.
        by_class: the same -> scores of each class, of the measures that have them; "miou" stands for IoU.
        wins: image -> difference of its own mIoU, where the two are not equal.
    """

    first: str
    second: str
    classes: list[str]
    images: int
    absent: str
    differences: dict[str, Interval]
    values: dict[str, tuple[float, float]]
    by_class: dict[str, ClassScores]
    wins: dict[str, float]
    notes: list[str]

    @property
    def verdict(self) -> str:
        """One line: whether the difference in mIoU is real."""
        found = self.differences["miou"]
        gain = f"{100 * found.value:+.2f} points of mIoU (95 % {100 * found.low:+.2f} to {100 * found.high:+.2f}, {found.images} images)"
        if found.images < FEW or not np.isfinite(found.low):
            return f"{self.second} against {self.first}: {gain}; so few images tell nothing of others"
        if found.above_zero or found.below_zero:
            better = self.second if found.above_zero else self.first
            return f"{self.second} against {self.first}: {gain}: the difference is real, {better} is better"
        return f"{self.second} against {self.first}: {gain}: no difference is shown, the interval holds zero"

    def to_json(self) -> dict[str, Any]:
        """Plain types; None where there is no number."""
        won = sorted(self.wins, key=lambda name: -self.wins[name])
        return {
            "first": self.first,
            "second": self.second,
            "images": self.images,
            "absent_rule": ABSENT_RULES[self.absent],
            "scores": {
                name: {
                    "words": MEASURES[name].words,
                    "unit": MEASURES[name].unit,
                    "less_is_better": MEASURES[name].less,
                    "first": plain(self.values[name][0]),
                    "second": plain(self.values[name][1]),
                    "difference": plain(found.value),
                    "low": plain(found.low),
                    "high": plain(found.high),
                    "images": int(found.images),  # that the score rests on
                    "real": bool(found.above_zero or found.below_zero),
                }
                for name, found in self.differences.items()
            },
            "classes": self.by_class["miou"].rows(self.classes),  # IoU
            "class_scores": {name: part.rows(self.classes) for name, part in self.by_class.items() if name != "miou"},
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
        stored, losses = dict(content["per_image"]), content["losses"]
        names, classes = stored.pop("names"), [row["name"] for row in content["classes"]]
        stored_whole = stored.pop("whole")
        tables = {}
        for name, part in stored.items():
            shape, rows = ((len(classes), 3), part) if isinstance(part, list) else (part["shape"], part["rows"])
            tables[name] = tallies.unpacked(shape, names, rows)
        tables["losses"] = np.array([np.inf if (loss := losses.get(name, np.nan)) is None else loss for name in names], np.float64)
        whole = np.array(stored_whole, bool)
        if whole.shape != (len(names),):
            raise ValueError(f"of {len(names)} images {len(whole)} are said to have been held whole or not")
        inside = content.get("neurite", {}).get("inside", "")
        if "region" not in tables:
            raise ValueError("there are no counts of pixels")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: its scores are damaged: {error}. {HOW}") from None
    return RunScores(str(path), classes, names, tables, whole, inside, {key: str(content[key]) for key in WAYS if key in content})


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
    ways = {words: [run.ways.get(key, unless) or unless for run in (one, two)] for key, (words, unless) in WAYS.items()}
    notes += [f"the runs differ in {words}: {' and '.join(pair)}" for words, pair in ways.items() if pair[0] != pair[1]]
    measures = _shared(one, two, notes)
    pairs = {name: _tables_of(measure, one, two) for name, measure in measures.items()}
    by_class = {
        name: ClassScores(measure, *measure.class_differences(*pairs[name], absent))
        for name, measure in measures.items()
        if measure.bind_classes is not None
    }
    notes += _missed(pairs["assd"]) if "assd" in pairs else []
    own = tallies.miou(two.region, absent) - tallies.miou(one.region, absent)
    return Pairing(
        first.name,
        second.name,
        one.classes,
        len(one.images),
        absent,
        differences={name: measure.difference(*pairs[name], absent) for name, measure in measures.items()},
        values={name: measure.values(*pairs[name], absent) for name, measure in measures.items()},
        by_class=by_class,
        wins={name: float(gain) for name, gain in zip(one.images, own, strict=True) if gain and np.isfinite(gain)},
        notes=notes,
    )


def _tables_of(measure: Measure, one: RunScores, two: RunScores) -> tuple[np.ndarray, np.ndarray]:
    """What a measure is computed from, of the images that both runs have it of."""
    chosen = slice(None) if measure.table in OF_ANY_IMAGE else one.whole & two.whole
    return one.tables[measure.table][chosen], two.tables[measure.table][chosen]


def _shared(one: RunScores, two: RunScores, notes: list[str]) -> dict[str, Measure]:
    """The measures that both files have all for; says why some that are in one or both can't be compared."""
    found = {name: measure for name, measure in MEASURES.items() if measure.table in one.tables and measure.table in two.tables}
    lone = sorted({measure.words for measure in MEASURES.values() if (measure.table in one.tables) != (measure.table in two.tables)})
    if lone:
        notes.append(f"scored in one of the two only, and not compared: {', '.join(lone)}")
    if np.isinf([one.tables["losses"], two.tables["losses"]]).any():
        notes.append("the cost is not compared: the scores of some images overflowed")
        del found["cost"]
    if one.inside != two.inside and one.inside and two.inside:
        notes.append(f"neurite scores are not compared: one took {one.inside}, the other {two.inside} for the inside")
    both = one.whole & two.whole
    if lost := [name for name, measure in found.items() if measure.table not in OF_ANY_IMAGE] if not both.all() else []:
        words = ", ".join(found[name].words for name in lost)
        notes.append(f"{(~both).sum()} of {len(both)} images were scored block by block in one run or both, and are left out of: {words}")
        found = found if both.any() else {name: measure for name, measure in found.items() if name not in lost}
    whole = {name for name, measure in found.items() if measure.by_class or measure.table == "losses"}
    same = {name for name, measure in found.items() if one.tables[measure.table].shape == two.tables[measure.table].shape}
    return {name: found[name] for name in found if name in same and (name in whole or one.inside == two.inside)}


def _missed(pair: tuple[np.ndarray, np.ndarray]) -> list[str]:
    """Says on how much less than each run's own images surface distances are compared."""
    one, two = (table[:, :, 0, 1] > 0 for table in pair)
    lone = ", ".join(
        f"{count} only in the {which}" for which, count in (("first", (one & ~two).sum()), ("second", (two & ~one).sum())) if count
    )
    return (
        [f"surface distances are compared where both runs find a class that is there; not counted are images times classes: {lone}"]
        if lone
        else []
    )


def _in_both(
    first: RunScores, second: RunScores, names_of: Callable[[RunScores], list[str]], what: str, notes: list[str]
) -> tuple[list[int], list[int]]:
    """Places of what both runs have, in the first's order; says what is in one of them only."""
    one, two = names_of(first), names_of(second)
    place = {name: number for number, name in enumerate(two)}
    shared = [name for name in one if name in place]
    if not shared:
        by_name = "Score both runs on the same set" if what == "images" else "Train both with the same --classes: they are paired by name"
        raise ValueError(
            f"{first.name} and {second.name} have no {what} in common: {', '.join(one[:3])} ... and {', '.join(two[:3])} ... {by_name}"
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
        measure = MEASURES[name]
        unit = f" ({measure.unit})" if measure.unit not in ("", "points") else ""
        table.add_row(f"{measure.words}{unit}", measure.text(row["first"]), measure.text(row["second"]), *_signed(measure, row))
    return _right(table)


def _class_table(content: Mapping[str, Any]) -> Table:
    table = Table("class", "IoU: difference", "95 %", "real")
    for row in content["classes"]:
        table.add_row(escape(row["name"]), *_signed(MEASURES["miou"], row), "yes" if row["real"] else "")
    return _right(table)


def _signed(measure: Measure, row: Mapping[str, Any]) -> tuple[str, str]:
    low, high = row["low"], row["high"]
    between = "-" if low is None or high is None else f"{measure.text(low, '+')} to {measure.text(high, '+')}"
    return measure.text(row["difference"], "+"), between


def _right(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table
