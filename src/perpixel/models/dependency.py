"""Which pixels of an image can change which pixels of the logits: measured, not typed, for every phase of a model's strides.

A model is walked on the meta device. In place of numbers, every map carries for each of its rows the first and the last row of the image
that it depends on; what an operation does to these bounds follows from its kernel, stride, padding and dilation alone, so that a ReLU or
a maximum that happens to be inactive hides nothing. A row that sees beyond a border of the image depends on where that border is, and
has an infinite bound. An operation that is not understood ends the walk: what is not proven is refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import nn

from perpixel.models.bounds import Line, ObstacleError, Walk
from perpixel.models.model import SegmentationModel

LARGEST = 1 << 15  # pixels of the side on which a field is looked for


@dataclass(frozen=True)
class Dependency:
    """What a window has to show around a part of an image, so that the logits of the part are those of the whole image.

    Attributes:
        cell: such a part begins and ends at multiples of it, in pixels; windows begin there too.
        before, after: pixels that a window shows before and behind the part, where the image does not end sooner; beyond the margin
            of unpadded models. The larger of both axes.
        aligned: whether image and windows need sides that leave the geometry's remainder modulo `cell`, not only modulo its multiple:
            maps are resized by the same factor only then.
        means: names of the layers that take the mean of the encoder's coarsest map over the image; it has to be known beforehand.
        obstacle: why no part of an image can give what the whole gives; "" where it can.
    """

    cell: int
    before: int = 0
    after: int = 0
    aligned: bool = False
    means: tuple[str, ...] = ()
    obstacle: str = ""


def dependency(model: SegmentationModel) -> Dependency:
    """Measures `model`; its weights do not matter and stay untouched, and its modes are restored."""
    cell = model.geometry.cell or model.geometry.multiple
    modes = [(layer, layer.training) for layer in model.modules()]
    model.eval()  # dropout and batch norm as in prediction; but norms that know no running statistics stay what they are
    try:
        return _measured(model, cell)
    except ObstacleError as error:
        return Dependency(cell, obstacle=str(error))
    finally:
        for layer, mode in modes:
            layer.training = mode


@dataclass(frozen=True)
class _Profile:
    """What one walk saw along one axis."""

    resizings: tuple[tuple[str, Fraction], ...]
    means: tuple[str, ...]
    phases: tuple[tuple[int, int], ...]  # of each row of a cell: pixels seen before and behind it


def _measured(model: SegmentationModel, cell: int) -> Dependency:
    geometry = model.geometry
    side = _aligned(model, max(8 * cell, 512), cell)
    while (one := _profiles(model, (side, side + cell), cell)) is None:
        if side > LARGEST:
            raise ObstacleError(f"a pixel of the logits depends on more than {LARGEST} pixels of the image across")
        side = _aligned(model, 2 * side, cell)
    rows, columns = one
    if rows != columns:
        raise ObstacleError(_difference(rows, columns))
    aligned = False
    if cell > geometry.multiple:
        try:
            aligned = _profiles(model, (side + geometry.multiple, side + cell - geometry.multiple), cell) != (rows, rows)
        except ObstacleError:
            aligned = True
    before = max(seen - phase for phase, (seen, _) in enumerate(rows.phases))
    after = max(seen + phase + 1 - cell for phase, (_, seen) in enumerate(rows.phases))
    return Dependency(cell, max(-(-before // cell) * cell, 0), max(after, 0), aligned, rows.means)


def _aligned(model: SegmentationModel, side: int, cell: int) -> int:
    """The next legal side of the model's input that is `cell * k + remainder`."""
    geometry = model.geometry
    side = geometry.fit(side)
    while side % cell != geometry.remainder % cell:
        side += geometry.multiple
    return side


def _difference(one: _Profile, other: _Profile) -> str:
    for (where, factor), (_, another) in zip(one.resizings, other.resizings, strict=False):
        if factor != another:
            return f"{where} resizes a map by a factor that changes with the size of the image (corners on corners)"
    return "what a pixel depends on is not the same along both axes and in images of any size"


def _profiles(model: SegmentationModel, size: tuple[int, int], cell: int) -> tuple[_Profile, _Profile] | None:
    """What the rows and the columns of an image see where no border touches them; None where these are less than two whole cells."""
    first = next(layer for layer in model.encoder.modules() if isinstance(layer, nn.Conv2d))
    # Outside of inference mode, in which operations come in larger pieces than the rules know.
    with torch.inference_mode(False), torch.no_grad(), _places(model) as place:
        state = {name: value.detach().to("meta") for name, value in [*model.named_parameters(), *model.named_buffers()]}
        image = torch.empty(1, model.bands or first.in_channels, *size, dtype=first.weight.dtype, device="meta")
        walk = Walk(image, place)
        hook = model.encoder.register_forward_hook(lambda _, __, features: setattr(walk, "coarsest", features.maps[-1]))
        try:
            with walk:
                logits = torch.func.functional_call(model, state, (image,))
        finally:
            hook.remove()
    found = []
    for axis in (0, 1):
        walk.axis = axis
        if (phases := _phases(walk.line(logits), cell, model.geometry.margin)) is None:
            return None
        found.append(_Profile(tuple(walk.resizings[axis]), tuple(walk.means[axis]), phases))
    return found[0], found[1]


def _phases(line: Line, cell: int, margin: int) -> tuple[tuple[int, int], ...] | None:
    free = np.flatnonzero(np.isfinite(line.low) & np.isfinite(line.high))
    begin = -(-int(free[0]) // cell) * cell if len(free) else 0
    end = (int(free[-1]) + 1) // cell * cell if len(free) else 0
    if end - begin < 2 * cell:
        return None
    row = np.arange(begin, end)
    # The input begins a margin before the first labelled row and ends one behind the last.
    seen = np.stack([row - line.low[begin:end], line.high[begin:end] - 2 * margin - row]).astype(int).reshape(2, -1, cell)
    if (seen != seen[:, :1]).any():
        raise ObstacleError(f"what a pixel depends on is not the same in every cell of {cell} pixels")
    return tuple((int(before), int(after)) for before, after in seen[:, 0].T)


@contextmanager
def _places(model: SegmentationModel) -> Iterator[Callable[[], tuple[str, nn.Module]]]:
    """Tells the name of the layer that runs, and the layer."""
    stack: list[tuple[str, nn.Module]] = [("the model", model)]

    def leave(*_: object) -> None:
        stack.pop()

    hooks = []
    for name, layer in model.named_modules():
        hooks.append(layer.register_forward_pre_hook(lambda layer, _, name=name: stack.append((name, layer))))
        hooks.append(layer.register_forward_hook(leave))
    try:
        yield lambda: stack[-1]
    finally:
        for hook in hooks:
            hook.remove()
