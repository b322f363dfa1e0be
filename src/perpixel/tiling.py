"""Cut and stitch, exactly. Source: overlap-tile strategy, Ronneberger et al. 2015, arXiv:1505.04597, Fig. 2."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from perpixel.models.dependency import Dependency, dependency
from perpixel.models.model import InputGeometry, SegmentationModel

Read = Callable[[int, int, int, int], Tensor]  # (top, left, height, width) inside the image -> (C, height, width) float, normalised
Overlap = int | Literal["exact"]
KEPT = 2**27  # bytes of what windows say of the blocks below theirs, kept until these come
Noted = Callable[[str, Callable[[], Tensor]], Tensor]  # what `prepared` has to know by this name: computed, or as it was noted before


def at_once(_: str, compute: Callable[[], Tensor]) -> Tensor:
    """Nothing is noted; see `Noted`."""
    return compute()


def mirror_pad(image: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """An image continued beyond its border by mirroring it there; the edge pixel itself is not repeated.

    Args:
        image: (..., H, W), any dtype.
        top, bottom, left, right: pixels to add, each >= 0 and as many as wanted: a border wider than the image mirrors to and fro,
            and an image one pixel wide repeats that pixel.

    Returns:
        (..., top + H + bottom, left + W + right).

    Raises:
        ValueError: if `image` has no pixels or a pad is negative.

    Source: arXiv:1505.04597, Fig. 2, "missing data is extrapolated by mirroring".
    """
    if image.ndim < 2 or 0 in image.shape[-2:]:
        raise ValueError(f"image has shape {tuple(image.shape)}; mirroring needs (..., H, W) with at least one pixel")
    if min(top, bottom, left, right) < 0:
        raise ValueError(f"pads are {top}, {bottom}, {left}, {right} (top, bottom, left, right); none may be negative")
    height, width = image.shape[-2:]
    return _window(reader(image), (height, width), -top, -left, top + height + bottom, left + width + right)


def reader(image: Tensor) -> Read:
    """An image that is in memory, (..., H, W), as `Tiler` reads it."""
    return lambda top, left, height, width: image[..., top : top + height, left : left + width]


def predict_whole(model: SegmentationModel, image: Tensor) -> Tensor:
    """Logits of a whole image in one pass: padded by mirroring to a legal size, and cropped back.

    Args:
        model: in eval mode, on the device of `image`.
        image: (C, H, W) float, normalised as in training; any size from 1x1.

    Returns:
        (K, H, W) logits, dtype and device of the image; K classes.

    Raises:
        ValueError: if `image` is not three-dimensional or not float.
    """
    height, width = _check(image)
    return Tiler(model, max(height, width), 0).block(reader(image), (height, width), 0, 0, height, width)


def predict_tiled(model: SegmentationModel, image: Tensor, tile: int, overlap: Overlap, batch: int = 1) -> Tensor:
    """Logits of a whole image, predicted tile by tile; see `Tiler`.

    Args:
        model: in eval mode, on the device of `image`.
        image: (C, H, W) float, normalised as in training; any size from 1x1.
        tile, overlap, batch: as for `Tiler`.

    Returns:
        (K, H, W) logits, dtype and device of the image; K classes.

    Raises:
        ValueError: if `image` is not three-dimensional or not float, and as `Tiler`.

    Source: overlap-tile strategy, Ronneberger et al. 2015, arXiv:1505.04597, Fig. 2.
    """
    height, width = _check(image)
    read = reader(image)
    return Tiler(model, tile, overlap, batch).prepared(read, (height, width)).block(read, (height, width), 0, 0, height, width)


@dataclass(frozen=True)
class _Cut:
    """Along one axis: a window labels `size` pixels from `start` on, of which those from `first` to before `last` are used."""

    start: int
    first: int
    last: int


@dataclass(frozen=True)
class _Lattice:
    """All windows along one axis of an image."""

    cuts: list[_Cut]
    window: int  # pixels that each of them labels
    overlap: int  # over which neighbours are blended

    def touching(self, first: int, last: int) -> list[_Cut]:
        return [cut for cut in self.cuts if cut.first < last and cut.last > first]


class Kept:
    """What windows over the border of a block say of the blocks to the right and below, so that these need not run them again.

    Blocks of one image are expected row by row; in another order, or where those below would take more than `limit` bytes, windows are run
    again and nothing changes. What the next block to the right needs is always kept, until it is passed.
    """

    def __init__(self, limit: int = KEPT) -> None:
        self._parts: dict[tuple[int, int], list[tuple[_Cut, _Cut, Tensor]]] = {}
        self._bytes, self.limit = 0, limit

    def take(self, row: _Cut, column: _Cut, top: int, left: int, height: int, width: int) -> Tensor | None:
        """(K, h, w): what that window says of a block, if all of it is here."""
        rows, columns = _clipped(row, top, top + height), _clipped(column, left, left + width)
        for down, right, part in self._parts.get((row.start, column.start), []):
            if down.first <= rows.first and rows.last <= down.last and right.first <= columns.first and columns.last <= right.last:
                inside = part[:, rows.first - down.first : rows.last - down.first]
                return inside[:, :, columns.first - right.first : columns.last - right.first]
        return None

    def put(self, row: _Cut, column: _Cut, logits: Tensor, top: int, left: int, height: int, width: int) -> None:
        """Keep what the window's logits say beyond the block."""
        self._drop_passed(top, left, height)
        beside, below = (row, _clipped(column, left + width, column.last)), (_clipped(row, top + height, row.last), column)
        for down, right in (beside, below):
            if down.first >= down.last or right.first >= right.last:
                continue
            part = logits[:, down.first - row.start : down.last - row.start, right.first - column.start : right.last - column.start]
            if right is beside[1] or self._bytes + part.nbytes <= self.limit:
                self._parts.setdefault((row.start, column.start), []).append((down, right, part.clone()))
                self._bytes += part.nbytes

    def _drop_passed(self, top: int, left: int, height: int) -> None:
        """What ends above the block in hand, or to the left of it in its own row of blocks."""
        for key, parts in list(self._parts.items()):
            kept = [
                (down, right, part)
                for down, right, part in parts
                if not (down.last <= top or (right.last <= left and down.first < top + height))
            ]
            if len(kept) < len(parts):
                self._bytes -= sum(part.nbytes for _, _, part in parts) - sum(part.nbytes for _, _, part in kept)
                self._parts[key] = kept
                if not kept:
                    del self._parts[key]


