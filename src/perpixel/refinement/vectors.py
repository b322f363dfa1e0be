"""Short vectors of float32 as values in numba's compiled loops: a pixel's scores of all classes stay in registers.

numba's own vectorisation stops at loops whose length it does not know. Here the number of lanes is part of the type, taken from the length
of a tuple (`lanes(20)`), so each number of lanes is compiled, and cached, once. LLVM maps them to whatever the processor has.
"""

import itertools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

FLOAT = ir.FloatType()
INT = ir.IntType(32)
# Lanes of one access to memory. 32 bytes that begin at a multiple of 32 never lie on two cache lines, which costs most when they are
# written and read again a moment later; 64 bytes do unless rows are padded twice as much.
PART = 8


class Vector(types.Type):
    """numba's type of so many float32 lanes."""

    def __init__(self, lanes: int):
        self.lanes = lanes
        super().__init__(name=f"Vector({lanes})")


def _parts(lanes: int) -> list[Any]:
    """LLVM's vectors that hold the lanes, the last one shorter where PART does not divide them."""
    return [ir.VectorType(FLOAT, min(PART, lanes - start)) for start in range(0, lanes, PART)]


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector):
        super().__init__(manager, kind, ir.LiteralStructType(_parts(kind.lanes)))


def lanes(count: int) -> tuple[None, ...]:
    """What tells a compiled function the number of lanes."""
    return (None,) * count


def _split(builder: Any, value: Any) -> list[Any]:
    return [builder.extract_value(value, i) for i in range(len(value.type.elements))]


def _joined(builder: Any, parts: list[Any]) -> Any:
    whole = ir.Constant(ir.LiteralStructType([part.type for part in parts]), ir.Undefined)
    for i, part in enumerate(parts):
        whole = builder.insert_value(whole, part, i)
    return whole


def _spread(builder: Any, scalar: Any, kind: Any) -> Any:
    """The scalar in every lane of an LLVM vector."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(INT, kind.count), [0] * kind.count))


def _call(builder: Any, name: str, result: Any, arguments: list[Any], **options: Any) -> Any:
    """LLVM's own function of this name."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in arguments]), name)
    return builder.call(function, arguments, **options)


def _lanewise(builder: Any, name: str, *arguments: Any, **options: Any) -> Any:
    kind = arguments[0].type
    return _call(builder, f"llvm.{name}.v{kind.count}f32", kind, list(arguments), **options)


