"""Tune: which refiner helps a bundle's scores, with which parameters, and whether the gain is real.

The score is mIoU; for a watershed, whose lines are too thin for it, V_rand, which counts the pairs of pixels that are rightly together.
The gain is that of cross-validation: each half of the images is refined by what was best on the other half, so a refiner that only fits
the images it was searched on gains nothing. What is written is the best on all images.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perpixel.bundle import LINES, Card, RefinerCard, load_bundle, save_bundle
from perpixel.data.class_names import refuse_other_names
from perpixel.data.dataset import LabelledImages
from perpixel.data.layouts import find_layout, split_pairs
from perpixel.metrics.boundary import BoundaryF
from perpixel.metrics.intervals import Interval, difference, value_mean, values_table
from perpixel.refinement.candidates import SEARCHED, Candidate, Costs
from perpixel.search import Aim, MeanIou, Progress, Search, VRand, learned_costs

PREDICTING_SHARE = 0.35  # of the time
# Several candidates are tried, and both halves choose among many of them: 99 % keeps false gains as rare as 95 % does for a single one.
LEVEL = 0.99
FEWEST = 8  # images: with fewer, all of them gain by chance more often than the level allows


@dataclass
class Tuning:
    """What a search found.

    Attributes:
        present: the refiner that the bundle has already, which a new one must better; None where it has none.
        aim: the score by which refiners are judged: mIoU over the classes in the truth, or V_rand for a watershed.
        chosen: best on all images; None where nothing was tried.
        gain, boundary: in the score and in boundary F over the bundle as it is by cross-validation, with intervals over the images, at
            `LEVEL`.
        before, after: the score of the set with the bundle as it is, and by cross-validation.
        accepted: whether the lower end of the interval of the gain is above zero, on `FEWEST` images or more.
        best: each refiner's best candidate and its score on all images, which it was chosen on.
    """

    aim: Aim
    images: int
    before: float
    after: float = float("nan")
    boundary_before: float = float("nan")
    boundary_after: float = float("nan")
    present: Candidate | None = None
    chosen: Candidate | None = None
    gain: Interval | None = None
    boundary: Interval | None = None
    best: dict[str, tuple[Candidate, float]] = field(default_factory=dict)
    tried: int = 0
    left_out: int = 0  # images, for lack of time or memory
    damaged: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    written: bool = False  # into the bundle
    uncalibrated: bool = False  # the bundle had a temperature, which was of other scores and was dropped

    @property
    def accepted(self) -> bool:
        better = self.gain is not None and bool(self.gain.low > 0) and self.images >= FEWEST
        return better and self.chosen != self.present

    @property
    def verdict(self) -> str:
        """One line: whether the gain is shown, and why not."""
        if self.chosen is None or self.gain is None:
            return "no refiner could be tried in the time given; give more --minutes"
        if self.chosen == self.present:
            return f"{self.chosen.words}: the bundle's own is the best of those tried: it stays as it is"
        gain = f"{100 * self.gain.value:+.2f} points of {self.aim.words} ({100 * self.gain.low:+.2f} to {100 * self.gain.high:+.2f})"
        if self.present is not None:
            gain += f" over its present refiner, {self.present.words}"
        if self.accepted:
            cost = f"; boundary F falls by {-100 * self.boundary.value:.2f} points" if self.boundary and self.boundary.value < 0 else ""
            return f"{self.chosen.words}: {gain}; above zero on {self.images} images{cost}"
        if self.images < FEWEST:
            more = f"{self.images} image(s) tell too little of others: {FEWEST} that it was not trained on are needed"
            return f"{self.chosen.words}: {gain}; {more}, so the bundle stays as it is"
        why = "the interval holds zero" if self.gain.high > 0 else "it makes the labels worse"
        return f"{self.chosen.words}: {gain}; {why}, so the bundle stays as it is"

    def to_json(self) -> dict[str, Any]:
        """Plain types; None where there is no number."""
        return {
            "images": self.images,
            "candidates": self.tried,
            f"{self.aim.name}_before": _plain(self.before),
            f"{self.aim.name}_after": _plain(self.after),
            f"{self.aim.name}_gain": _interval(self.gain),
            "boundary_f_before": _plain(self.boundary_before),
            "boundary_f_after": _plain(self.boundary_after),
            "boundary_f_gain": _interval(self.boundary),
            "level": LEVEL,
            "accepted": self.accepted,
            "written": self.written,
            "verdict": self.verdict,
            "present": None if self.present is None else {"name": self.present.name, "options": self.present.options},
            "chosen": None if self.chosen is None else {"name": self.chosen.name, "options": self.chosen.options},
            "best": {name: {"options": found.options, self.aim.name: _plain(score)} for name, (found, score) in self.best.items()},
            "left_out": self.left_out,
            "damaged": self.damaged,
            "seconds": round(self.seconds, 1),
        }


def tune(
    bundle: Path | str,
    images: Path | str,
    masks: Path | str | None = None,
    *,
    refiners: Sequence[str] | None = None,
    between: str | None = None,
    minutes: float = 10.0,
    split: str = "val",
    labels: Mapping[int, int] | None = None,
    write: bool = True,
    device: str | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Searches a refiner for a bundle on labelled images, and writes it into the bundle where its gain is real.

    Args:
        bundle: its path; rewritten in place, with the refiner, only where the interval of the gain is above zero. The gain is over the
            refiner that the bundle has already, where it has one.
        images, masks: any layout that `perpixel check` understands.
        refiners: names in `SEARCHED` to search among, or one name; None: all. Or "watershed" by itself.
        between: the class that lies between objects, for a watershed; None: that of the bundle's own, or the first.
        minutes: wall-clock budget from this call; each refiner gets a like share of what the predictions leave.
        split: the part to search on; label costs are learned from the masks of the part "train".
        labels: mask value -> class index or 255, over the bundle's own label map.
        write: False only reports.
        device: where to compute; None: on the GPU where there is one.

    Raises:
        ValueError: an unknown refiner or class, a watershed beside other refiners (among those to search, or one of them in the bundle),
            no images in the part, or none that could be read.
    """
    start, refiners = time.monotonic(), list(SEARCHED) if refiners is None else [refiners] if isinstance(refiners, str) else refiners
    if not minutes > 0:
        raise ValueError(f"minutes is {minutes}; a search needs more than 0")
    path = Path(bundle)
    loaded = load_bundle(path, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    card = loaded.card
    aim = _aim_of(refiners, between, card, path)
    layout = find_layout(images, masks)
    if layout.classes_file is not None:
        refuse_other_names(layout.classes_file, card.classes, loaded.label_map, labels or {})
    chosen = layout.labelled(split, card.val_fraction, card.split_seed)
    label_map = loaded.relabelled(labels or {})
    if len(chosen) < FEWEST:
        few = f"{len(chosen)} image{'s' * (len(chosen) != 1)} to search on; a refiner is written into the bundle on {FEWEST} or more only"
        warnings.warn(few, stacklevel=2)
    data = LabelledImages(chosen, label_map, card.bands, card.dtype, cache=False)
    search = Search(loaded, data, start + 60 * minutes * PREDICTING_SHARE, progress, aim)
    labelled = np.unique(np.concatenate([np.setdiff1d(labels, search.ignore) for _, _, labels in search.scores]))
    if len(labelled) < 2 <= search.classes:
        what = f"hold nothing but '{card.classes[labelled[0]]}'" if len(labelled) else "have no labelled pixel"
        raise ValueError(f"{images}: the masks {what} under the bundle's label map, so there is nothing to tune on: were they made for it?")
    present = None if card.refiner is None else Candidate(card.refiner.name, card.refiner.options)
    if present is not None:
        search.attempt(present)
    parts = split_pairs(layout.pairs, card.val_fraction, card.split_seed)
    masks_to_learn = [pair.mask for pair in parts if pair.split == "train" and pair.mask is not None]
    costs: Costs | None = None
    stated: dict[str, Any] | None = None
    if isinstance(aim, VRand):
        # With the temperature that the seeds were found at, so that a later one leaves labels as they are.
        stated = {"between": aim.between, "temperature": loaded.temperature(LINES)}
    else:
        costs = learned_costs(masks_to_learn, label_map, search.classes)
    deadline = start + 60 * minutes - search.closing_seconds()
    for number, name in enumerate(refiners):
        now = time.monotonic()
        search.explore(name, costs, now + (deadline - now) / (len(refiners) - number), stated=stated)
    result = judged(search, present)
    result.damaged = {**layout.damaged, **search.damaged}
    result.seconds = time.monotonic() - start
    if write and result.accepted and result.chosen is not None:
        refiner = RefinerCard(name=result.chosen.name, options=result.chosen.options, gain=_gain(result))
        # A temperature is of scores as they were; lines leave them so.
        temperature = card.temperature if isinstance(aim, VRand) else None
        save_bundle(path, loaded.model.state_dict(), card.model_copy(update={"refiner": refiner, "temperature": temperature}))
        result.written, result.uncalibrated = True, card.temperature is not temperature
    return result


def _aim_of(refiners: Sequence[str], between: str | None, card: Card, path: Path) -> Aim:
    """By which score refiners are judged; ValueError for an unknown one, or where no single score judges them and the bundle's own."""
    classes = card.classes
    if unknown := [name for name in refiners if name not in (*SEARCHED, LINES)]:
        raise ValueError(f"unknown refiner {unknown[0]!r}. Known: {', '.join(SEARCHED)}, {LINES}")
    if LINES not in refiners:
        if between is not None:
            raise ValueError(f"between={between!r} is the class between objects, for a {LINES}, and none is searched")
        if card.refiner_name == LINES:
            raise ValueError(f"{path} has the {LINES}, which mIoU can't judge, so nothing is put in its place; see docs/refinement.md")
        return MeanIou(len(classes))
    judged_by = f"a {LINES} is judged by V_rand, as its lines are too thin for mIoU, and other refiners by mIoU"
    if set(refiners) != {LINES}:
        raise ValueError(f"{judged_by}: search it alone")
    if card.refiner_name not in ("none", LINES):
        raise ValueError(f"{path} has the {card.refiner_name}; {judged_by}, so it is not put in its place; see docs/refinement.md")
    if between is not None and between not in classes:
        raise ValueError(f"there is no class {between!r} to lie between objects; the classes are {', '.join(classes)}")
    lines = classes.index(between) if between is not None else 0 if card.refiner is None else card.refiner.options.get("between", 0)
    return VRand(lines, classes[lines])


def judged(search: Search, present: Candidate | None) -> Tuning:
    """The gain by cross-validation over the bundle as it is, with its `present` refiner or none, and the best on all images."""
    everything = np.ones(len(search.scores), bool)

    def score(table: np.ndarray) -> float:
        return float(search.aim.score(table.sum(0)))

    found = Tuning(search.aim, len(search.scores), score(search.plain), tried=len(search.tables), left_out=search.left_out)
    entries = list(search.tables.values())
    if not entries:
        return found
    found.chosen = search.best(entries, everything)[0]
    for name in {candidate.name for candidate, _ in entries}:
        own, table = search.best([entry for entry in entries if entry[0].name == name], everything)
        found.best[name] = (own, score(table))
    as_it_is = search.plain
    if present is not None:
        found.present, as_it_is = present, search.tables[present.key][1]
        found.before = score(as_it_is)
    held_out, boundaries = search.plain.copy(), (BoundaryF(search.classes), BoundaryF(search.classes))
    for fold, (winner, table) in zip(search.folds, search.cross_fitted(entries), strict=True):
        held_out[fold] = table[fold]
        for boundary, candidate in zip(boundaries, (present, winner), strict=True):
            for index, labels, predicted in search.labelled(candidate, np.flatnonzero(fold).tolist()):
                boundary.update(labels, predicted, ignore=search.ignore, name=str(index))
    found.after = score(held_out)
    found.gain = difference(as_it_is, held_out, search.aim.score, level=LEVEL)
    before, after = (values_table(boundary.per_image) for boundary in boundaries)
    found.boundary = difference(before, after, value_mean, level=LEVEL)
    found.boundary_before, found.boundary_after = (boundary.score for boundary in boundaries)
    return found


def _gain(result: Tuning) -> dict[str, Any]:
    return {key: value for key, value in result.to_json().items() if key.startswith((result.aim.name, "boundary", "images"))}


def _interval(found: Interval | None) -> dict[str, float | None] | None:
    return None if found is None else {"value": _plain(found.value), "low": _plain(found.low), "high": _plain(found.high)}


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def render(result: Tuning, console: Console) -> None:
    """The search as a table for people."""
    title = f"{result.tried} candidates on {result.images} images"
    table = Table("refiner", "best options", f"{result.aim.words} where it was searched", title=title)
    for name, (candidate, score) in sorted(result.best.items()):
        table.add_row(name, escape(candidate.words.removeprefix(name).strip()), f"{100 * score:.2f} %")
    console.print(table)
    for label, before, after, gain in (
        (result.aim.title, result.before, result.after, result.gain),
        ("boundary F (BF)", result.boundary_before, result.boundary_after, result.boundary),
    ):
        if gain is not None:
            console.print(
                f"{label}: {100 * before:.2f} % as it is, {100 * after:.2f} % with each half refined by what was best on the other: "
                f"[bold]{100 * gain.value:+.2f}[/] ({100 * gain.low:+.2f} to {100 * gain.high:+.2f} in {100 * gain.level:.0f} % of cases)"
            )
    if result.left_out:
        console.print(
            f"[yellow]{result.left_out} images were left out[/]: for lack of time or memory; more --minutes take more", soft_wrap=True
        )
    for why in result.damaged.values():
        console.print(f"[yellow]left out[/] {escape(why)}", soft_wrap=True)
    console.print(escape(result.verdict), soft_wrap=True)
    if result.written:
        again = "; its temperature was of other scores and is dropped: `perpixel calibrate` fits one anew" if result.uncalibrated else ""
        console.print(f"[bold]written into the bundle[/]: predict and evaluate refine by it now{again}", soft_wrap=True)
