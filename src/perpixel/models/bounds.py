"""What operations do to the bounds that `dependency.py` walks with: the first and last row of the image that each row of a map sees."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from perpixel.models.layers import ImageMean


class ObstacleError(Exception):
    """Why a model has no bounded field."""


@dataclass(frozen=True)
class Line:
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

    def reading(self, taps: Iterable[tuple[np.ndarray, np.ndarray | bool]]) -> "Line":
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
        return Line(self.dim, self.inner, low, high)

    def also(self, other: "Line") -> "Line":
        return Line(self.dim, self.inner, np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    def moved(self, dim: int, inner: int = 1) -> "Line":
        return Line(dim, inner, self.low, self.high, self.pool)


class Walk(TorchDispatchMode):
    """Notes a `Line` for every tensor that comes of the image."""

    def __init__(self, image: Tensor, place: Callable[[], tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.place = place
        self.coarsest: Tensor | None = None  # the encoder's last map, once it is there
        self.axis = 0  # the one that is looked at now: rows or columns
        # For each axis. Tensors are kept, so that no two have the same id.
        self.lines: tuple[dict[int, tuple[Tensor, Line]], ...] = ({}, {})
        self.resizings: tuple[list[tuple[str, Fraction]], ...] = ([], [])
        self.means: tuple[list[str], ...] = ([], [])
        for axis, side in enumerate(image.shape[-2:]):
            row = np.arange(side, dtype=float)
            self.lines[axis][id(image)] = (image, Line(image.ndim - 2 + axis, 1, row, row))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        options = dict(kwargs or {})
        name = func.overloadpacket.__name__.removesuffix("_")
        # Batch norm is a long chain of small operations on the meta device; its result is as large as its input.
        result = (torch.empty_like(args[0]),) if name == "native_batch_norm" else func(*args, **options)
        if any(id(x) in known for x in _tensors((*args, *options.values())) for known in self.lines):
            for self.axis in (0, 1):
                lines = self._behind(name, args, options, result)
                for x, line in zip(_tensors([result]), lines, strict=False):
                    self.lines[self.axis][id(x)] = (x, line)
        if name == "native_batch_norm":
            return result[0], torch.empty(0, device="meta"), torch.empty(0, device="meta")
        return result

    def knows(self, x: Tensor) -> bool:
        return id(x) in self.lines[self.axis]

    def _behind(self, name: str, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> list[Line]:
        """The lines of the results; none where they are the same for every image."""
        where, _ = self.place()
        if name in _RULES:
            rule = _RULES[name]
        elif name in _POINTWISE:
            rule = _pointwise
        elif "softmax" in name or "attention" in name:
            raise ObstacleError(f"{where} attends to the whole image ({name})")
        else:
            raise ObstacleError(f"{where} has an operation whose field is not known ({name})")
        try:
            return rule(self, args, options, result)
        except ObstacleError as error:
            raise ObstacleError(f"{where} {error}") from None

    def line(self, x: Tensor) -> Line:
        if not self.knows(x):
            raise ObstacleError("mixes the image with something else in a way that is not followed")
        return self.lines[self.axis][id(x)][1]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among arguments or results, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


# What an operation does to the lines: (walk, its arguments and options, its results) -> the lines of its results, in order.
_Rule = Callable[[Walk, tuple[Any, ...], dict[str, Any], Any], list[Line]]

_POINTWISE = frozenset(
    """
    add sub rsub mul div neg pow sqrt rsqrt reciprocal exp tanh abs relu leaky_relu elu sigmoid silu mish gelu hardtanh
    hardswish hardsigmoid clamp clamp_min clamp_max maximum minimum where alias clone detach _to_copy contiguous eq ne lt gt
    le ge
    """.split()  # noqa: SIM905 one word a line would take forty
)


def _pointwise(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    """Of several arguments that are broadcast: what any of them sees."""
    line: Line | None = None
    operands = list(_tensors((*args, *options.values())))
    for x in operands:
        if not walk.knows(x):
            continue
        here = walk.line(x)
        here = here.moved(here.dim + result.ndim - x.ndim, here.inner)
        if line is not None and (here.dim, here.inner, len(here.low)) != (line.dim, line.inner, len(line.low)):
            raise ObstacleError("mixes maps of different layout")
        line = here if line is None else line.also(here)
    for x in operands:
        dim = line.dim - (result.ndim - x.ndim) if line else -1
        if not walk.knows(x) and dim >= 0 and x.shape[dim] > 1:
            raise ObstacleError("adds a table that holds a value for each position")
    return [line] if line else []


def _same(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> list[Line]:
    return [walk.line(args[0])]


def _constant(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    """As large as a map, but the same for every image."""
    line = walk.line(args[0])
    return [Line(line.dim, line.inner, np.full_like(line.low, np.inf), np.full_like(line.high, -np.inf))]


def _convolution(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
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


def _pooling(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> list[Line]:
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
    return [seen, Line(seen.dim, 1, seen.low, seen.high, (side if gap == 1 else -1, step, pad))]


def _pooling_across_maps(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    """The mean over neighbouring maps in Krizhevsky's normalisation."""
    line = walk.line(args[0])
    axis = line.dim - (args[0].ndim - 3)
    if axis < 1 or _pick(args[1], axis) != 1 or _pick(args[2], axis) != 1:
        raise ObstacleError("pools over space and maps at once")
    return [line]


