"""Which pixels of an image can change which pixels of the logits: measured, not typed, for every phase of a model's strides.

A model is walked on the meta device. In place of numbers, every map carries for each of its rows the first and the last row of the image
that it depends on; what an operation does to these bounds follows from its kernel, stride, padding and dilation alone, so that a ReLU or
a maximum that happens to be inactive hides nothing. A row that sees beyond a border of the image depends on where that border is, and
has an infinite bound. An operation that is not understood ends the walk: what is not proven is refused.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from perpixel.models.layers import ImageMean
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
    geometry = model.geometry
    cell = geometry.cell or geometry.multiple
    modes = [(layer, layer.training) for layer in model.modules()]
    model.eval()  # dropout and batch norm as in prediction; but norms that know no running statistics stay what they are
    try:
        profiles = _profiles(model, cell)
    except _ObstacleError as error:
        return Dependency(cell, obstacle=str(error))
    finally:
        for layer, mode in modes:
            layer.training = mode
    return Dependency(
        cell,
        -(-max(profile.before for profile in profiles) // cell) * cell,
        max(profile.after for profile in profiles),
        any(profile.aligned for profile in profiles),
        profiles[0].means,
    )


class _ObstacleError(Exception):
    """Why a model has no bounded field."""


@dataclass(frozen=True)
class _Profile:
    """What one walk saw; `before` and `after` as in `Dependency`, not yet whole cells."""

    before: int
    after: int
    resizings: tuple[tuple[str, Fraction], ...]
    means: tuple[str, ...]
    phases: tuple[tuple[int, int], ...]  # of each row of a cell: pixels seen before and behind it
    aligned: bool = False

    def agrees(self, other: "_Profile") -> bool:
        return self.resizings == other.resizings and self.phases == other.phases


def _profiles(model: SegmentationModel, cell: int) -> list[_Profile]:
    """One for each axis."""
    geometry, found = model.geometry, []
    for axis in (-2, -1):
        side = _aligned(model, max(8 * cell, 512), cell)
        while (profile := _profile(model, side, axis, cell)) is None:
            if side > LARGEST:
                raise _ObstacleError(f"a pixel of the logits depends on more than {LARGEST} pixels of the image across")
            side = _aligned(model, 2 * side, cell)
        another = _profile(model, side + cell, axis, cell)
        if another is None or not profile.agrees(another):
            raise _ObstacleError(_difference(profile, another))
        steps = {geometry.multiple, cell - geometry.multiple} if cell > geometry.multiple else set()
        free = all((other := _profile(model, side + step, axis, cell)) is not None and profile.agrees(other) for step in steps)
        found.append(_Profile(**{**vars(profile), "aligned": not free}))
    return found


def _aligned(model: SegmentationModel, side: int, cell: int) -> int:
    """The next legal side of the model's input that is `cell * k + remainder`."""
    geometry = model.geometry
    side = geometry.fit(side)
    while side % cell != geometry.remainder % cell:
        side += geometry.multiple
    return side


def _difference(one: _Profile, other: _Profile | None) -> str:
    if other is not None:
        for (where, factor), (_, another) in zip(one.resizings, other.resizings, strict=False):
            if factor != another:
                return f"{where} resizes a map by a factor that changes with the size of the image (corners on corners)"
    return "what a pixel depends on is not the same in images of different size"