def _each(code: Callable[..., Any]) -> Callable[..., Any]:
    """A function of LLVM vectors, applied part by part."""

    def all_parts(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        split = [_split(builder, v) if isinstance(v.type, ir.LiteralStructType) else itertools.repeat(v) for v in values]
        return _joined(builder, [code(builder, *parts) for parts in zip(*split)])  # noqa: B905 - a scalar repeats for ever

    return all_parts


def _addresses(context: Any, builder: Any, array: Any, value: Any, start: Any, kinds: list[Any]) -> Any:
    data = context.make_array(array)(context, builder, value).data
    for i, kind in enumerate(kinds):
        yield builder.bitcast(builder.gep(data, [builder.add(start, start.type(i * PART))]), kind.as_pointer())


@intrinsic
def fetch(typing: Any, array: Any, index: Any) -> Any:
    """One element of the array's memory; unlike array[index], with no look at whether the index is negative."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(builder.gep(context.make_array(array)(context, builder, values[0]).data, [values[1]]))

    return array.dtype(array, types.intp), code


@intrinsic
def put(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write one element of the array's memory, with no look at the index."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[2], builder.gep(context.make_array(array)(context, builder, values[0]).data, [values[1]]))
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype), code


@intrinsic
def load(typing: Any, array: Any, start: Any, width: Any) -> Any:
    """Lanes from the float32 array's memory, from element `start` on; no check of bounds."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        places = _addresses(context, builder, array, values[0], values[1], _parts(len(width)))
        return _joined(builder, [builder.load(place, align=4) for place in places])

    return Vector(len(width))(array, types.intp, width), code


@intrinsic
def store(typing: Any, array: Any, start: Any, vector: Any) -> Any:
    """Write the lanes to the float32 array's memory, from element `start` on; no check of bounds."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        parts = _split(builder, values[2])
        for part, place in zip(parts, _addresses(context, builder, array, values[0], values[1], [p.type for p in parts]), strict=True):
            builder.store(part, place, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


@intrinsic
def filled(typing: Any, scalar: Any, width: Any) -> Any:
    """The scalar in every lane."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _joined(builder, [_spread(builder, values[0], kind) for kind in _parts(len(width))])

    return Vector(len(width))(types.float32, width), code


@intrinsic
def add_scaled(typing: Any, vector: Any, scale: Any, other: Any) -> Any:
    """vector + scale * other."""

    def code(builder: Any, one: Any, factor: Any, two: Any) -> Any:
        return _lanewise(builder, "fmuladd", _spread(builder, factor, one.type), two, one)

    return vector(vector, types.float32, other), _each(code)


@intrinsic
def farther(typing: Any, vector: Any, one: Any, two: Any) -> Any:
    """The larger of `vector` and |one - two|, lane by lane."""

    def code(builder: Any, most: Any, a: Any, b: Any) -> Any:
        return _lanewise(builder, "maxnum", most, _lanewise(builder, "fabs", builder.fsub(a, b)))

    return vector(vector, one, two), _each(code)


@intrinsic
def plus(typing: Any, one: Any, two: Any) -> Any:
    """The sum, lane by lane."""
    return one(one, two), _each(lambda builder, a, b: builder.fadd(a, b))


@intrinsic
def above(typing: Any, vector: Any, scalar: Any, scale: Any) -> Any:
    """(vector - scalar) * scale: exactly 0 where a lane equals the scalar."""

    def code(builder: Any, one: Any, low: Any, factor: Any) -> Any:
        return builder.fmul(builder.fsub(one, _spread(builder, low, one.type)), _spread(builder, factor, one.type))

    return vector(vector, types.float32, types.float32), _each(code)


def _halved(builder: Any, parts: list[Any], combine: Callable[[Any, Any], Any]) -> list[Any]:
    """Parts of one size combined into one, so that one reduction serves them all; a shorter last part stays by itself."""
    full = [part for part in parts if part.type == parts[0].type]
    while len(full) > 1:
        full = [combine(*full[i : i + 2]) if i + 1 < len(full) else full[i] for i in range(0, len(full), 2)]
    return full + parts[-1:] if parts[-1].type != parts[0].type else full


@intrinsic
def largest(typing: Any, vector: Any) -> Any:
    """The largest lane."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        most = None
        quick = ("nnan", "nsz")
        for part in _halved(builder, _split(builder, values[0]), lambda a, b: _lanewise(builder, "maxnum", a, b, fastmath=quick)):
            found = _call(builder, f"llvm.vector.reduce.fmax.v{part.type.count}f32", FLOAT, [part], fastmath=quick)
            most = found if most is None else _call(builder, "llvm.maxnum.f32", FLOAT, [most, found], fastmath=quick)
        return most

    return types.float32(vector), code


@intrinsic
def total(typing: Any, vector: Any) -> Any:
    """The sum of the lanes, in the order that is quickest."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        sum_ = FLOAT(0.0)
        for part in _halved(builder, _split(builder, values[0]), builder.fadd):
            name = f"llvm.vector.reduce.fadd.v{part.type.count}f32"
            sum_ = _call(builder, name, FLOAT, [sum_, part], fastmath=("reassoc",))
        return sum_

    return types.float32(vector), code


# exp(x) = 2**n * exp(r), |r| <= log(2) / 2. Of the polynomials 1 + r + ... of degree 6, the one whose largest relative error there is
# least, 3e-9 (Remez): less than float32 resolves, or fixed points of mean field would tremble.
_POLYNOMIAL = (0.00138146124, 0.0083687099, 0.0416683874, 0.166665207, 0.499999935, 1.0, 1.0)
# Adding it rounds a number below 2**21 to an integer, and leaves the integer plus float32's bias of exponents in the lowest bits.
_ROUND = 1.5 * 2**23 + 127
# Below this a power is 0. Products of powers with lattice weights so stay far above float32's denormals (1e-38), which are slow.
LOWEST = -50.0


@intrinsic
def power(typing: Any, vector: Any) -> Any:
    """exp of lanes that are at most 0; exactly 0 below LOWEST."""

    def code(builder: Any, scores: Any) -> Any:
        kind = scores.type
        whole = ir.VectorType(INT, kind.count)

        def every(number: float) -> Any:
            return ir.Constant(kind, [number] * kind.count)

        x = _lanewise(builder, "maxnum", scores, every(LOWEST))
        rounded = _lanewise(builder, "fmuladd", x, every(1.4426950408889634), every(_ROUND))
        n = builder.fsub(rounded, every(_ROUND))
        # log(2) in two parts, the first with few bits, so that n times it is exact (Cody & Waite 1980).
        r = _lanewise(builder, "fmuladd", n, every(-0.693359375), x)
        r = _lanewise(builder, "fmuladd", n, every(0.00021219444), r)
        p = every(_POLYNOMIAL[0])
        for coefficient in _POLYNOMIAL[1:]:
            p = _lanewise(builder, "fmuladd", p, r, every(coefficient))
        two_to_n = builder.bitcast(builder.shl(builder.bitcast(rounded, whole), ir.Constant(whole, [23] * kind.count)), kind)
        inside = builder.fcmp_ordered(">=", scores, every(LOWEST))
        return builder.select(inside, builder.fmul(p, two_to_n), every(0.0))

    return vector(vector), _each(code)