def _unpooling(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    line, index = _spatial(walk, args[0], 2), walk.line(args[1])
    if index.pool is None or index.pool[0] != index.pool[1] or index.pool[2]:
        raise ObstacleError("unpools windows that overlap, or that are not known")
    row = np.arange(result.shape[line.dim]) // index.pool[0]
    return [line.also(index).reading([(row, True)])]


def _bilinear(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    line, corners = _spatial(walk, args[0], 2), args[2]
    fine, coarse = result.shape[line.dim], len(line.low)
    row = np.arange(fine)
    # A row's place between two of the coarse ones, as a fraction.
    above, below = (row * (coarse - 1), max(fine - 1, 1)) if corners else ((2 * row + 1) * coarse - fine, 2 * fine)
    walk.resizings[walk.axis].append(
        (walk.place()[0], Fraction(max(fine - 1, 1), max(coarse - 1, 1)) if corners else Fraction(fine, coarse))
    )
    return [line.reading([(above // below, True), (above // below + 1, above % below != 0)])]


def _nearest(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    line = _spatial(walk, args[0], 2)
    fine, coarse = result.shape[line.dim], len(line.low)
    walk.resizings[walk.axis].append((walk.place()[0], Fraction(fine, coarse)))
    return [line.reading([(np.arange(fine) * coarse // fine, True)])]


def _padding(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    """Of any kind: what is put there depends on where the border is, even where it mirrors. Negative pads cut."""
    line = walk.line(args[0])
    if line.inner > 1:
        raise ObstacleError("pads a map whose axes are mixed")
    place = 2 * (args[0].ndim - 1 - line.dim)
    before = args[1][place] if place < len(args[1]) else 0
    return [line.reading([(np.arange(result.shape[line.dim]) - before, True)])]


def _slice(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    x, dim, start, end, step = (*args, *(None, None, None, 1)[len(args) - 1 :]) if len(args) < 5 else args
    line = walk.line(x)
    if (dim or 0) % x.ndim != line.dim:
        return [line]
    if line.inner > 1:
        raise ObstacleError("cuts a map whose axes are mixed")
    part = slice(start, end, step)
    return [Line(line.dim, 1, line.low[part], line.high[part])]


def _concatenation(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    dim = (args[1] if len(args) > 1 else 0) % result.ndim
    lines = [walk.line(x) for x in args[0]]
    if any((line.dim, line.inner, len(line.low)) != (lines[0].dim, lines[0].inner, len(lines[0].low)) or line.dim == dim for line in lines):
        raise ObstacleError("puts parts of the image side by side")
    line = lines[0]
    for other in lines[1:]:
        line = line.also(other)
    return [line]


def _mean(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    x, dims = args[0], args[1] if len(args) > 1 else None
    line = walk.line(x)
    gone = sorted(dim % x.ndim for dim in dims) if dims else list(range(x.ndim))
    if line.dim in gone:
        where, layer = walk.place()
        if isinstance(layer, ImageMean):
            if x is not walk.coarsest:
                raise ObstacleError("takes the mean of another map than the encoder's coarsest")
            walk.means[walk.axis].append(where)
            return []  # known beforehand: the same for every part
        raise ObstacleError("takes a mean over the whole image")
    kept = len(args) > 2 and args[2]
    return [line.moved(line.dim if kept else line.dim - sum(dim < line.dim for dim in gone), line.inner)]


def _batch_norm(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> list[Line]:
    if args[5]:
        raise ObstacleError("normalises by the statistics of the batch")
    return [walk.line(args[0])]


def _layer_norm(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> list[Line]:
    line = walk.line(args[0])
    if line.dim >= args[0].ndim - len(args[1]):
        raise ObstacleError("normalises by statistics of the whole image")
    return [line]


def _group_norm(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> list[Line]:
    raise ObstacleError("normalises by statistics of the whole image (group norm)")


def _reshape(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    """The axis stays one where it is a whole dimension, or a factor of one, of the new shape too."""
    line, shape = walk.line(args[0]), args[0].shape
    behind, inner = line.inner * int(np.prod(shape[line.dim + 1 :])), 1
    for dim in reversed(range(result.ndim)):
        inner = int(np.prod(result.shape[dim + 1 :]))
        if behind % inner == 0 and result.shape[dim] % (behind // inner * len(line.low)) == 0:
            return [line.moved(dim, behind // inner)]
    raise ObstacleError("cuts the image into parts (attention in windows, or patches)")


def _permutation(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    line = walk.line(args[0])
    order = [dim % result.ndim for dim in args[1]]
    return [line.moved(order.index(line.dim), line.inner)]


def _transposition(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    line, ndim = walk.line(args[0]), result.ndim
    one, other = (args[1] % ndim, args[2] % ndim) if len(args) > 1 else (0, 1)
    return [line.moved({one: other, other: one}.get(line.dim, line.dim), line.inner)]


def _squeezing(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    x, line = args[0], walk.line(args[0])
    dims = args[1] if len(args) > 1 else [dim for dim, side in enumerate(x.shape) if side == 1]
    gone = [dim % x.ndim for dim in (dims if isinstance(dims, list | tuple) else [dims])]
    return [line.moved(line.dim - sum(dim < line.dim and x.shape[dim] == 1 for dim in gone), line.inner)]


def _unsqueezing(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    line = walk.line(args[0])
    return [line.moved(line.dim + (args[1] % result.ndim <= line.dim), line.inner)]


def _matrix_product(walk: Walk, args: tuple[Any, ...], options: dict[str, Any], result: Tensor) -> list[Line]:
    """A linear layer at every position; a product of positions with positions is attention."""
    left, right = args[-2:]
    if walk.knows(right) or any(walk.knows(x) for x in args[:-2]):
        raise ObstacleError("attends to the whole image")
    line = walk.line(left)
    if line.dim == left.ndim - 1:
        raise ObstacleError("has a layer that is fully connected to the image")
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


def _spatial(walk: Walk, x: Tensor, axes: int) -> Line:
    """The line of a map whose axis is one of its last ones."""
    line = walk.line(x)
    if line.inner > 1 or line.dim < x.ndim - axes:
        raise ObstacleError("convolves or resizes something that is no map")
    return line


def _pick(sides: Any, axis: int) -> int:
    """Of a number for both axes, or a list with one for each."""
    if isinstance(sides, int):
        return sides
    return int(sides[axis if len(sides) > 1 else 0])
