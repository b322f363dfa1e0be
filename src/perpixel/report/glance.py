"""What is looked at of an image without a mask: its numbers, and pictures that are small where the image is large."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from perpixel.blockwise import fits
from perpixel.data.images import Picture, read_image
from perpixel.data.sources import Source, open_page
from perpixel.segmenter import Segmenter
from perpixel.streaming import WAITING, Region, ahead

SIDE = 640  # pixels of the longer side of what is kept of a large image


@dataclass(frozen=True)
class Glance:
    """One image as the model sees it; not to be kept.

    Attributes:
        size: (height, width) of the image in pixels.
        pixels: (C, h, w), all of them, or means of them.
        guess: (h, w) int64 most probable class.
        entropy: (h, w) float32, as a share of ln K.
        uncertainty: mean entropy over all pixels.
        shares: (K,) float32, mean probability of each class.
    """

    size: tuple[int, int]
    pixels: np.ndarray
    guess: np.ndarray
    entropy: np.ndarray
    uncertainty: float
    shares: np.ndarray


def glance(segmenter: Segmenter, picture: Picture) -> Glance:
    """Of an image of any size, at constant memory; ValueError where it cannot be read or its scores overflow."""
    source = open_page(picture)
    try:
        if not fits(source.size, len(segmenter.classes)):
            return glance_at_blocks(segmenter, source, str(picture))
    finally:
        source.close()
    image = read_image(picture)
    return glance_at(image, segmenter.logits(torch.from_numpy(image)), picture.name)


def glance_at(image: np.ndarray, logits: Tensor, name: str) -> Glance:
    """Of an image (C, H, W) and its logits (K, H, W)."""
    probability = _probability(logits, name)
    entropy = _entropy(probability)
    shares = probability.mean((1, 2)).cpu().numpy()
    guess = logits.argmax(0).cpu().numpy()
    return Glance((image.shape[1], image.shape[2]), image, guess, entropy.cpu().numpy(), float(entropy.mean()), shares)


def glance_at_blocks(segmenter: Segmenter, source: Source, name: str, side: int = SIDE) -> Glance:
    """Of a large image, block by block; pixels that are damaged or hold no data count nowhere."""
    streamer = segmenter.streamer(source, name)
    size, classes = source.size, len(segmenter.classes)
    small = _Small(size, streamer.bundle.card.bands, side)
    shares, total, pixels = np.zeros(classes), 0.0, 0
    with ahead(map(streamer.region, streamer.grid.blocks), WAITING) as regions:
        for region in regions:
            probability = _probability(streamer.scores(region), name)
            known = np.ones(probability.shape[1:], bool) if region.known is None else region.known
            entropy = np.where(known, _entropy(probability).cpu().numpy(), 0)
            inside = torch.from_numpy(known).to(probability.device)
            shares += (probability * inside).sum((1, 2), dtype=torch.float64).cpu().numpy()
            total, pixels = total + float(entropy.sum(dtype=np.float64)), pixels + int(known.sum())
            small.add(region, np.where(known, probability.argmax(0).cpu().numpy(), -1), entropy)
    if not pixels:
        raise ValueError(f"{name}: holds no data")
    image = small.pixels / small.counts
    dtype = np.dtype(streamer.bundle.card.dtype)
    image = image.round().astype(dtype) if dtype.kind in "iu" else image.astype(dtype)
    entropy = (small.entropy / small.counts).astype(np.float32)
    return Glance(size, image, small.guess, entropy, total / pixels, (shares / pixels).astype(np.float32))


class _Small:
    """Sums over the pixels that fall on each pixel of a small picture, and the class at the middle of each."""

    def __init__(self, size: tuple[int, int], bands: int, side: int) -> None:
        factor = min(1.0, side / max(size))
        height, width = (max(1, round(length * factor)) for length in size)
        self.rows, self.columns = (np.arange(length) * small // length for length, small in zip(size, (height, width), strict=True))
        self.middles = [
            ((np.arange(small) + 0.5) * length / small).astype(int) for length, small in zip(size, (height, width), strict=True)
        ]
        self.pixels, self.counts, self.entropy = np.zeros((bands, height, width)), np.zeros((height, width)), np.zeros((height, width))
        self.guess = np.full((height, width), -1)

    def add(self, region: Region, guess: np.ndarray, entropy: np.ndarray) -> None:
        block = region.block
        y, x = block.top - region.top, block.left - region.left
        pixels = region.pixels[:, y : y + block.height, x : x + block.width].astype(np.float64)
        rows = self.rows[block.top : block.top + block.height]
        columns = self.columns[block.left : block.left + block.width]
        first_row, first_column = (np.flatnonzero(np.diff(places, prepend=-1)) for places in (rows, columns))
        cells = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))

        def summed(values: np.ndarray) -> np.ndarray:
            return np.add.reduceat(np.add.reduceat(values, first_row, -2), first_column, -1)

        self.pixels[:, *cells] += summed(pixels)
        self.counts[cells] += summed(np.ones(entropy.shape))
        self.entropy[cells] += summed(entropy)
        tops, lefts = ((middle >= low) & (middle < low + length) for middle, low, length in zip(
            self.middles, (block.top, block.left), (block.height, block.width), strict=True))  # fmt: skip
        places = np.ix_(self.middles[0][tops] - block.top, self.middles[1][lefts] - block.left)
        self.guess[np.ix_(tops, lefts)] = guess[places]


def _probability(logits: Tensor, name: str) -> Tensor:
    if not torch.isfinite(logits).all():
        raise ValueError(f"{name}: its scores overflowed")
    return logits.softmax(0)


def _entropy(probability: Tensor) -> Tensor:
    """(K, H, W) -> (H, W), as a share of ln K."""
    return torch.special.entr(probability).sum(0).clamp(min=0) / max(math.log(len(probability)), 1e-9)
