"""Scores of a model on a set: one streaming confusion matrix, the loss and counts of each image, the cost of the set, intervals.

What else can be asked for is in `scores.py`, the tables for people in `score_tables.py`.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from perpixel.blockwise import BlockScorer, Counted, scored
from perpixel.bundle import Bundle, load_bundle
from perpixel.data.class_names import refuse_other_names
from perpixel.data.dataset import LabelledImages
from perpixel.data.images import Picture
from perpixel.data.layouts import Pair, find_layout
from perpixel.data.transforms import Normalize
from perpixel.data.writing import replacing
from perpixel.metrics import ABSENT_RULES, Confusion, tallies
from perpixel.metrics.intervals import Interval, interval
from perpixel.metrics.measures import COST
from perpixel.metrics.region import Region
from perpixel.models.model import SegmentationModel
from perpixel.score_tables import render
from perpixel.scores import BLOCKWISE, DEFAULT_GROUPS, Observer, Scored, Scores, plain
from perpixel.segmenter import Segmenter
from perpixel.tiling import predict_tiled

__all__ = ["Evaluation", "Observer", "Scored", "evaluate", "render", "score"]

Progress = Callable[[int, int, str], None]  # (done, of, what)


@dataclass
class Evaluation:
    """What a set of labelled images says of a model."""

    region: Region  # the confusion matrix of the set, and the counts of each image that was scored
    classes: list[str]
    losses: dict[str, float] = field(default_factory=dict)  # image file -> its loss in nats per labelled pixel
    damaged: dict[str, str] = field(default_factory=dict)  # image file -> why it was left out, naming the file at fault
    holes: dict[str, list[str]] = field(default_factory=dict)  # image file -> damaged pieces of it or its mask, which do not count
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)  # what makes the scores doubtful
    scores: Scores | None = None  # of other kinds, where they were asked for
    absent: str = "union"  # the rule of every mean over classes, a key of `ABSENT_RULES`
    refined: str = "none"  # by which refiner the scores were
    precision: str = "float32"  # of the network
    augment: str = ""  # views whose scores were averaged
    _found: tuple[tuple[Any, ...], dict[str, Interval]] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def confusion(self) -> Confusion:
        """The confusion matrix of the set."""
        return self.region.confusion

    @property
    def cost(self) -> float:
        """The mean of the losses of the images; NaN of an empty set."""
        return sum(self.losses.values()) / len(self.losses) if self.losses else float("nan")

    def worst(self, count: int = 10) -> list[tuple[str, float]]:
        """The images with the largest loss, largest first; before them those whose loss is NaN."""
        return sorted(self.losses.items(), key=lambda item: (not math.isnan(item[1]), -item[1]))[:count]

    def intervals(self) -> dict[str, Interval]:
        """Score -> its 95 % interval by bootstrap over the images (1,000 resamples); "iou" is that of each class, (K,).

        They are computed once for the images, groups and rule that there are: tables, JSON and report all show them.
        """
        seen = (len(self.region.images), len(self.losses), self.scores, self.absent)
        if self._found is None or self._found[0] != seen:
            self._found = seen, self._resampled()
        return self._found[1]

    def _resampled(self) -> dict[str, Interval]:
        images, absent = self.region.images, self.absent

        whole, names = images.total, list(tallies.scores(images.total))

        def scores_of(sums: np.ndarray) -> np.ndarray:
            found = {name: tallies.of_resamples(mean, sums, whole, absent) for name, mean in tallies.MEANS.items()}
            found |= {"pixel_accuracy": tallies.pixel_accuracy(sums), "fwiou": tallies.fwiou(sums)}
            return np.concatenate([np.stack([found[name] for name in names], -1), tallies.iou(tallies.without_missed(sums, whole))], -1)

        count = int(images.table.any((1, 2)).sum())  # all but those of void alone
        holding = tallies.holding(images.table)
        of_all = count * np.eye(1, len(holding), dtype=np.int64)[0]  # scores that are no mean over classes rest on all images
        held = np.stack([*(holding if name in tallies.MEANS else of_all for name in names), *np.diag(holding)])
        every = interval(images.table, scores_of, held=held, bounds=(0, 1))
        value, low, high = (np.asarray(part) for part in (every.value, every.low, every.high))
        found = {name: Interval(value[k], low[k], high[k], every.level, count) for k, name in enumerate(names)}
        value, low, high = (part[len(names) :] for part in (value, low, high))
        found["iou"] = Interval(value, low, high, every.level, holding)
        losses = np.array(list(self.losses.values()))
        found["cost"] = COST.interval(losses if np.isfinite(losses).all() else np.full_like(losses, np.nan), absent)
        return found if self.scores is None else found | self.scores.intervals(absent)

    def to_json(self) -> dict[str, Any]:
        """Plain types: scores, the rule for absent classes, intervals, losses and cost; None where there is no number."""
        side_by_side = self.region.side_by_side(self.absent)
        return {
            "images": len(self.losses),
            **self.confusion.to_dict(self.classes, self.absent),
            "image_means": {name: plain(value) for name, value in side_by_side["images"].items()},
            "cost": plain(self.cost),
            "refined": self.refined,
            "precision": self.precision,
            "augment": self.augment,
            "intervals": {name: [plain(np.asarray(found.low)), plain(np.asarray(found.high))] for name, found in self.intervals().items()},
            **({} if self.scores is None else self.scores.to_json(self.absent)),
            "losses": {name: plain(loss) for name, loss in self.losses.items()},
            "worst": [name for name, _ in self.worst()],
            "warnings": self.warnings,
            "damaged": self.damaged,
            "holes": self.holes,
            "seconds": round(self.seconds, 3),
        }

    def to_file(self, path: Path | str) -> None:
        """Writes `to_json`, and under "per_image" the counts of each image and whether it was held whole, for `perpixel compare`.

        One line for each key: text for people and short for programs.
        """
        tables = {"region": self.region.images.table, **({} if self.scores is None else self.scores.tables())}
        images = self.region.images
        whole = [1] * len(images) if self.scores is None else [int(seen) for seen in self.scores.seen_whole]
        kept = [f'"names": {json.dumps(images.names)}', f'"whole": {json.dumps(whole)}']
        kept += [self._packed(name, table) for name, table in tables.items()]
        lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in self.to_json().items()]
        lines.append(f'"per_image": {{{", ".join(kept)}}}')
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")

    def _packed(self, name: str, table: np.ndarray) -> str:
        """One table as JSON, by itself: as Python's numbers all of them would take much memory. A shape of (K, 3) is not written."""
        rows, shape = tallies.packed(table), list(table.shape[1:])
        told = rows if shape == [len(self.classes), 3] else {"shape": shape, "rows": rows}
        return f"{json.dumps(name)}: {json.dumps(told, allow_nan=False)}"


