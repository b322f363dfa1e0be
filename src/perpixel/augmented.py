"""Test-time augmentation: an image is predicted in several views, turned, mirrored and at several scales, and the scores are averaged.

Sources: rotated copies, Ronneberger et al. 2015, arXiv:1505.04597, sec. 4; mirrored images and scales from 0.5 to 1.75, Chen et al. 2017,
arXiv:1706.05587, sec. 4.1. Scores are averaged before softmax, as there.

Every view is read from the image window by window, so that augmentation composes with tiling: no resized copy of the image is held.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from perpixel.tiling import Kept, Noted, Read, Tiler, at_once

LINE = 64  # positions that are resampled at a time
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # arXiv:1706.05587, sec. 4.1
KINDS = ("flips", "rotations", "scales")
Size = tuple[int, int]
Part = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class View:
    """An image resized, then mirrored, then turned.

    Attributes:
        scale: of its sides.
        mirrored: left and right are exchanged.
        turns: by 90 degrees against the clock, 0 to 3.
    """

    scale: float = 1.0
    mirrored: bool = False
    turns: int = 0

    def size(self, size: Size) -> Size:
        """(height, width) of the view of an image of `size` pixels."""
        height, width = self._scaled(size)
        return (width, height) if self.turns % 2 else (height, width)

    def read(self, read: Read, size: Size) -> Read:
        """The view as a `Tiler` reads it, of an image of `size` pixels."""

        def view(top: int, left: int, height: int, width: int) -> Tensor:
            part = self._unturned((top, left, height, width), size)
            return self._turned(_resampled(read, size, self._scaled(size), part))

        return view

    def scores(self, tiler: Tiler, read: Read, size: Size, part: Part) -> Tensor:
        """(K, height, width) scores of a part of the image, from its view."""
        view, seen = self.read(read, size), self.size(size)

        def scaled(*wanted: int) -> Tensor:
            return self._upright(tiler.block(view, seen, *self._turned_part(wanted, size)))

        return _resampled(scaled, self._scaled(size), size, part)

    def reach(self, tiler: Tiler, size: Size, part: Part) -> Part:
        """What of the image is read for a part of it."""
        scaled = _needed(self._scaled(size), size, part)
        seen = tiler.reach(self.size(size), *self._turned_part(scaled, size))
        return _needed(size, self._scaled(size), self._unturned(seen, size))

    def _scaled(self, size: Size) -> Size:
        return max(round(size[0] * self.scale), 1), max(round(size[1] * self.scale), 1)

    def _turned(self, x: Tensor) -> Tensor:
        return torch.rot90(x.flip(-1) if self.mirrored else x, self.turns, (-2, -1))

    def _upright(self, x: Tensor) -> Tensor:
        x = torch.rot90(x, -self.turns, (-2, -1))
        return x.flip(-1) if self.mirrored else x

    def _turned_part(self, part: Sequence[int], size: Size) -> Part:
        """Where a part of the scaled image lies in the view."""
        top, left, height, width = part
        rows, columns = self._scaled(size)
        if self.mirrored:
            left = columns - left - width
        for _ in range(self.turns):
            top, left, height, width = columns - left - width, top, width, height
            rows, columns = columns, rows
        return top, left, height, width

    def _unturned(self, part: Part, size: Size) -> Part:
        """Where a part of the view lies in the scaled image."""
        top, left, height, width = part
        rows, columns = self.size(size)
        for _ in range(self.turns):
            top, left, height, width = left, rows - top - height, width, height
            rows, columns = columns, rows
        return top, columns - left - width if self.mirrored else left, height, width


def views(kinds: str) -> list[View]:
    """The views of augmentation by these kinds: all combinations of what they allow, the image itself first.

    Args:
        kinds: of "flips" (mirrored left and right too), "rotations" (by 0, 90, 180 and 270 degrees) and "scales" (`SCALES`), with commas
            between them; "" for none.

    Raises:
        ValueError: for another kind.
    """
    asked = [kind.strip() for kind in kinds.split(",") if kind.strip()]
    if unknown := [kind for kind in asked if kind not in KINDS]:
        raise ValueError(f"augmentation is by {unknown[0]!r}; known are {', '.join(KINDS)}, with commas between them")
    scales = sorted(SCALES, key=lambda scale: scale != 1) if "scales" in asked else [1.0]
    mirrors, turns = (False, True) if "flips" in asked else (False,), range(4) if "rotations" in asked else range(1)
    return [View(*view) for view in product(scales, mirrors, turns)]


class AugmentedTiler:
    """A `Tiler` that averages the scores of several views; what it offers is the same.

    Args:
        tiler: for the model.
        views: at least one.
    """

    def __init__(self, tiler: Tiler, views: Sequence[View]) -> None:
        self.tilers, self.views = [tiler] * len(views), list(views)
        self.window = tiler.window
        self.kept: Kept | None = None  # windows of different views are not kept for the next block

    @property
    def batch(self) -> int:
        return self.tilers[0].batch

    @batch.setter
    def batch(self, batch: int) -> None:
        for tiler in self.tilers:
            tiler.batch = batch

    def prepared(self, read: Read, size: Size, noted: Noted = at_once, begin: float = 0.0) -> "AugmentedTiler":
        """Each view on its own; see `Tiler.prepared`."""
        knowing = copy.copy(self)
        knowing.tilers = [
            tiler.prepared(view.read(read, size), view.size(size), _of_view(number, noted), begin)
            for number, (view, tiler) in enumerate(zip(self.views, self.tilers, strict=True), 1)
        ]
        return knowing

    def reach(self, size: Size, top: int, left: int, height: int, width: int) -> Part:
        """What `block` reads; see `Tiler.reach`."""
        parts = [view.reach(tiler, size, (top, left, height, width)) for view, tiler in zip(self.views, self.tilers, strict=True)]
        first, start = min(part[0] for part in parts), min(part[1] for part in parts)
        return first, start, max(part[0] + part[2] for part in parts) - first, max(part[1] + part[3] for part in parts) - start

    def block(self, read: Read, size: Size, top: int, left: int, height: int, width: int) -> Tensor:
        """(K, height, width) mean of the views' scores; see `Tiler.block`."""
        total: Tensor | None = None
        for view, tiler in zip(self.views, self.tilers, strict=True):
            scores = view.scores(tiler, read, size, (top, left, height, width))
            total = scores.clone() if total is None else total.add_(scores)
        if total is None:
            raise ValueError("no views to predict; give at least View(), the image itself")
        return total / len(self.views)


