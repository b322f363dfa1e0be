"""Scores of a model on a set: one streaming confusion matrix, the loss of each image, the cost of the set."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from perpixel.bundle import Bundle, Card, load_bundle
from perpixel.data.dataset import LabelledImages
from perpixel.data.layouts import Layout, Pair, find_layout, split_pairs
from perpixel.data.masks import IGNORE, LabelMap
from perpixel.data.transforms import Normalize
from perpixel.losses import cross_entropy
from perpixel.metrics import ABSENT_RULE, Confusion
from perpixel.models.model import SegmentationModel
from perpixel.tiling import predict_tiled

Progress = Callable[[int, int, str], None]  # (done, of, what)


@dataclass
class Evaluation:
    """What a set of labelled images says of a model."""

    confusion: Confusion
    classes: list[str]
    losses: dict[str, float] = field(default_factory=dict)  # image file -> its loss in nats per labelled pixel
    damaged: dict[str, str] = field(default_factory=dict)  # image file -> why it was left out, naming the file at fault
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)  # what makes the scores doubtful

    @property
    def cost(self) -> float:
        """The mean of the losses of the images; NaN of an empty set."""
        return sum(self.losses.values()) / len(self.losses) if self.losses else float("nan")

    def worst(self, count: int = 10) -> list[tuple[str, float]]:
        """The images with the largest loss, largest first."""
        return sorted(self.losses.items(), key=lambda item: -item[1])[:count]

    def to_json(self) -> dict[str, Any]:
        """Plain types: scores, the rule for absent classes, the loss of each image and the cost; None where a number is not finite."""
        return {
            "images": len(self.losses),
            **self.confusion.to_dict(self.classes),
            "cost": self.cost if math.isfinite(self.cost) else None,
            "losses": {name: loss if math.isfinite(loss) else None for name, loss in self.losses.items()},
            "worst": [name for name, _ in self.worst()],
            "warnings": self.warnings,
            "damaged": self.damaged,
            "seconds": round(self.seconds, 3),
        }


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
    refiner: nn.Module | None = None,
) -> Evaluation:
    """Scores of `model` (in eval mode) on the images of `indices`, one whole image at a time; tiles where one is larger than `tile`.

    `keep(index, labels)` receives each prediction (H, W), for pictures; `refiner` turns logits (N, K, H, W) and the image as read into
    better ones. A damaged file is named in the result and left out.
    """
    device = next(model.parameters()).device
    result = Evaluation(Confusion(len(classes), device=device), list(classes))
    start, todo = time.monotonic(), list(range(len(images)) if indices is None else indices)
    for done, index in enumerate(todo):
        try:
            example = images[index]
        except ValueError as error:
            result.damaged[str(images.pairs[index].image)] = str(error)
            continue
        logits = predict_tiled(model, normalize(example.image.to(device)), tile, overlap).float()
        if refiner is not None:
            logits = refiner(logits[None], example.image[None])[0]
        labels = example.labels.to(device).long()
        predicted = logits.argmax(0)
        result.confusion.update(labels, predicted, ignore=images.label_map.ignore)
        if (labels != images.label_map.ignore).any():
            result.losses[str(images.pairs[index].image)] = cross_entropy(logits[None], labels[None], ignore=images.label_map.ignore).item()
        if keep is not None:
            keep(index, predicted)
        if progress is not None:
            progress(done + 1, len(todo), example.name)
    result.seconds = time.monotonic() - start
    return result


def evaluate(
    bundle: Bundle | Path | str,
    images: Path | str,
    masks: Path | str | None = None,
    *,
    split: str | None = None,
    labels: Mapping[int, int] | None = None,
    device: str | None = None,
    refine: str = "bundle",
    progress: Progress | None = None,
) -> Evaluation:
    """Scores of a bundle on a folder of images and masks.

    Args:
        bundle: a loaded bundle or its path.
        images, masks: any layout that `perpixel check` understands.
        split: score only this part ("train", "val", "test"). None: "val" where the layout has a part for training or validation, else
            everything. A part that the layout leaves open is made as `perpixel train` makes it.
        labels: mask value -> class index or 255, over the bundle's own label map.
        device: where a bundle given as a path runs; None: on the GPU where there is one.
        refine: "bundle": by the refiner in the bundle, if it has one; "none"; or the name of a refiner, with its default options.

    Raises:
        ValueError: nothing to score, or no file could be read.
    """
    if not isinstance(bundle, Bundle):
        bundle = load_bundle(Path(bundle), device or ("cuda" if torch.cuda.is_available() else "cpu"))
    card = bundle.card
    layout = find_layout(images, masks)
    pairs = _pairs(layout, split, card, str(images))
    data = LabelledImages(pairs, _label_map(bundle, labels or {}), card.bands, card.dtype, cache=False)
    result = score(
        bundle.model, data, bundle.normalize, card.classes, card.tile, card.overlap, progress=progress, refiner=bundle.refiner(refine)
    )
    result.damaged = {file: why if file in why else f"{file}: {why}" for file, why in {**layout.damaged, **result.damaged}.items()}
    if not result.losses:
        first = next(iter(result.damaged.values()), "none of them has a labelled pixel")
        raise ValueError(f"{images}: none of {len(pairs)} images could be scored. The first: {first}")
    seen = [name for name, pixels in zip(card.classes, result.confusion.counts.sum(1).tolist(), strict=True) if pixels]
    if len(seen) == 1 < len(card.classes):
        result.warnings.append(
            f"the masks hold nothing but '{seen[0]}' under the bundle's label map: were they made for these classes? See --label"
        )
    return result


def _label_map(bundle: Bundle, labels: Mapping[int, int]) -> LabelMap:
    """The bundle's own label map, with `labels` (255 to ignore) over it."""
    own, last = bundle.label_map, len(bundle.card.classes) - 1
    for value, label in labels.items():
        if label not in (*range(last + 1), IGNORE, own.ignore):
            raise ValueError(f"label {value}={label}: the bundle has no class {label}, only 0 to {last}. Give one of these, or 'ignore'.")
    given = {value: own.ignore if label == IGNORE and last < IGNORE else label for value, label in labels.items()}
    return LabelMap({**own.values, **given}, own.rgb, own.nearest, own.ignore)


