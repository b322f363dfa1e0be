"""Search: what each candidate for a refiner makes of a bundle's scores, image by image.

From coarse to fine, as DeepLab's search goes (arXiv:1412.7062, section 5.1).
"""

import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from perpixel.bundle import Bundle
from perpixel.data.dataset import LabelledImages
from perpixel.data.images import Picture
from perpixel.data.masks import LabelMap, read_mask
from perpixel.metrics import tallies
from perpixel.metrics.boundary import BoundaryF
from perpixel.metrics.intervals import value_mean, values_table
from perpixel.metrics.region import Region
from perpixel.metrics.segments import overlaps, segments_of, v_rand
from perpixel.refinement.candidates import Candidate, Costs, coarse_grid, defaults, neighbours, with_costs
from perpixel.refinement.compatibility import fit_compatibility
from perpixel.tiling import predict_tiled

Progress = Callable[[int, int, str], None]  # (done, of, what)
Entry = tuple[Candidate, np.ndarray]  # with its tallies
Halves = frozenset[int]

MEMORY = 4 * 2**30  # bytes of scores that are kept; images beyond are left out, as are those beyond the share of time for predictions
FOLDS = 2
NEITHER, BOTH = frozenset[int](), frozenset(range(FOLDS))
COARSE_SHARE = 0.5  # of a refiner's time for the coarse grid; the rest is for what lies around the best of it
STRIP = 5  # pixels: void strips between objects are narrower


class Aim(Protocol):
    """What a search makes higher: a score of label images.

    Attributes:
        name: in files; words: for people; title: with what it is taken over.
    """

    @property
    def name(self) -> str: ...
    @property
    def words(self) -> str: ...
    @property
    def title(self) -> str: ...

    def tally(self, labels: Tensor, predicted: Tensor, ignore: int) -> np.ndarray:
        """What is counted of one image: labels (H, W), those predicted, and the label that does not count."""

    def score(self, sums: np.ndarray) -> np.ndarray:
        """Of tallies summed over images (..., *shape of one) -> (...); NaN where they give none."""


@dataclass(frozen=True)
class MeanIou:
    """Mean IoU over the classes in the truth.

    By this rule both sides of a comparison are means over the same classes in every resample: a few pixels of a class that is nowhere in
    the truth would otherwise count as a whole class.
    """

    classes: int
    name: ClassVar[str] = "miou"
    words: ClassVar[str] = "mIoU"
    title: ClassVar[str] = "mIoU over the classes in the truth"

    def tally(self, labels: Tensor, predicted: Tensor, ignore: int) -> np.ndarray:
        """(K, 3) of an image."""
        region = Region(self.classes)
        region.update(labels, predicted, ignore=ignore)
        return region.images.table[0]

    def score(self, sums: np.ndarray) -> np.ndarray:
        """(...) of (..., K, 3)."""
        return tallies.miou(sums, absent="truth")


@dataclass(frozen=True)
class VRand:
    """V_rand of the objects that a class lies between, the mean of the images that have any; as `evaluate --scores neurite`."""

    between: int
    class_name: str
    name: ClassVar[str] = "v_rand"
    words: ClassVar[str] = "V_rand"

    @property
    def title(self) -> str:
        return f"V_rand of what '{self.class_name}' lies between, mean of the images"

    def tally(self, labels: Tensor, predicted: Tensor, ignore: int) -> np.ndarray:
        """(2,) of an image: its value, and whether it has one."""
        known = labels != ignore
        truth, guess = (segments_of((each != self.between) & known) for each in (labels, predicted))
        return values_table(np.array(v_rand(overlaps(truth, guess)).score))

    def score(self, sums: np.ndarray) -> np.ndarray:
        """(...) of (..., 2)."""
        return value_mean(sums)


