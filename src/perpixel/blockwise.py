"""One image with its mask, of any size, scored by the engine of `predict`: as a whole where that fits, else block by block."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from perpixel.data.dataset import mask_of, refuse_other_size
from perpixel.data.images import Picture
from perpixel.data.label_windows import Labels, LabelSource
from perpixel.data.layouts import Pair
from perpixel.data.masks import LabelMap
from perpixel.data.mosaics import Block
from perpixel.data.sources import open_page
from perpixel.data.windows import hole_lines
from perpixel.losses import cross_entropy
from perpixel.metrics import Confusion
from perpixel.scores import CostShares, Reliability, Scored, Scores, band_width, near_change, pixel_losses
from perpixel.segmenter import Segmenter
from perpixel.streaming import ROWS, WAITING, Region, Streamer, ahead

WHOLE_BYTES = 2**30  # of an image's scores (K, H, W) in float32; scores of boundaries and calibration take a few times that
WHOLE_PIXELS = 2**24  # of an image of few classes: scores of boundaries hold many numbers a pixel; 4000 x 4000 take 3.3 GB in all


def scored(picture: Picture, pixels: Tensor, labels: Tensor, logits: Tensor, ignore: int) -> Scored:
    """A whole image with its loss; see `Scored`."""
    known = bool((labels != ignore).any())
    loss = cross_entropy(logits[None], labels[None], ignore=ignore).item() if known else float("nan")
    return Scored(picture.name, picture.path, pixels, labels, logits, loss, ignore)


def fits(size: tuple[int, int], classes: int) -> bool:
    """Whether an image of (height, width) is held whole, with its scores."""
    pixels = size[0] * size[1]
    return pixels <= WHOLE_PIXELS and 4 * classes * pixels <= WHOLE_BYTES


@dataclass(frozen=True)
class Counted:
    """What is kept of an image that was scored block by block."""

    confusion: Confusion
    loss: float  # mean cross-entropy of its labelled pixels in nats; NaN where none is labelled


@dataclass
class BlockScorer:
    """Scores images one after the other, whole ones for observers and large ones into `gathered`.

    Attributes:
        segmenter: the bundle in use; tiles, blocks and refiner are those of its `predict`.
        label_map: of the masks.
        gathered: the scores asked for; a large image adds to its cost shares and calibration.
        holes: image file -> damaged pieces of it or its mask, whose pixels do not count.
        streamed: number of images that were scored block by block.
    """

    segmenter: Segmenter
    label_map: LabelMap
    gathered: Scores
    holes: dict[str, list[str]] = field(default_factory=dict)
    streamed: int = 0

    def __call__(self, pair: Pair, progress: Callable[[str], None]) -> Scored | Counted:
        """The image with logits and labels, or the counts of a large one; `progress` is told of each of its blocks.

        Raises:
            ValueError: a file cannot be read, sizes differ, or values are not as the bundle expects.
        """
        mask, name = mask_of(pair), str(pair.image)
        source = open_page(pair.image)
        try:
            labels = LabelSource(mask, self.label_map)
            try:
                refuse_other_size(pair, source.size, labels.size)
                image = _Image(pair, self.segmenter.streamer(source, name), labels)
                found = self._whole(image) if fits(source.size, len(self.segmenter.classes)) else self._streamed(image, progress)
            finally:
                labels.close()
        finally:
            source.close()
        if holes := image.holes():
            self.holes[name] = holes
        return found

    def _whole(self, image: "_Image") -> Scored:
        pixels, logits, labels = image.assembled(len(self.segmenter.classes))
        return scored(image.pair.image, pixels, labels, logits, self.label_map.ignore)

    def _streamed(self, image: "_Image", progress: Callable[[str], None]) -> Counted:
        classes, ignore, streamer = len(self.segmenter.classes), self.label_map.ignore, image.streamer
        counts = Confusion(classes, streamer.device)
        shares, calibration = CostShares(classes), Reliability(self.segmenter.temperature)
        groups, count = self.gathered.groups, len(streamer.grid.blocks)
        width, total = band_width(streamer.source.size) if "cost" in groups else 0, 0.0
        with ahead(map(partial(streamer.region, rim=width), streamer.grid.blocks), WAITING) as regions:
            for done, region in enumerate(regions, 1):
                logits = streamer.scores(region)
                near, inside = image.labels_around(region, width)
                truth = near[inside]
                labels = torch.from_numpy(truth.astype(np.int64)).to(streamer.device)
                counts.update(labels, logits.argmax(0), ignore)
                losses = pixel_losses(logits, labels, ignore)
                total += float(losses.sum(dtype=np.float64))
                if "cost" in groups:
                    shares.add_block(losses, truth, near_change(near, width)[inside], ignore)
                if "calibration" in groups:
                    for top in range(0, len(labels), ROWS):  # it computes in float64
                        calibration.add_block(logits[:, top : top + ROWS], labels[top : top + ROWS], ignore)
                progress(f"{image.pair.image.name}, block {done} of {count}")
        self._add(shares, calibration)
        self.streamed += 1
        return Counted(counts, total / counts.pixels if counts.pixels else float("nan"))

    def _add(self, shares: CostShares, calibration: Reliability) -> None:
        """Only now, so that an image that turns out unreadable in its last block has added nothing."""
        for group in self.gathered.groups.values():
            if isinstance(group, CostShares):
                group.add_image(shares)
            elif isinstance(group, Reliability):
                group.add_image(calibration)
        self.gathered.skip_image()


class _Image:
    """One image, its mask, and what is damaged of both."""

    def __init__(self, pair: Pair, streamer: Streamer, labels: LabelSource) -> None:
        self.pair, self.streamer, self._labels = pair, streamer, labels
        self._damage: tuple[dict[tuple[int, int, int, int], str], ...] = ({}, {})  # of the image, of the mask
        labels.keep(streamer.grid.block[0] + 2 * band_width(labels.size))

    def labels_around(self, region: Region, width: int) -> tuple[np.ndarray, tuple[slice, slice]]:
        """Labels of a block and `width` pixels around it where the image has them, and where the block lies in them.

        They are those of the mask; what is damaged or unknown in the image is `ignore`. The region was read with that rim.
        """
        block, (rows, columns) = region.block, self._labels.size
        top, left = max(block.top - width, 0), max(block.left - width, 0)
        bottom, right = min(block.top + block.height + width, rows), min(block.left + block.width + width, columns)
        read: Labels = self._labels.read(top, left, bottom - top, right - left)
        y, x = block.top - top, block.left - left
        inside = (slice(y, y + block.height), slice(x, x + block.width))
        labels = read.labels
        if region.known_around is not None:
            y, x = top - region.top, left - region.left
            labels = labels.copy()  # it may be a view of the mask
            labels[~region.known_around[y : y + bottom - top, x : x + right - left]] = self._labels.label_map.ignore
        self._damage[0].update(region.damage)
        self._damage[1].update(read.damage)
        return labels, inside

    def holes(self) -> list[str]:
        """What is told of the damaged pieces met so far."""
        return hole_lines(self.pair.image, self._damage[0]) + hole_lines(self.pair.mask, self._damage[1])

    def assembled(self, classes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (C, H, W) as the model's data were, logits (K, H, W), labels (H, W) int64, of all blocks together."""
        streamer, size = self.streamer, self.streamer.source.size
        card = streamer.bundle.card
        pixels = np.empty((card.bands, *size), card.dtype)
        labels = np.empty(size, np.int64)
        logits = torch.empty(classes, *size, device=streamer.device)
        with ahead(map(streamer.region, streamer.grid.blocks), WAITING) as regions:
            for region in regions:
                block = region.block
                place = (slice(block.top, block.top + block.height), slice(block.left, block.left + block.width))
                logits[:, *place] = streamer.scores(region)
                pixels[:, *place] = _of_block(region.pixels, block, region)
                near, inside = self.labels_around(region, 0)
                labels[place] = near[inside]
        return torch.from_numpy(pixels), logits, torch.from_numpy(labels).to(streamer.device)


def _of_block(pixels: np.ndarray, block: Block, region: Region) -> np.ndarray:
    y, x = block.top - region.top, block.left - region.left
    return pixels[:, y : y + block.height, x : x + block.width]