def _of_view(number: int, noted: Noted) -> Noted:
    return lambda name, compute: noted(f"view-{number}-{name}", compute)


def _resampled(read: Read, size: Size, wanted: Size, part: Part) -> Tensor:
    """A part of an image that is resized from `size` to `wanted`, bilinear, pixels as areas, averaged over what a pixel covers."""
    if size == wanted:
        return read(*part)
    seen = read(*_needed(size, wanted, part))
    with torch.autocast(seen.device.type, enabled=False):
        across = _line(seen.float() if seen.dtype == torch.bfloat16 else seen, size[1], wanted[1], part[1], part[3])
        return _line(across.transpose(-1, -2), size[0], wanted[0], part[0], part[2]).transpose(-1, -2)


def _line(x: Tensor, side: int, wanted: int, start: int, count: int) -> Tensor:
    """The last axis resampled, LINE positions at a time, as the matrix of weights grows with their square."""
    begin, done = _span(side, wanted, start, count)[0], []
    for at in range(start, start + count, LINE):
        first, weights = _weights(side, wanted, at, min(LINE, start + count - at))
        done.append(x[..., first - begin : first - begin + weights.shape[1]] @ weights.to(x).T)
    return torch.cat(done, -1)


def _needed(size: Size, wanted: Size, part: Sequence[int]) -> Part:
    """What of an image of `size` pixels a part is made of once it is resized to `wanted`."""
    if size == wanted:
        return part[0], part[1], part[2], part[3]
    (top, rows), (left, columns) = (_span(*line) for line in zip(size, wanted, part[:2], part[2:], strict=True))
    return top, left, rows, columns


def _span(side: int, wanted: int, start: int, count: int) -> tuple[int, int]:
    """The first pixel of a side that counts for `count` positions from `start` on of the side resized, and how many do."""
    factor = side / wanted
    wide = max(factor, 1.0)
    first = max(int(np.ceil((start + 0.5) * factor - 0.5 - wide)), 0)
    return first, min(int(np.floor((start + count - 0.5) * factor - 0.5 + wide)), side - 1) - first + 1


def _weights(side: int, wanted: int, start: int, count: int) -> tuple[int, Tensor]:
    """`count` positions from `start` on of a side resized to `wanted`: the first pixel that counts, and weights (count, pixels)."""
    factor = side / wanted
    centre = (start + np.arange(count) + 0.5) * factor - 0.5
    wide = max(factor, 1.0)  # a smaller image averages, so that nothing is skipped
    first, pixels = _span(side, wanted, start, count)
    weights = np.maximum(1 - np.abs(centre[:, None] - np.arange(first, first + pixels)) / wide, 0)
    return first, torch.from_numpy(weights / weights.sum(1, keepdims=True))