@torch.inference_mode()
def score(
    model: SegmentationModel,
    images: LabelledImages,
    normalize: Normalize,
    classes: Sequence[str],
    tile: int,
    overlap: int | Literal["exact"],
    indices: Sequence[int] | None = None,
    progress: Progress | None = None,
    keep: Callable[[int, Tensor], None] | None = None,
    observers: Sequence[Observer] = (),
) -> Evaluation:
    """Scores of `model` (in eval mode) on the images of `indices`, one whole image at a time; tiles where one is larger than `tile`.

    `keep(index, labels)` receives each prediction (H, W), for pictures; each of `observers` is called once with every image scored. A
    damaged file is named in the result and left out.
    """
    device, ignore = next(model.parameters()).device, images.label_map.ignore
    result = Evaluation(Region(len(classes), device=device), list(classes))
    start, todo = time.monotonic(), list(range(len(images)) if indices is None else indices)
    for done, index in enumerate(todo):
        picture = images.pairs[index].image
        try:
            example = images[index]
        except ValueError as error:
            result.damaged[str(picture)] = str(error)
            continue
        logits = predict_tiled(model, normalize(example.image.to(device)), tile, overlap).float()
        seen = scored(picture, example.image, example.labels.to(device).long(), logits, ignore)
        predicted = _add(result, picture, seen, observers)
        if keep is not None:
            keep(index, predicted)
        if progress is not None:
            progress(done + 1, len(todo), example.name)
    result.seconds = time.monotonic() - start
    return result


def _add(result: Evaluation, picture: Picture, seen: Scored, observers: Sequence[Observer]) -> Tensor:
    """Add one whole image, and show it to the observers; its prediction (H, W)."""
    predicted = seen.logits.argmax(0)
    result.region.update(seen.labels, predicted, ignore=seen.ignore, name=str(picture))
    if (seen.labels != seen.ignore).any():
        result.losses[str(picture)] = seen.loss
    for observe in observers:
        observe(seen)
    return predicted


@torch.inference_mode()
def _scored_by(scorer: BlockScorer, pairs: Sequence[Pair], observers: Sequence[Observer], progress: Progress) -> Evaluation:
    """Scores of images of any size, whole ones and large ones."""
    names = scorer.segmenter.classes
    result, start = Evaluation(Region(len(names), device=scorer.segmenter.device), list(names)), time.monotonic()
    for done, pair in enumerate(pairs):
        name = str(pair.image)
        try:
            seen = scorer(pair, partial(progress, done, len(pairs)))
        except ValueError as error:
            result.damaged[name] = str(error)
            continue
        if isinstance(seen, Counted):
            result.region.add(seen.confusion, name)
            if seen.confusion.pixels:
                result.losses[name] = seen.loss
        else:
            _add(result, pair.image, seen, observers)
        progress(done + 1, len(pairs), pair.image.name)
    result.holes = scorer.holes
    if scorer.streamed:
        result.warnings.append(_left_out(scorer, len(observers) > 1))
    result.seconds = time.monotonic() - start
    return result


