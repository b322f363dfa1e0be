"""Tune: which refiner helps a bundle's scores, with which parameters, and whether the gain is real.

The search goes from coarse to fine, as DeepLab's does (arXiv:1412.7062, section 5.1). Every candidate is scored image by image, and the
gain is that of cross-validation: each half of the images is refined by what was best on the other half. So no image is measured with what
was searched on it, and a refiner that only fits the validation images gains nothing.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from perpixel.bundle import Bundle, RefinerCard, load_bundle, save_bundle
from perpixel.data.dataset import LabelledImages
from perpixel.data.images import FULL_SCALE
from perpixel.data.layouts import find_layout, split_pairs
from perpixel.data.masks import read_mask
from perpixel.metrics import tallies
from perpixel.metrics.boundary import BoundaryF
from perpixel.metrics.intervals import Interval, difference, value_mean, values_table
from perpixel.metrics.region import Region
from perpixel.refinement.candidates import Candidate, coarse_grid, neighbours
from perpixel.refinement.compatibility import fit_compatibility
from perpixel.refinement.refiners import REFINERS, build_refiner
from perpixel.tiling import predict_tiled

Progress = Callable[[int, int, str], None]  # (done, of, what)

MEMORY = 4 * 2**30  # bytes of scores that are kept; images beyond are left out, as are those beyond the share of time for predictions
PREDICTING_SHARE = 0.35
FOLDS = 2
COARSE_SHARE = 0.5  # of a refiner's time for the coarse grid; the rest is for what lies around the best of it


@dataclass
class Tuning:
    """What a search found.

    Attributes:
        chosen: best on all images; None where nothing was tried.
        miou, boundary: gain by cross-validation and its interval over the images.
        before, after: mIoU of the set without, and by cross-validation with a refiner.
        accepted: whether the lower end of the interval of mIoU is above zero.
        best: each refiner's best candidate and its mIoU on all images, which it was chosen on.
    """

    images: int
    before: float
    after: float = float("nan")
    boundary_before: float = float("nan")
    boundary_after: float = float("nan")
    chosen: Candidate | None = None
    miou: Interval | None = None
    boundary: Interval | None = None
    best: dict[str, tuple[Candidate, float]] = field(default_factory=dict)
    tried: int = 0
    left_out: int = 0  # images, for lack of time or memory
    damaged: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def accepted(self) -> bool:
        return self.miou is not None and bool(self.miou.low > 0)

    @property
    def verdict(self) -> str:
        """One line: whether the gain is real, and why not."""
        if self.chosen is None or self.miou is None:
            return "no refiner could be tried in the time given; give more --minutes"
        gain = f"{100 * self.miou.value:+.2f} points of mIoU ({100 * self.miou.low:+.2f} to {100 * self.miou.high:+.2f})"
        if self.accepted:
            return f"{self.chosen.words}: {gain}, which is real on {self.images} images"
        if not np.isfinite(self.miou.low):
            return f"{self.chosen.words}: {gain}; {self.images} image(s) tell nothing of others: the bundle stays as it is"
        why = "the interval holds zero" if self.miou.high > 0 else "it makes the labels worse"
        return f"{self.chosen.words}: {gain}; {why}, so the bundle stays as it is"

    def to_json(self) -> dict[str, Any]:
        """Plain types; None where there is no number."""
        return {
            "images": self.images,
            "candidates": self.tried,
            "miou_before": _plain(self.before),
            "miou_after": _plain(self.after),
            "miou_gain": _interval(self.miou),
            "boundary_f_before": _plain(self.boundary_before),
            "boundary_f_after": _plain(self.boundary_after),
            "boundary_f_gain": _interval(self.boundary),
            "accepted": self.accepted,
            "verdict": self.verdict,
            "chosen": None if self.chosen is None else {"name": self.chosen.name, "options": self.chosen.options},
            "best": {name: {"options": found.options, "miou": _plain(score)} for name, (found, score) in self.best.items()},
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
    minutes: float = 10.0,
    split: str = "val",
    write: bool = True,
    device: str | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Searches a refiner for a bundle on labelled images, and writes it into the bundle where its gain is real.

    Args:
        bundle: its path; rewritten in place, with the refiner, only where the interval of the gain in mIoU is above zero.
        images, masks: any layout that `perpixel check` understands.
        refiners: names in `REFINERS` to search among; None: all.
        minutes: wall-clock budget from this call; each refiner gets a like share of what the predictions leave.
        split: the part to search on; label costs are learned from the masks of the part "train".
        write: False only reports.
        device: where to compute; None: on the GPU where there is one.

    Raises:
        ValueError: an unknown refiner, no images in the part, or none that could be read.
    """
    start, refiners = time.monotonic(), list(REFINERS) if refiners is None else refiners
    for name in refiners:
        if name not in REFINERS:
            raise ValueError(f"unknown refiner {name!r}. Known: {', '.join(REFINERS)}")
    if not minutes > 0:
        raise ValueError(f"minutes is {minutes}; a search needs more than 0")
    path = Path(bundle)
    loaded = load_bundle(path, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    layout = find_layout(images, masks)
    pairs = split_pairs([pair for pair in layout.pairs if pair.mask is not None], loaded.card.val_fraction, loaded.card.split_seed)
    chosen = [pair for pair in pairs if pair.split == split]
    if not chosen:
        raise ValueError(f"{images}: no labelled images in the part '{split}' to tune on")
    data = LabelledImages(chosen, loaded.label_map, loaded.card.bands, loaded.card.dtype, cache=False)
    search = _Search(loaded, data, start + 60 * minutes * PREDICTING_SHARE, progress)
    costs = _learned_costs([pair.mask for pair in pairs if pair.split == "train"], loaded)
    deadline = start + 60 * minutes - search.closing_seconds()
    for number, name in enumerate(refiners):
        now = time.monotonic()
        search.explore(name, costs, now + (deadline - now) / (len(refiners) - number))
    result = search.result()
    result.damaged = {**layout.damaged, **search.damaged}
    result.seconds = time.monotonic() - start
    if write and result.accepted and result.chosen is not None:
        card = loaded.card.model_copy(
            # The temperature was that of other scores.
            update={
                "refiner": RefinerCard(name=result.chosen.name, options=result.chosen.options, gain=_gain(result)),
                "temperature": None,
            }
        )
        save_bundle(path, loaded.model.state_dict(), card)
    return result


class _Search:
    """Scores of the images, kept, and the counts of each candidate on each of them."""

    def __init__(self, bundle: Bundle, images: LabelledImages, until: float, progress: Progress | None) -> None:
        self.bundle, self.progress = bundle, progress
        self.ignore, self.classes = bundle.label_map.ignore, len(bundle.card.classes)
        self.scores: list[tuple[Tensor, Tensor, Tensor]] = []  # logits (1, K, H, W), image (1, C, H, W), labels (H, W)
        self.damaged: dict[str, str] = {}
        self.tables: dict[str, tuple[Candidate, np.ndarray]] = {}  # by its words and options: (N, K, 3) counts
        self.left_out = self._predict(images, until)
        if not self.scores:
            raise ValueError(f"none of {len(images)} images could be read. The first: {next(iter(self.damaged.values()))}")
        self.plain = self._counts(None)
        # Halves that alternate: neighbouring frames of a film fall into different ones, and both hold all of its parts.
        self.folds = [np.arange(len(self.scores)) % FOLDS == fold for fold in range(FOLDS)]

    @torch.inference_mode()
    def _predict(self, images: LabelledImages, until: float) -> int:
        """Keeps the scores of as many images as memory and time allow, at least one; returns how many it left out."""
        card, device = self.bundle.card, next(self.bundle.model.parameters()).device
        kept: list[tuple[int, tuple[Tensor, Tensor, Tensor]]] = []
        used = 0
        for place, index in enumerate(_evenly(len(images))):
            if kept and (used > MEMORY or time.monotonic() > until):
                break
            try:
                example = images[index]
            except ValueError as error:
                self.damaged[str(images.pairs[index].image)] = str(error)
                continue
            logits = predict_tiled(self.bundle.model, self.bundle.normalize(example.image.to(device)), card.tile, card.overlap).float()
            kept.append((index, (logits[None], example.image[None], example.labels)))
            used += logits.numel() * 4 + example.image.numel() * example.image.element_size() + example.labels.numel()
            self._say(place + 1, len(images), "predicting")
        self.scores = [scores for _, scores in sorted(kept, key=lambda entry: entry[0])]
        return len(images) - len(kept) - len(self.damaged)

    def closing_seconds(self) -> float:
        """About how long the boundary scores take in the end, without and with a refiner: twice those of one image for each."""
        start = time.monotonic()
        for _ in range(2):  # the first loads what is compiled
            start = time.monotonic()
            for _, labels, predicted in self._labelled(None, [0]):
                BoundaryF(self.classes).update(labels, predicted, ignore=self.ignore)
        return 2.5 * (time.monotonic() - start) * len(self.scores)

    def explore(self, name: str, costs: list[list[float]] | None, until: float) -> None:
        """Coarse grid, then what lies around the best, until time is over. The first candidate is always tried."""
        start = time.monotonic()
        coarse = list(coarse_grid(name, FULL_SCALE[self.bundle.card.dtype] / 255))
        thin = self._thinned(coarse[0], len(coarse), COARSE_SHARE * (until - start))
        ranked = []
        for number, candidate in enumerate(coarse):
            if number and time.monotonic() > start + COARSE_SHARE * (until - start):
                break
            ranked.append((self._miou(self._counts(candidate, thin).sum(0)), candidate))
            self._say(number + 1, len(coarse), f"{name}: coarse")
        ranked.sort(key=lambda entry: -entry[0])
        self._try(ranked[0][1])
        tried = 1
        for candidate in self._around(name, ranked, costs):
            if time.monotonic() > until:
                break
            tried += self._try(candidate)
            self._say(tried, tried + 1, f"{name}: fine")

    def _thinned(self, candidate: Candidate, count: int, seconds: float) -> list[int]:
        """Images for the coarse grid: all, or those at even distances that the time allows."""
        self._counts(candidate, [0])  # loads what is compiled
        start = time.monotonic()
        self._counts(candidate, [0])
        each = time.monotonic() - start
        step = max(1, int(np.ceil(len(self.scores) * each * count / max(seconds, 1e-9))))
        return list(range(0, len(self.scores), min(step, max(1, len(self.scores) // 4))))

    def _around(self, name: str, ranked: list[tuple[float, Candidate]], costs: list[list[float]] | None) -> Iterator[Candidate]:
        """Candidates near the best so far, nearer and nearer: those of each half of the images, of all, and the runners-up."""
        for _, candidate in ranked[1:3]:
            yield candidate
        for step in (2**0.5, 2**0.25):
            for centre in self._leaders(name):
                yield from neighbours(centre, step, costs)

    def _leaders(self, name: str) -> list[Candidate]:
        """The best candidate of this refiner on each half and on all images."""
        own = [entry for entry in self.tables.values() if entry[0].name == name]
        picks = [self._best(own, fold)[0] for fold in [*self.folds, np.ones(len(self.scores), bool)] if fold.any()]
        return list({candidate.key: candidate for candidate in picks}.values())

    def _try(self, candidate: Candidate) -> bool:
        """Counts a candidate on all images, once."""
        if candidate.key in self.tables:
            return False
        self.tables[candidate.key] = (candidate, self._counts(candidate))
        return True

    @torch.inference_mode()
    def _counts(self, candidate: Candidate | None, indices: Iterable[int] | None = None) -> np.ndarray:
        """(N, K, 3) tallies of the images, refined by the candidate or as they are."""
        region = Region(self.classes)
        for _, labels, predicted in self._labelled(candidate, indices):
            region.update(labels, predicted, ignore=self.ignore)
        return region.images.table

    def _labelled(self, candidate: Candidate | None, indices: Iterable[int] | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        refiner = None if candidate is None else self._built(candidate)
        for index in range(len(self.scores)) if indices is None else indices:
            logits, image, labels = self.scores[index]
            refined = logits if refiner is None else refiner(logits, image)
            yield index, labels, refined[0].argmax(0).cpu()

    def _built(self, candidate: Candidate) -> nn.Module:
        return build_refiner(candidate.name, candidate.options).to(self.scores[0][0].device)

    def _miou(self, tally: np.ndarray) -> float:
        return float(tallies.miou(tally))

    def _best(self, entries: Iterable[tuple[Candidate, np.ndarray]], images: np.ndarray) -> tuple[Candidate, np.ndarray]:
        """The candidate of the highest mIoU on some of the images, with its counts on all; the earlier of equals."""
        return max(entries, key=lambda entry: np.nan_to_num(self._miou(entry[1][images].sum(0)), nan=-1.0))

    def result(self) -> Tuning:
        """The gain by cross-validation, and the best on all images."""
        everything = np.ones(len(self.scores), bool)
        found = Tuning(len(self.scores), self._miou(self.plain.sum(0)), tried=len(self.tables), left_out=self.left_out)
        entries = list(self.tables.values())
        if not entries:
            return found
        found.chosen = self._best(entries, everything)[0]
        for name in {candidate.name for candidate, _ in entries}:
            own, table = self._best([entry for entry in entries if entry[0].name == name], everything)
            found.best[name] = (own, self._miou(table.sum(0)))
        held_out, boundary = self.plain.copy(), BoundaryF(self.classes)
        plain_boundary = BoundaryF(self.classes)
        for fold in self.folds:
            others = ~fold if (~fold).any() else fold
            winner, table = self._best(entries, others)
            held_out[fold] = table[fold]
            places = np.flatnonzero(fold).tolist()
            with torch.inference_mode():
                for into, candidate in ((boundary, winner), (plain_boundary, None)):
                    for index, labels, predicted in self._labelled(candidate, places):
                        into.update(labels, predicted, ignore=self.ignore, name=str(index))
        found.after = self._miou(held_out.sum(0))
        found.miou = difference(self.plain, held_out, tallies.miou)
        before, after = (values_table(score.per_image) for score in (plain_boundary, boundary))
        found.boundary = difference(before, after, value_mean)
        found.boundary_before, found.boundary_after = plain_boundary.score, boundary.score
        return found

    def _say(self, done: int, of: int, what: str) -> None:
        if self.progress is not None:
            self.progress(done, of, what)


def _evenly(count: int) -> list[int]:
    """0..count - 1 in an order of which every beginning is spread over the whole: that of the bits read backwards."""
    bits = max(1, (count - 1).bit_length())
    order = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits))
    return [index for index in order if index < count]


def _learned_costs(masks: Sequence[Any], bundle: Bundle) -> list[list[float]] | None:
    """Label costs of the training masks; None where there is nothing to learn them from."""
    label_map, classes = bundle.label_map, len(bundle.card.classes)
    if classes < 2:
        return None

    def readable() -> Iterator[np.ndarray]:
        for mask in masks:
            try:
                labels = label_map(read_mask(mask), str(mask))
            except ValueError:  # a damaged mask; training and `check` name it
                continue
            yield labels

    try:
        costs = fit_compatibility(readable(), classes, ignore=label_map.ignore)
    except ValueError:  # no training masks, or no two classes that touch
        return None
    return [[round(value, 4) for value in row] for row in costs.tolist()]


def _gain(result: Tuning) -> dict[str, Any]:
    return {key: value for key, value in result.to_json().items() if key.startswith(("miou", "boundary", "images"))}


def _interval(found: Interval | None) -> dict[str, float | None] | None:
    return None if found is None else {"value": _plain(found.value), "low": _plain(found.low), "high": _plain(found.high)}


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def render(result: Tuning, console: Console) -> None:
    """The search as a table for people."""
    title = f"{result.tried} candidates on {result.images} images"
    table = Table("refiner", "best options", "mIoU where it was searched", title=title)
    for name, (candidate, score) in sorted(result.best.items()):
        table.add_row(name, escape(candidate.words.removeprefix(name).strip()), f"{100 * score:.2f} %")
    console.print(table)
    for label, before, after, gain in (
        ("mIoU", result.before, result.after, result.miou),
        ("boundary F (BF)", result.boundary_before, result.boundary_after, result.boundary),
    ):
        if gain is not None:
            console.print(
                f"{label}: {100 * before:.2f} % without, {100 * after:.2f} % with a refiner, each half with what was best on the other: "
                f"[bold]{100 * gain.value:+.2f}[/] ({100 * gain.low:+.2f} to {100 * gain.high:+.2f} in {100 * gain.level:.0f} % of cases)"
            )
    if result.left_out:
        console.print(
            f"[yellow]{result.left_out} images were left out[/]: for lack of time or memory; more --minutes take more", soft_wrap=True
        )
    for why in result.damaged.values():
        console.print(f"[yellow]left out[/] {escape(why)}", soft_wrap=True)
    console.print(escape(result.verdict), soft_wrap=True)