def _profile(model: SegmentationModel, side: int, axis: int, cell: int) -> _Profile | None:
    """What the rows of whole cells see that no border touches, in an image of `side` pixels; None where these are less than two."""
    geometry = model.geometry
    other = _aligned(model, 1, cell)  # the other axis matters in nothing
    shape = (side, other) if axis == -2 else (other, side)
    first = next(layer for layer in model.encoder.modules() if isinstance(layer, nn.Conv2d))
    state = {name: value.to("meta") for name, value in [*model.named_parameters(), *model.named_buffers()]}
    image = torch.empty(1, first.in_channels, *shape, device="meta")
    with torch.no_grad(), _places(model) as place, _Walk(image, axis, place) as walk:
        logits = torch.func.functional_call(model, state, (image,))
    line = walk.lines[id(logits)][1]
    free = np.flatnonzero(np.isfinite(line.low) & np.isfinite(line.high))
    begin = -(-int(free[0]) // cell) * cell if len(free) else 0
    end = (int(free[-1]) + 1) // cell * cell if len(free) else 0
    if end - begin < 2 * cell:
        return None
    row = np.arange(begin, end)
    # The input begins a margin before the first labelled row and ends one behind the last.
    seen = np.stack([row - line.low[begin:end], line.high[begin:end] - 2 * geometry.margin - row]).astype(int).reshape(2, -1, cell)
    if (seen != seen[:, :1]).any():
        raise _ObstacleError(f"what a pixel depends on is not the same in every cell of {cell} pixels")
    phase = np.arange(cell)
    before, after = int((seen[0, 0] - phase).max()), int((seen[1, 0] + phase + 1 - cell).max())
    phases = tuple((int(ahead), int(behind)) for ahead, behind in seen[:, 0].T)
    return _Profile(max(before, 0), max(after, 0), tuple(walk.resizings), tuple(walk.means), phases)


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


@dataclass(frozen=True)
class _Line:
    """Where in a tensor the axis lies, and what each of its positions sees.

    Attributes:
        dim: the dimension that holds the axis.
        inner: positions of that dimension for one of the axis; above 1 where the dimension holds other axes behind it too.
        low, high: first and last row of the image; an empty range, inf to -inf, where it depends on nothing.
        pool: kernel, stride and padding of the pooling whose positions these are.
    """

    dim: int
    inner: int
    low: np.ndarray
    high: np.ndarray
    pool: tuple[int, int, int] | None = None

    def reading(self, taps: Iterable[tuple[np.ndarray, np.ndarray | bool]]) -> "_Line":
        """What new positions see that read the union of `taps`: for each of them a position of this line, and whether it reads it.

        A position beyond the ends of the line is one beyond a border of the image.
        """
        low = high = np.array([])
        for number, (tap, used) in enumerate(taps):
            if not number:
                low, high = np.full(len(tap), np.inf), np.full(len(tap), -np.inf)
            inside, over, under = tap.clip(0, len(self.low) - 1), tap >= len(self.low), tap < 0
            seen_low = np.where(under, -np.inf, np.where(over, np.inf, self.low[inside]))
            seen_high = np.where(over, np.inf, np.where(under, -np.inf, self.high[inside]))
            low, high = np.where(used, np.minimum(low, seen_low), low), np.where(used, np.maximum(high, seen_high), high)
        return _Line(self.dim, self.inner, low, high)

    def also(self, other: "_Line") -> "_Line":
        return _Line(self.dim, self.inner, np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    def moved(self, dim: int, inner: int = 1) -> "_Line":
        return _Line(dim, inner, self.low, self.high, self.pool)


class _Walk(TorchDispatchMode):
    """Notes a `_Line` for every tensor that comes of the image."""

    def __init__(self, image: Tensor, axis: int, place: Callable[[], tuple[str, nn.Module]]) -> None:
        super().__init__()
        row = np.arange(image.shape[axis], dtype=float)
        # Tensors are kept, so that no two have the same id.
        self.lines: dict[int, tuple[Tensor, _Line]] = {id(image): (image, _Line(image.ndim + axis, 1, row, row))}
        self.place = place
        self.resizings: list[tuple[str, Fraction]] = []
        self.means: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        options = dict(kwargs or {})
        result = func(*args, **options)
        if any(id(x) in self.lines for x in _tensors((*args, *options.values()))):
            name = func.overloadpacket.__name__.removesuffix("_")
            lines = self._behind(name, args, options, result)
            for x, line in zip(_tensors([result]), lines, strict=False):
                self.lines[id(x)] = (x, line)
        return result

    def _behind(self, name: str, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> list[_Line]:
        """The lines of the results; none where they are the same for every image."""
        where, layer = self.place()
        if name in _RULES:
            rule = _RULES[name]
        elif name in _POINTWISE:
            rule = _pointwise
        elif "softmax" in name or "attention" in name:
            raise _ObstacleError(f"{where} attends to the whole image ({name})")
        else:
            raise _ObstacleError(f"{where} has an operation whose field is not known ({name})")
        try:
            return rule(self, args, options, result)
        except _ObstacleError as error:
            raise _ObstacleError(f"{where} {error}") from None

    def line(self, x: Tensor) -> _Line:
        if id(x) not in self.lines:
            raise _ObstacleError("mixes the image with something else in a way that is not followed")
        return self.lines[id(x)][1]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among arguments or results, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


# What an operation does to the lines: (walk, its arguments and options, its results) -> the lines of its results, in order.
_Rule = Callable[[_Walk, tuple[Any, ...], dict[str, Any], Any], list[_Line]]

_POINTWISE = frozenset(
    "add sub rsub mul div neg pow sqrt rsqrt reciprocal exp tanh abs relu leaky_relu elu sigmoid silu mish gelu hardtanh hardswish hardsigmoid "
    "clamp clamp_min clamp_max maximum minimum where alias clone detach copy _to_copy _conj contiguous eq ne lt gt le ge".split()
)


def _pointwise(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    """Of several arguments that are broadcast: what any of them sees."""
    line: _Line | None = None
    for x in _tensors((*args, *options.values())):
        known = walk.lines.get(id(x))
        if known is None:
            continue
        here = known[1].moved(known[1].dim + result.ndim - x.ndim, known[1].inner)
        if line is not None and (here.dim, here.inner, len(here.low)) != (line.dim, line.inner, len(line.low)):
            raise _ObstacleError("mixes maps of different layout")
        line = here if line is None else line.also(here)
    assert line is not None
    for x in _tensors((*args, *options.values())):
        dim = line.dim - (result.ndim - x.ndim)
        if id(x) not in walk.lines and dim >= 0 and x.shape[dim] > 1:
            raise _ObstacleError("adds a table that holds a value for each position")
    return [line]


def _same(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> list[_Line]:
    return [walk.line(args[0])]


def _constant(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    """As large as a map, but the same for every image."""
    line = walk.line(args[0])
    return [_Line(line.dim, line.inner, np.full_like(line.low, np.inf), np.full_like(line.high, -np.inf))]


def _convolution(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    x, weight, _, stride, padding, dilation, transposed = args[:7]
    line = _spatial(walk, x, 2)
    axis = line.dim - 2
    kernel, step, pad, gap = weight.shape[line.dim], _pick(stride, axis), _pick(padding, axis), _pick(dilation, axis)
    row = np.arange(result.shape[line.dim])
    if not transposed:
        return [line.reading((row * step - pad + tap * gap, True) for tap in range(kernel))]
    # A row takes from the positions that it is `step * position - pad + tap * gap` of.
    sources = (row + pad - tap * gap for tap in range(kernel))
    return [line.reading((source // step, source % step == 0) for source in sources)]


def _pooling(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> list[_Line]:
    x, kernel, *rest = args
    line = _spatial(walk, x, 2)
    axis = line.dim - (x.ndim - 2)
    shape = next(_tensors([result])).shape
    side = _pick(kernel, axis)
    step = _pick(rest[0], axis) if rest and rest[0] else side
    pad = _pick(rest[1], axis) if len(rest) > 1 else 0
    gap = _pick(rest[2], axis) if len(rest) > 2 and isinstance(result, tuple) else 1  # only a maximum has dilation
    row = np.arange(shape[line.dim])
    seen = line.reading((row * step - pad + tap * gap, True) for tap in range(side))
    return [seen, _Line(seen.dim, 1, seen.low, seen.high, (side if gap == 1 else -1, step, pad))]


def _pooling_across_maps(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    """The mean over neighbouring maps in Krizhevsky's normalisation."""
    line = walk.line(args[0])
    axis = line.dim - (args[0].ndim - 3)
    if axis < 1 or _pick(args[1], axis) != 1 or _pick(args[2], axis) != 1:
        raise _ObstacleError("pools over space and maps at once")
    return [line]


def _unpooling(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    line, index = _spatial(walk, args[0], 2), walk.line(args[1])
    if index.pool is None or index.pool[0] != index.pool[1] or index.pool[2]:
        raise _ObstacleError("unpools windows that overlap, or that are not known")
    row = np.arange(result.shape[line.dim]) // index.pool[0]
    return [line.also(index).reading([(row, True)])]


def _bilinear(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    line, corners = _spatial(walk, args[0], 2), args[2]
    fine, coarse = result.shape[line.dim], len(line.low)
    row = np.arange(fine)
    # A row's place between two of the coarse ones, as a fraction.
    above, below = (row * (coarse - 1), max(fine - 1, 1)) if corners else ((2 * row + 1) * coarse - fine, 2 * fine)
    walk.resizings.append((walk.place()[0], Fraction(max(fine - 1, 1), max(coarse - 1, 1)) if corners else Fraction(fine, coarse)))
    return [line.reading([(above // below, True), (above // below + 1, above % below != 0)])]


def _nearest(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    line = _spatial(walk, args[0], 2)
    fine, coarse = result.shape[line.dim], len(line.low)
    walk.resizings.append((walk.place()[0], Fraction(fine, coarse)))
    return [line.reading([(np.arange(fine) * coarse // fine, True)])]


def _padding(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    """Of any kind: what is put there depends on where the border is, even where it mirrors. Negative pads cut."""
    line = walk.line(args[0])
    if line.inner > 1:
        raise _ObstacleError("pads a map whose axes are mixed")
    place = 2 * (args[0].ndim - 1 - line.dim)
    before = args[1][place] if place < len(args[1]) else 0
    return [line.reading([(np.arange(result.shape[line.dim]) - before, True)])]


def _slice(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    x, dim, start, end, step = (*args, *(None, None, None, 1)[len(args) - 1 :]) if len(args) < 5 else args
    line = walk.line(x)
    if (dim or 0) % x.ndim != line.dim:
        return [line]
    if line.inner > 1:
        raise _ObstacleError("cuts a map whose axes are mixed")
    part = slice(start, end, step)
    return [_Line(line.dim, 1, line.low[part], line.high[part])]


def _concatenation(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    dim = (args[1] if len(args) > 1 else 0) % result.ndim
    lines = [walk.line(x) for x in args[0]]
    if any((line.dim, line.inner, len(line.low)) != (lines[0].dim, lines[0].inner, len(lines[0].low)) or line.dim == dim for line in lines):
        raise _ObstacleError("puts parts of the image side by side")
    line = lines[0]
    for other in lines[1:]:
        line = line.also(other)
    return [line]


def _mean(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    x, dims = args[0], args[1] if len(args) > 1 else None
    line = walk.line(x)
    gone = sorted(dim % x.ndim for dim in dims) if dims else list(range(x.ndim))
    if line.dim in gone:
        where, layer = walk.place()
        if isinstance(layer, ImageMean):
            walk.means.append(where)
            return []  # known beforehand: the same for every part
        raise _ObstacleError("takes a mean over the whole image")
    kept = len(args) > 2 and args[2]
    return [line.moved(line.dim if kept else line.dim - sum(dim < line.dim for dim in gone), line.inner)]


def _batch_norm(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> list[_Line]:
    if args[5]:
        raise _ObstacleError("normalises by the statistics of the batch")
    return [walk.line(args[0])]


def _layer_norm(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> list[_Line]:
    line = walk.line(args[0])
    if line.dim >= args[0].ndim - len(args[1]):
        raise _ObstacleError("normalises by statistics of the whole image")
    return [line]


def _group_norm(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> list[_Line]:
    raise _ObstacleError("normalises by statistics of the whole image (group norm)")


def _reshape(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    """The axis stays one where it is a whole dimension, or a factor of one, of the new shape too."""
    line, shape = walk.line(args[0]), args[0].shape
    behind, inner = line.inner * int(np.prod(shape[line.dim + 1 :])), 1
    for dim in reversed(range(result.ndim)):
        inner = int(np.prod(result.shape[dim + 1 :]))
        if behind % inner == 0 and result.shape[dim] % (behind // inner * len(line.low)) == 0:
            return [line.moved(dim, behind // inner)]
    raise _ObstacleError("cuts the image into parts (attention in windows, or patches)")


def _permutation(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    line = walk.line(args[0])
    order = [dim % result.ndim for dim in args[1]]
    return [line.moved(order.index(line.dim), line.inner)]


def _transposition(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    line, ndim = walk.line(args[0]), result.ndim
    one, other = (args[1] % ndim, args[2] % ndim) if len(args) > 1 else (0, 1)
    return [line.moved({one: other, other: one}.get(line.dim, line.dim), line.inner)]


def _squeezing(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    x, line = args[0], walk.line(args[0])
    dims = args[1] if len(args) > 1 else [dim for dim, side in enumerate(x.shape) if side == 1]
    gone = [dim % x.ndim for dim in (dims if isinstance(dims, list | tuple) else [dims])]
    return [line.moved(line.dim - sum(dim < line.dim and x.shape[dim] == 1 for dim in gone), line.inner)]


def _unsqueezing(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    line = walk.line(args[0])
    return [line.moved(line.dim + (args[1] % result.ndim <= line.dim), line.inner)]


def _matrix_product(walk: _Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[_Line]:
    """A linear layer at every position; a product of positions with positions is attention."""
    left, right = args[-2:]
    if id(right) in walk.lines or any(id(x) in walk.lines for x in args[:-2]):
        raise _ObstacleError("attends to the whole image")
    line = walk.line(left)
    if line.dim == left.ndim - 1:
        raise _ObstacleError("has a layer that is fully connected to the image")
    return [line]


_RULES: dict[str, _Rule] = {
    "convolution": _convolution,
    "max_pool2d_with_indices": _pooling,
    "avg_pool2d": _pooling,
    "avg_pool3d": _pooling_across_maps,
    "max_unpool2d": _unpooling,
    "upsample_bilinear2d": _bilinear,
    "upsample_nearest2d": _nearest,
    "constant_pad_nd": _padding,
    "replication_pad2d": _padding,
    "reflection_pad2d": _padding,
    "slice": _slice,
    "cat": _concatenation,
    "mean": _mean,
    "sum": _mean,
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "view": _reshape,
    "_unsafe_view": _reshape,
    "permute": _permutation,
    "transpose": _transposition,
    "t": _transposition,
    "squeeze": _squeezing,
    "unsqueeze": _unsqueezing,
    "mm": _matrix_product,
    "addmm": _matrix_product,
    "bmm": _matrix_product,
    "expand": _same,
    "zeros_like": _constant,
    "empty_like": _constant,
    "ones_like": _constant,
}


def _spatial(walk: _Walk, x: Tensor, axes: int) -> _Line:
    """The line of a map whose axis is one of its last ones."""
    line = walk.line(x)
    if line.inner > 1 or line.dim < x.ndim - axes:
        raise _ObstacleError("convolves or resizes something that is no map")
    return line


def _pick(sides: Any, axis: int) -> int:
    """Of a number for both axes, or a list with one for each."""
    if isinstance(sides, int):
        return sides
    return int(sides[axis if len(sides) > 1 else 0])