def _left_out(scorer: BlockScorer, watched: bool) -> str:
    """What a set with large images is not scored by."""
    lacking = [name for name in scorer.gathered.groups if name not in BLOCKWISE]
    lacking += ["pictures and samples (report, calibrate)"] if watched else []
    many = (
        "1 image is too large to be held whole and was"
        if scorer.streamed == 1
        else f"{scorer.streamed} images are too large to be held whole and were"
    )
    return f"{many} scored block by block" + (f"; left out of: {', '.join(lacking)}" if lacking else "")


def evaluate(
    bundle: Bundle | Path | str,
    images: Path | str,
    masks: Path | str | None = None,
    *,
    split: str | None = None,
    labels: Mapping[int, int] | None = None,
    device: str | None = None,
    refine: str = "bundle",
    precision: str = "float32",
    augment: str = "",
    progress: Progress | None = None,
    scores: Sequence[str] = DEFAULT_GROUPS,
    absent: str = "union",
    inside: str | None = None,
    observers: Sequence[Observer] = (),
) -> Evaluation:
    """Scores of a bundle on a folder of images and masks, of any size, by the engine of `predict`.

    Images too large to be held whole (`blockwise.WHOLE_BYTES`, `WHOLE_PIXELS`) are scored block by block at constant memory: they count in
    region scores, losses, cost shares and calibration, and neither in other groups nor for observers; `warnings` says so.

    Args:
        bundle: a loaded bundle or its path.
        images, masks: any layout that `perpixel check` understands.
        split: score only this part ("train", "val", "test"). None: "val" where the layout has a part for training or validation, else
            everything. A part that the layout leaves open is made as `perpixel train` makes it.
        labels: mask value -> class index or 255, over the bundle's own label map.
        device: where a bundle given as a path runs; None: on the GPU where there is one.
        refine: "bundle": by the refiner in the bundle, if it has one; "none"; or the name of a refiner, with its default options.
        precision: "float32", or "bf16": the network computes as `predict --precision bf16` does.
        augment: "flips,rotations,scales", or some of them: as `predict --tta`.
        scores: what to gather beside the region scores, of `scores.GROUPS`.
        absent: the rule for absent classes in every mean, of `ABSENT_RULES`.
        inside: the class that neurite scores take for the inside of cells; None: the last.
        observers: each is called once with every image that was scored as a whole (`Scored`), in order.

    Raises:
        ValueError: an unknown score, rule or class, class names of the set that are not the bundle's, nothing to score, or no file could
            be read.
    """
    if not isinstance(bundle, Bundle):
        bundle = load_bundle(Path(bundle), device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if absent not in ABSENT_RULES:
        raise ValueError(f"absent is {absent!r}; the rules for absent classes are {', '.join(ABSENT_RULES)}")
    card = bundle.card
    gathered = Scores(scores, card.classes, bundle.temperature(refine), inside)
    layout = find_layout(images, masks)
    if layout.classes_file is not None:
        refuse_other_names(layout.classes_file, card.classes, bundle.label_map, labels or {})
    pairs = layout.labelled(split, card.val_fraction, card.split_seed)
    scorer = BlockScorer(Segmenter(bundle, refine, precision, augment), bundle.relabelled(labels or {}), gathered)
    result = _scored_by(scorer, pairs, [gathered, *observers], progress or (lambda *_: None))
    result.scores, result.absent, result.refined = gathered, absent, bundle.refiner_words(refine)
    result.precision, result.augment = precision, augment
    result.damaged = {file: why if file in why else f"{file}: {why}" for file, why in {**layout.damaged, **result.damaged}.items()}
    if not result.losses:
        first = next(iter(result.damaged.values()), "none of them has a labelled pixel")
        raise ValueError(f"{images}: none of {len(pairs)} images could be scored. The first: {first}")
    seen = [name for name, pixels in zip(card.classes, result.confusion.counts.sum(1).tolist(), strict=True) if pixels]
    if len(seen) == 1 < len(card.classes):
        result.warnings.append(
            f"the masks hold nothing but '{seen[0]}' under the bundle's label map: were they made for these classes? See --label"
        )
    predicted = [name for name, pixels in zip(card.classes, result.confusion.counts.sum(0).tolist(), strict=True) if pixels]
    if len(predicted) == 1 < len(seen):
        result.warnings.append(
            f"the model labels everything '{predicted[0]}': it has learned nothing yet, and its probabilities mean little"
        )
    return result