class Tiler:
    """Predicts any part of an image of any size by windows; the lattice of windows is the image's, whatever part is asked for.

    Windows start at multiples of the model's cell, so that its pooling sees the same phase in each of them. A model with a margin
    therefore gives exactly what one pass over the whole image gives. A model without one pads inside, and sees less near the border of a
    window. With a number as `overlap` neighbouring windows are blended there by weights that fall towards the border. With "exact" each
    window shows all that its part of the logits depends on (`models.dependency`), and every pixel comes from one window: the result is
    that of one pass over the whole image, up to the rounding of sums.

    The whole image, there, is mirrored at the right and below to a size that the model can label, as in `predict_whole`; models that
    resize maps (`Dependency.aligned`) may need a few pixels more.

    Args:
        model: in eval mode.
        tile: side of the labelled window, in pixels; enlarged to the next legal one that is `overlap` and a step wide. With "exact" that
            of the part which a window inside the image gives; what it shows around is added.
        overlap: pixels shared by neighbouring windows at least, 0 <= overlap < tile; or "exact".
        batch: windows that run through the model at a time; may be set anew between blocks.

    Attributes:
        window: side of the windows that the model sees in a large image, in pixels.

    Raises:
        ValueError: if `tile`, `overlap` or `batch` is out of range, or the model can't be predicted exactly by parts; the message says why.

    Source: overlap-tile strategy, Ronneberger et al. 2015, arXiv:1505.04597, Fig. 2.
    """

    def __init__(self, model: SegmentationModel, tile: int, overlap: Overlap, batch: int = 1) -> None:
        if overlap != "exact" and (isinstance(overlap, str) or not 0 <= overlap < tile):
            raise ValueError(f"overlap is {overlap!r} and tile {tile} pixels; need 0 <= overlap < tile, or overlap 'exact'")
        if tile < 1 or batch < 1:
            raise ValueError(f"tile is {tile} pixels and batch {batch}; both must be at least 1")
        self.model, self.tile, self.overlap, self.batch = model, tile, overlap, batch
        self.cell = model.geometry.cell or model.geometry.multiple
        self.kept: Kept | None = None  # set one where the blocks of one image come row by row
        self.field = dependency(model) if overlap == "exact" else None
        if self.field and self.field.obstacle:
            raise ValueError(f"this model can't be predicted exactly by parts: {self.field.obstacle}. Give overlap as a number of pixels")
        self.mean: Tensor | None = None  # of the encoder's coarsest map over the image, for the layers that `field.means` names

    @property
    def window(self) -> int:
        wanted = max(self.tile, self.overlap + self.cell) if isinstance(self.overlap, int) else self._with_halo()
        return _labelled(self.model.geometry, wanted) + 2 * self.model.geometry.margin

    def _with_halo(self) -> int:
        """Labelled pixels that a window inside the image needs for its part."""
        field = self.field or Dependency(self.cell)
        return self.step + field.before + field.after

    def whole_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the pixels that one pass over a whole image of `size` labels: the image, mirrored at the right and below."""
        return self._whole_side(size[0]), self._whole_side(size[1])

    def _whole_side(self, side: int) -> int:
        geometry, aligned = self.model.geometry, self.field is not None and self.field.aligned
        side = _labelled(geometry, side)
        while aligned and (side + 2 * geometry.margin - geometry.remainder) % self.cell:
            side += geometry.multiple
        return side

    @property
    def step(self) -> int:
        """From one window of a large image to the next, in pixels. Blocks that begin at multiples of it cut the fewest windows."""
        if not isinstance(self.overlap, int):
            return -(-self.tile // self.cell) * self.cell
        wanted = _labelled(self.model.geometry, max(self.tile, self.overlap + self.cell))
        return max((wanted - self.overlap) // self.cell * self.cell, self.cell)

    def windows(self, size: tuple[int, int]) -> int:
        """How many windows an image of `size` pixels has."""
        return len(self._lattice(size[0]).cuts) * len(self._lattice(size[1]).cuts)

    def reach(self, size: tuple[int, int], top: int, left: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of what `block` reads, save for the little that mirroring in small images may add."""
        sides: list[tuple[int, int]] = []
        for side, start, count in ((size[0], top, height), (size[1], left, width)):
            lattice, margin = self._lattice(side), self.model.geometry.margin
            cuts = lattice.touching(start, start + count)
            first = max(min(cut.start for cut in cuts) - margin, 0)
            last = min(max(cut.start for cut in cuts) + lattice.window + margin, side)
            sides.append((first, last - first))
        return sides[0][0], sides[1][0], sides[0][1], sides[1][1]

    def two_passes(self, size: tuple[int, int]) -> bool:
        """Whether an image of `size` pixels has to be `prepared`."""
        return self.field is not None and bool(self.field.means) and self.windows(size) > 1

    def prepared(self, read: Read, size: tuple[int, int], noted: Noted = at_once, begin: float = 0.0) -> "Tiler":
        """A tiler that knows what has to be known of the whole image before any part of it is predicted; this one where that is nothing.

        In exact mode that is the mean of the encoder's coarsest map where a layer uses it (DeepLab v3): one pass of the encoder over all
        windows, each pixel of the map counted once. Each row of windows is noted by itself, so that several processes can share the pass.

        Args:
            read: see `Read`.
            size: (height, width) of the image in pixels.
            noted: see `Noted`.
            begin: which rows come first, as a share of all, 0 <= begin < 1; the result is the same.
        """
        if not self.two_passes(size):
            return self
        rows, columns = (self._lattice(side) for side in size)
        first, count = int(begin * len(rows.cuts)), len(rows.cuts)
        sums: dict[int, Tensor] = {}
        for number in (*range(first, count), *range(first)):
            sums[number] = noted(f"row-{number + 1}-of-{count}", partial(self._sum_of_row, read, size, rows, columns, rows.cuts[number]))
        total = torch.stack([sums[number] for number in range(count)]).sum(0)  # in the order of rows, whoever computed them
        knowing = copy.copy(self)
        knowing.mean = (total[:-1] / total[-1])[None, :, None, None].clone()
        return knowing

    def _sum_of_row(self, read: Read, size: tuple[int, int], rows: _Lattice, columns: _Lattice, row: _Cut) -> Tensor:
        """(maps + 1) float64 on the CPU: the sum of the encoder's coarsest map over a row of windows, and how many places that are."""
        sums: list[Tensor] = []
        for first in range(0, len(columns.cuts), self.batch):
            cuts = columns.cuts[first : first + self.batch]
            windows = torch.stack([self._seen(read, size, row, column, rows.window, columns.window) for column in cuts])
            with torch.inference_mode():
                coarsest = self.model.encoder(windows.contiguous(memory_format=torch.channels_last)).maps[-1]
            across = _counted(row, rows, coarsest.shape[-2])
            for column, one in zip(cuts, coarsest, strict=True):
                part = one[:, across, _counted(column, columns, coarsest.shape[-1])].double().flatten(1)
                sums.append(torch.cat([part.sum(1), part.new_full((1,), part.shape[1])]))
        return torch.stack(sums).sum(0).cpu()

    def block(self, read: Read, size: tuple[int, int], top: int, left: int, height: int, width: int) -> Tensor:
        """(K, height, width) logits of that part of an image of `size` pixels, in the dtype and on the device of what `read` gives.

        Beyond the image's border its windows see it mirrored. What `read` is asked for lies inside.

        Raises:
            ValueError: if the part does not lie in the image, or the tiler has to be `prepared` for it first.
        """
        if not (0 <= top < top + height <= size[0] and 0 <= left < left + width <= size[1]):
            raise ValueError(f"a block of {height}x{width} pixels at {top}, {left} does not lie in an image of {size[0]}x{size[1]}")
        rows, columns = (self._lattice(side) for side in size)
        cuts = list(product(rows.touching(top, top + height), columns.touching(left, left + width)))
        several = len(rows.cuts) * len(columns.cuts) > 1
        if several and self.field and self.field.means and self.mean is None:
            raise ValueError("this model takes a mean over the whole image; call prepared(read, size) first, and use the tiler it gives")
        blended = several and self.field is None
        parts = [self.kept.take(row, column, top, left, height, width) if self.kept else None for row, column in cuts]
        fresh = self._run(read, size, rows, columns, [cut for cut, part in zip(cuts, parts, strict=True) if part is None])
        total, weight = torch.empty(0), torch.empty(0)
        for (row, column), part in zip(cuts, parts, strict=True):
            into, down = _shared(row, top, height)
            beside, right = _shared(column, left, width)
            if part is None:
                whole = next(fresh)
                part = whole[:, down, right]
                if self.kept:
                    self.kept.put(row, column, whole, top, left, height, width)
            if total.ndim == 1:
                total = part.new_zeros(self.model.classes, height, width)
                weight = (_ramp(rows.window, rows.overlap)[:, None] * _ramp(columns.window, columns.overlap)).to(total)
            if blended:
                total[:, into, beside].addcmul_(part, weight[down, right])
            else:
                total[:, into, beside] = part
        if blended:
            # The weights of all windows at a pixel are the product of their sums along each axis.
            total /= _cover(rows, top, height).to(total)[:, None]
            total /= _cover(columns, left, width).to(total)
        return total

    def _run(self, read: Read, size: tuple[int, int], rows: _Lattice, columns: _Lattice, cuts: list[tuple[_Cut, _Cut]]) -> Iterator[Tensor]:
        """(K, window, window) logits of windows in order, in the dtype of what `read` gives; a batch at a time, when asked for."""
        for number in range(0, len(cuts), self.batch):
            some = cuts[number : number + self.batch]
            windows = torch.stack([self._seen(read, size, row, column, rows.window, columns.window) for row, column in some])
            with torch.inference_mode(), self._knowing_the_mean():
                logits: Tensor = self.model(windows.contiguous(memory_format=torch.channels_last))
            yield from logits.to(windows.dtype)

    @contextmanager
    def _knowing_the_mean(self) -> Iterator[None]:
        """Layers that take a mean over the image give the whole image's."""
        mean, names = self.mean, self.field.means if self.field and self.mean is not None else ()
        hooks = [
            self.model.get_submodule(name).register_forward_hook(lambda _, __, own: own if mean is None else mean.to(own).expand_as(own))
            for name in names
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _lattice(self, side: int) -> _Lattice:
        if self.field is None or isinstance(self.overlap, int):
            return self._blended_lattice(side, 0 if self.overlap == "exact" else self.overlap)
        return self._exact_lattice(side, self.field)

    def _blended_lattice(self, side: int, overlap: int) -> _Lattice:
        # Windows move by whole cells, so they are at least one larger than their overlap; and never need to be larger than the image.
        window = _labelled(self.model.geometry, min(max(self.tile, overlap + self.cell), side))
        step = max((window - overlap) // self.cell * self.cell, self.cell)  # a window as large as the side does not step at all
        last = max(-(-(side - window) // self.cell) * self.cell, 0)
        return _Lattice([_Cut(start, start, min(start + window, side)) for start in (*range(0, last, step), last)], window, overlap)

    def _exact_lattice(self, side: int, field: Dependency) -> _Lattice:
        """Parts that begin at multiples of the tile; a window around each, pushed inwards at the image's borders: there it ends too."""
        whole, step = self._whole_side(side), self.step
        # The last window ends where the image does and starts at a whole cell, so all leave the same remainder as the image.
        window = self._with_halo()
        window = min(window + (whole - window) % self.cell, whole)
        cuts: list[_Cut] = []
        for first in range(0, whole, step):
            start, last = min(max(first - field.before, 0), whole - window), min(first + step, whole)
            if cuts and cuts[-1].start == start:  # near a border, or in a small image, one window gives several parts
                first = cuts.pop().first
            cuts.append(_Cut(start, first, last))
        return _Lattice(cuts, window, 0)

    def _seen(self, read: Read, size: tuple[int, int], row: _Cut, column: _Cut, height: int, width: int) -> Tensor:
        """(C, height + 2 * margin, width + 2 * margin) of the mirrored image."""
        margin = self.model.geometry.margin
        return _window(read, size, row.start - margin, column.start - margin, height + 2 * margin, width + 2 * margin)


def _check(image: Tensor) -> tuple[int, int]:
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}; prediction takes one image (C, H, W) with at least one pixel")
    if not image.is_floating_point():
        raise ValueError(f"image is {image.dtype}; prediction takes a float image, normalised as in training")
    return image.shape[1], image.shape[2]


def _labelled(geometry: InputGeometry, side: int) -> int:
    """The smallest window side that the model can label and that is at least `side`."""
    return geometry.fit(side + 2 * geometry.margin) - 2 * geometry.margin


def _counted(cut: _Cut, lattice: _Lattice, count: int) -> slice:
    """Which of `count` positions of a coarse map of a window belong to its part: position 0 lies on the window's first pixel."""
    stride = -(-lattice.window // count)
    last = count if cut is lattice.cuts[-1] else (cut.last - cut.start) // stride
    return slice((cut.first - cut.start) // stride, last)


def _shared(cut: _Cut, start: int, count: int) -> tuple[slice, slice]:
    """Where the used part of a window and `count` pixels from `start` meet: in these, and in the window."""
    first, last = max(cut.first, start), min(cut.last, start + count)
    return slice(first - start, last - start), slice(first - cut.start, last - cut.start)


def _clipped(cut: _Cut, first: int, last: int) -> _Cut:
    """The part of its used pixels from `first` to before `last`."""
    return _Cut(cut.start, max(cut.first, first), min(cut.last, last))


def _ramp(side: int, overlap: int) -> Tensor:
    """Weights along one side of a window: sin^2, rising over `overlap` pixels at each end; two of them add up to 1."""
    distance = torch.arange(side, dtype=torch.float64) + 0.5
    distance = torch.minimum(distance, side - distance)
    if overlap == 0:
        return torch.ones_like(distance)
    return torch.sin(torch.pi / 2 * (distance / overlap).clamp(max=1)).square()


def _cover(lattice: _Lattice, start: int, count: int) -> Tensor:
    """The sum of the windows' weights at each of `count` pixels from `start`."""
    ramp, cover = _ramp(lattice.window, lattice.overlap), torch.zeros(count, dtype=torch.float64)
    for cut in lattice.touching(start, start + count):
        into, of = _shared(cut, start, count)
        cover[into] += ramp[of]
    return cover


def _window(read: Read, size: tuple[int, int], top: int, left: int, height: int, width: int) -> Tensor:
    """A window of the endlessly mirrored image; only as much of it is read as the window shows."""
    rows, columns = _mirrored(top, height, size[0]), _mirrored(left, width, size[1])
    first, start = int(rows.min()), int(columns.min())
    seen = read(first, start, int(rows.max()) - first + 1, int(columns.max()) - start + 1)
    if top < 0 or top + height > size[0]:
        seen = seen.index_select(-2, (rows - first).to(seen.device))
    if left < 0 or left + width > size[1]:
        seen = seen.index_select(-1, (columns - start).to(seen.device))
    return seen


def _mirrored(start: int, count: int, side: int) -> Tensor:
    """Pixel indices of `count` pixels from `start` on a side that is mirrored without end."""
    period = max(2 * side - 2, 1)
    position = torch.arange(start, start + count).remainder(period)
    return torch.minimum(position, period - position)