def _pairs(layout: Layout, split: str | None, card: Card, images: str) -> list[Pair]:
    """The labelled pairs to score. Where the set has no part for validation, it is split as the bundle's training split it."""
    pairs = [pair for pair in layout.pairs if pair.mask is not None]
    if split is None and any(pair.split in ("train", "val") for pair in pairs):
        split = "val"
    if split is not None:
        pairs = split_pairs(pairs, card.val_fraction, card.split_seed)
        parts = sorted({str(pair.split) for pair in pairs if pair.split})
        pairs = [pair for pair in pairs if pair.split == split]
        if not pairs:
            raise ValueError(f"{images}: no images in the part '{split}'. Parts here: {', '.join(parts)}.")
    if not pairs:
        raise ValueError(f"{images}: no image with a mask was found, so there is nothing to score.")
    return pairs


def render(result: Evaluation, console: Console) -> None:
    """The scores as tables for people."""
    matrix = result.confusion
    table = Table("class", "accuracy", "IoU", "Dice", "share of pixels", title=f"{len(result.losses)} images")
    share = matrix.counts.sum(1) / matrix.counts.sum().clamp(min=1)
    for name, *values in zip(result.classes, matrix.class_accuracy, matrix.iou, matrix.dice, share, strict=True):
        table.add_row(escape(name), *(_percent(float(value)) for value in values))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print(
        f"pixel accuracy [bold]{_percent(matrix.pixel_accuracy)}[/]   mean accuracy {_percent(matrix.mean_accuracy)}   "
        f"mIoU [bold]{_percent(matrix.miou)}[/]   frequency-weighted IoU {_percent(matrix.fwiou)}   mean Dice {_percent(matrix.mean_dice)}"
    )
    console.print(f"[dim]One matrix over the whole set. {ABSENT_RULE}[/]")
    console.print(f"cost {result.cost:.4f} (mean of the images' cross-entropy, nats per pixel). Largest losses:")
    for name, loss in result.worst():
        console.print(f"  {loss:8.4f}  {escape(name)}", soft_wrap=True)
    for doubt in result.warnings:
        console.print(f"[yellow]warning:[/] {escape(doubt)}", soft_wrap=True)
    for why in result.damaged.values():
        console.print(f"[yellow]left out[/] {escape(why)}", soft_wrap=True)


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.1f} %"