class Search:
    """Scores of the images, kept, and what is counted of each candidate on each of them.

    Attributes:
        aim: by which candidates are ranked.
        scores: logits (1, K, H, W), image (1, C, H, W) and labels (H, W) of each image.
        plain: (N, ...) tallies of the images without a refiner.
        tables: the candidates tried, each with its tallies, by their keys.
        folds: (N,) which images belong to each half.
        found_on: the halves without which a candidate would not have been come to, by its key; none where it is absent.
    """

    def __init__(self, bundle: Bundle, images: LabelledImages, until: float, progress: Progress | None, aim: Aim) -> None:
        self.bundle, self.progress, self.aim = bundle, progress, aim
        self.ignore, self.classes = images.label_map.ignore, len(bundle.card.classes)
        self.scores: list[tuple[Tensor, Tensor, Tensor]] = []
        self.damaged: dict[str, str] = {}
        self.tables: dict[str, Entry] = {}
        self.found_on: dict[str, Halves] = {}
        self.left_out = self._predict(images, until)
        if not self.scores:
            raise ValueError(f"none of {len(images)} images could be read. The first: {next(iter(self.damaged.values()))}")
        self.plain = self.counts(None)
        # The first half and the second: neighbouring frames of a film or slices of a stack, which are much alike, fall into the same one.
        self.folds = [np.arange(len(self.scores)) * FOLDS // len(self.scores) == fold for fold in range(FOLDS)]

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
            for _, labels, predicted in self.labelled(None, [0]):
                BoundaryF(self.classes).update(labels, predicted, ignore=self.ignore)
        return 2.5 * (time.monotonic() - start) * len(self.scores)

    def explore(
        self, name: str, costs: Costs | None, until: float, *, only_learned: bool = False, stated: Mapping[str, Any] | None = None
    ) -> None:
        """The refiner's defaults, a coarse grid, then what lies around the best, until time is over. The defaults are always tried.

        `costs` are tried beside Potts', or with `only_learned` in every candidate; options that are `stated` all have.
        """
        start = time.monotonic()
        coarse = [defaults(name, self.bundle.full_scale / 255), *coarse_grid(name, self.bundle.full_scale / 255)]
        if only_learned and costs is not None:
            coarse = [with_costs(candidate, costs) for candidate in coarse]
        coarse = [_with(candidate, stated) for candidate in coarse]
        thin = self._thinned(coarse[0], len(coarse), COARSE_SHARE * (until - start))
        ranked = []
        for number, candidate in enumerate(coarse):
            if number and time.monotonic() > start + COARSE_SHARE * (until - start):
                break
            ranked.append((candidate, self.counts(candidate, thin)))
            self._say(number + 1, len(coarse), f"{name}: coarse")
        tried = int(self.attempt(coarse[0]))
        orders = {looked: sorted(ranked, key=partial(self._loss, images=images[thin])) for looked, images in self._views().items()}
        for looked, order in orders.items():
            tried += self.attempt(order[0][0], looked)
        for candidate, looked in self._around(name, orders, costs, only_learned, stated):
            if candidate.key not in self.tables and time.monotonic() > until:
                break
            tried += self.attempt(candidate, looked)
            self._say(tried, tried + 1, f"{name}: fine")

    def _thinned(self, candidate: Candidate, count: int, seconds: float) -> list[int]:
        """Images for the coarse grid: all, or those at even distances that the time allows."""
        self.counts(candidate, [0])  # loads what is compiled
        start = time.monotonic()
        self.counts(candidate, [0])
        each = time.monotonic() - start
        step = max(1, int(np.ceil(len(self.scores) * each * count / max(seconds, 1e-9))))
        return list(range(0, len(self.scores), min(step, max(1, len(self.scores) // 4))))

    def _views(self) -> dict[Halves, np.ndarray]:
        """What a search looks at: each half of the images by itself, and all of them."""
        views = {frozenset([half]): fold for half, fold in enumerate(self.folds) if fold.any()}
        return views | {BOTH: np.ones(len(self.scores), bool)}

    def _around(
        self,
        name: str,
        orders: Mapping[Halves, Sequence[Entry]],
        costs: Costs | None,
        only_learned: bool,
        stated: Mapping[str, Any] | None,
    ) -> Iterator[tuple[Candidate, Halves]]:
        """The runners-up and what lies around the best so far, nearer and nearer; each with the halves looked at, which take turns."""
        yield from _in_turns({looked: [candidate for candidate, _ in order[1:3]] for looked, order in orders.items()})
        for step in (2**0.5, 2**0.25):
            around = {}
            for looked, images in self._views().items():
                own = [entry for entry in self._found_within(looked, self.tables.values()) if entry[0].name == name]
                centre = self.best([entry for entry in own if entry[0].learned or not only_learned], images)[0]
                around[looked] = [_with(candidate, stated) for candidate in neighbours(centre, step, costs)]
            yield from _in_turns(around)

    def _found_within(self, halves: Halves, entries: Iterable[Entry]) -> list[Entry]:
        """The candidates that can be come to by looking at these halves alone."""
        return [entry for entry in entries if self.found_on.get(entry[0].key, NEITHER) <= halves]

    def attempt(self, candidate: Candidate, looked: Halves = NEITHER) -> bool:
        """Counts a candidate on all images, once; `looked` are the halves that led to it, this time."""
        self.found_on[candidate.key] = looked & self.found_on.get(candidate.key, BOTH)
        if candidate.key in self.tables:
            return False
        self.tables[candidate.key] = (candidate, self.counts(candidate))
        return True

    def forget(self) -> None:
        """Drops the candidates tried, for another search on the same scores."""
        self.tables.clear()
        self.found_on.clear()

    def counts(self, candidate: Candidate | None, indices: Iterable[int] | None = None) -> np.ndarray:
        """(N, ...) tallies of the images, refined by the candidate or as they are."""
        return np.stack([self.aim.tally(labels, predicted, self.ignore) for _, labels, predicted in self.labelled(candidate, indices)])

    def labelled(self, candidate: Candidate | None, indices: Iterable[int] | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        refiner = None if candidate is None else self.bundle.built_refiner(candidate.name, candidate.options)
        for index in range(len(self.scores)) if indices is None else indices:
            logits, image, labels = self.scores[index]
            # A candidate that does not converge is judged by what it gives, as it would be in use; a warning for each says nothing more.
            with torch.inference_mode(), warnings.catch_warnings(action="ignore", category=RuntimeWarning):
                refined = logits if refiner is None else refiner(logits, image)
            yield index, labels, refined[0].argmax(0).cpu()

    def best(self, entries: Iterable[Entry], images: np.ndarray) -> Entry:
        """The candidate of the highest score on some of the images, with its counts on all; the earlier of equals."""
        return min(entries, key=partial(self._loss, images=images))

    def cross_fitted(self, entries: Sequence[Entry]) -> list[Entry]:
        """For each half, the candidate that is best on the other half, with its counts on all images.

        Only of those that were found without a look at the half itself: one found because it suits a half is no fair pick for it,
        whichever half picks it.
        """
        return [
            self.best(self._found_within(BOTH - {half}, entries), ~fold if (~fold).any() else fold) for half, fold in enumerate(self.folds)
        ]

    def _loss(self, entry: Entry, images: np.ndarray) -> float:
        """Minus the score on some of the images; where it has none, more than any."""
        return -float(np.nan_to_num(self.aim.score(entry[1][images].sum(0)), nan=-1.0))

    def _say(self, done: int, of: int, what: str) -> None:
        if self.progress is not None:
            self.progress(done, of, what)


def _with(candidate: Candidate, stated: Mapping[str, Any] | None) -> Candidate:
    return replace(candidate, options={**candidate.options, **(stated or {})})


def _in_turns(candidates: Mapping[Halves, Sequence[Candidate]]) -> Iterator[tuple[Candidate, Halves]]:
    """One of each view, then the next: so that time is shared, and what several views agree on is soon open to all halves."""
    for turn in itertools.zip_longest(*candidates.values()):
        yield from ((candidate, looked) for looked, candidate in zip(candidates, turn, strict=True) if candidate is not None)


def _evenly(count: int) -> list[int]:
    """0..count - 1 in an order of which every beginning is spread over the whole: that of the bits read backwards."""
    bits = max(1, (count - 1).bit_length())
    order = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits))
    return [index for index in order if index < count]


def learned_costs(masks: Sequence[Picture], label_map: LabelMap, classes: int) -> Costs | None:
    """Label costs of the training masks, across the void strips between objects where there are such; None if nothing is to be learned."""
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
        distance = _border_distance(itertools.islice(readable(), 50), label_map.ignore)
        costs = fit_compatibility(readable(), classes, distance=distance, ignore=label_map.ignore)
    except ValueError:  # no training masks, or no two classes that touch
        return None
    return [[round(value, 4) for value in row] for row in costs.tolist()]


def _border_distance(masks: Iterable[np.ndarray], ignore: int) -> int:
    """At which distance labels meet, in pixels: 1, or across a strip of void that has more borders than the labels have with each other."""
    touching = strips = 0
    for labels in masks:
        for near, far in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
            differ, void = near != far, (near == ignore) | (far == ignore)
            touching += int((differ & ~void).sum())
            strips += int((differ & void).sum()) // 2  # a strip has two sides
    return STRIP if strips > touching else 1
