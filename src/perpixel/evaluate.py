"""Scores of a model on a set: one streaming confusion matrix, the loss of each image, the cost of the set."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from perpixel.bundle import Bundle, load_bundle
from perpixel.data.dataset import LabelledImages
from perpixel.data.layouts import Pair, find_layout, split_pairs
from perpixel.data.masks import LabelMap
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
    losses: dict[str, float] = field(default_factory=dict)  # image name -> its loss in nats per labelled pixel
    damaged: dict[str, str] = field(default_factory=dict)  # file -> why it was left out
    seconds: float = 0.0

    @property
    def cost(self) -> float:
        """The mean of the losses of the images; NaN of an empty set."""
        return sum(self.losses.values()) / len(self.losses) if self.losses else float("nan")

    def worst(self, count: int = 10) -> list[tuple[str, float]]:
        """The images with the largest loss, largest first."""
        return sorted(self.losses.items(), key=lambda item: -item[1])[:count]

    def to_json(self) -> dict[str, Any]:
        """Plain types: scores, the rule for absent classes, the loss of each image and the cost."""
        return {
            "images": len(self.losses),
            **self.confusion.to_dict(self.classes),
            "cost": self.cost,
            "losses": self.losses,
            "worst": [name for name, _ in self.worst()],
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
    overlap: int,
    indices: Sequence[int] | None = None,
    progress: Progress | None = None,
    keep: Callable[[int, Tensor], None] | None = None,
) -> Evaluation:
    """Scores of `model` (in eval mode) on the images of `indices`, one whole image at a time; tiles where one is larger than `tile`.

    `keep(index, labels)` receives each prediction (H, W), for pictures. A damaged file is named in the result and left out.
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
        labels = example.labels.to(device).long()
        predicted = logits.argmax(0)
        result.confusion.update(labels, predicted, ignore=images.label_map.ignore)
        if (labels != images.label_map.ignore).any():
            result.losses[example.name] = cross_entropy(logits[None], labels[None], ignore=images.label_map.ignore).item()
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
    device: str = "cpu",
    progress: Progress | None = None,
) -> Evaluation:
    """Scores of a bundle on a folder of images and masks.

    Args:
        bundle: a loaded bundle or its path.
        images, masks: any layout that `perpixel check` understands.
        split: score only this part ("train", "val", "test"). None: the "val" part where the layout has parts, everything where it has none.
        labels: mask value -> class index or 255, over the bundle's own label map.

    Raises:
        ValueError: nothing to score, or no file could be read.
    """
    bundle = bundle if isinstance(bundle, Bundle) else load_bundle(Path(bundle), device)
    pairs = _pairs(Path(images), None if masks is None else Path(masks), split)
    label_map = bundle.label_map
    if labels:
        label_map = LabelMap({**label_map.values, **labels}, label_map.rgb, label_map.nearest)
    data = LabelledImages(pairs, label_map, bundle.card.bands, bundle.card.dtype, cache=False)
    card = bundle.card
    result = score(bundle.model, data, bundle.normalize, card.classes, card.tile, card.overlap, progress=progress)
    if not result.losses:
        first = next(iter(result.damaged.values()), "none of them has a labelled pixel")
        raise ValueError(f"{images}: none of {len(pairs)} images could be scored. The first: {first}")
    return result


def _pairs(images: Path, masks: Path | None, split: str | None) -> list[Pair]:
    """The labelled pairs to score; a set without parts is split just as `perpixel train` splits it when a part is asked for."""
    pairs = [pair for pair in find_layout(images, masks).pairs if pair.mask is not None]
    if any(pair.split for pair in pairs):
        split = split or "val"
    elif split is not None:
        pairs = split_pairs(pairs)
    if split is not None:
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
        table.add_row(name, *(_percent(float(value)) for value in values))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print(
        f"pixel accuracy [bold]{_percent(matrix.pixel_accuracy)}[/]   mean accuracy {_percent(matrix.mean_accuracy)}   "
        f"mIoU [bold]{_percent(matrix.miou)}[/]   frequency-weighted IoU {_percent(matrix.fwiou)}   mean Dice {_percent(matrix.mean_dice)}"
    )
    console.print(f"[dim]One matrix over the whole set; {ABSENT_RULE}[/]")
    console.print(f"cost {result.cost:.4f} (mean of the images' cross-entropy, nats per pixel). Largest losses:")
    for name, loss in result.worst():
        console.print(f"  {loss:8.4f}  {name}")
    for file, why in result.damaged.items():
        console.print(f"[yellow]left out[/] {file}: {why}")


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.1f} %"
