"""Short vectors of float32 as values in numba's compiled loops: a pixel's scores of all classes stay in registers.

numba's own vectorisation stops at loops whose length it does not know. Here the number of lanes is part of the type, taken from the length
of a tuple (`lanes(20)`), so each number of lanes is compiled, and cached, once. LLVM maps them to whatever the processor has.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

FLOAT = ir.FloatType()
INT = ir.IntType(32)


class Vector(types.Type):  # type: ignore[misc]
    """numba's type of so many float32 lanes."""

    def __init__(self, lanes: int):
        self.lanes = lanes
        super().__init__(name=f"Vector({lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector):
        super().__init__(manager, kind, ir.VectorType(FLOAT, kind.lanes))


def lanes(count: int) -> tuple[None, ...]:
    """What tells a compiled function the number of lanes."""
    return (None,) * count


def _spread(builder: Any, scalar: Any, kind: Any) -> Any:
    """The scalar in every lane."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(INT, kind.count), [0] * kind.count))


def _call(builder: Any, name: str, result: Any, arguments: list[Any], **options: Any) -> Any:
    """LLVM's own function of this name."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in arguments]), name)
    return builder.call(function, arguments, **options)


def _lanewise(builder: Any, name: str, *arguments: Any) -> Any:
    kind = arguments[0].type
    return _call(builder, f"llvm.{name}.v{kind.count}f32", kind, list(arguments))


def _address(context: Any, builder: Any, array: Any, value: Any, start: Any, kind: Any) -> Any:
    data = context.make_array(array)(context, builder, value).data
    return builder.bitcast(builder.gep(data, [start]), kind.as_pointer())


@intrinsic
def load(typing: Any, array: Any, start: Any, width: Any) -> Any:
    """Lanes from the float32 array's memory, from element `start` on; no check of bounds."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.VectorType(FLOAT, len(width))
        return builder.load(_address(context, builder, array, values[0], values[1], kind), align=4)

    return Vector(len(width))(array, types.intp, width), code


@intrinsic
def store(typing: Any, array: Any, start: Any, vector: Any) -> Any:
    """Write the lanes to the float32 array's memory, from element `start` on; no check of bounds."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[2], _address(context, builder, array, values[0], values[1], values[2].type), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


@intrinsic
def filled(typing: Any, scalar: Any, width: Any) -> Any:
    """The scalar in every lane."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _spread(builder, values[0], ir.VectorType(FLOAT, len(width)))

    return Vector(len(width))(types.float32, width), code


@intrinsic
def add_scaled(typing: Any, vector: Any, scale: Any, other: Any) -> Any:
    """vector + scale * other."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _lanewise(builder, "fmuladd", _spread(builder, values[1], values[0].type), values[2], values[0])

    return vector(vector, types.float32, other), code


@intrinsic
def farther(typing: Any, vector: Any, one: Any, two: Any) -> Any:
    """The larger of `vector` and |one - two|, lane by lane."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _lanewise(builder, "maxnum", values[0], _lanewise(builder, "fabs", builder.fsub(values[1], values[2])))

    return vector(vector, one, two), code


@intrinsic
def plus(typing: Any, one: Any, two: Any) -> Any:
    """The sum, lane by lane."""
    return one(one, two), lambda context, builder, signature, values: builder.fadd(*values)


@intrinsic
def largest(typing: Any, vector: Any) -> Any:
    """The largest lane."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _call(builder, f"llvm.vector.reduce.fmax.v{vector.lanes}f32", FLOAT, values, fastmath=("nnan", "nsz"))

    return types.float32(vector), code


@intrinsic
def total(typing: Any, vector: Any) -> Any:
    """The sum of the lanes, in the order that is quickest."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        name = f"llvm.vector.reduce.fadd.v{vector.lanes}f32"
        return _call(builder, name, FLOAT, [FLOAT(0.0), values[0]], fastmath=("reassoc",))

    return types.float32(vector), code


# exp(x) = 2**n * exp(r), |r| <= log(2) / 2: Taylor's polynomial of degree 6 leaves a relative error of 2e-7 there.
_TAYLOR = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
# Below this a power is 0. Products of powers with lattice weights so stay far above float32's denormals (1e-38), which are slow.
LOWEST = -50.0


@intrinsic
def power(typing: Any, vector: Any) -> Any:
    """exp of lanes that are at most 0; exactly 0 below LOWEST."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = values[0].type
        whole = ir.VectorType(INT, kind.count)

        def every(number: float) -> Any:
            return ir.Constant(kind, [number] * kind.count)

        x = _lanewise(builder, "maxnum", values[0], every(LOWEST))
        n = _lanewise(builder, "rint", builder.fmul(x, every(1.4426950408889634)))
        # log(2) in two parts, the first with few bits, so that n times it is exact (Cody & Waite 1980).
        r = _lanewise(builder, "fmuladd", n, every(-0.693359375), x)
        r = _lanewise(builder, "fmuladd", n, every(0.00021219444), r)
        p = every(_TAYLOR[0])
        for coefficient in _TAYLOR[1:]:
            p = _lanewise(builder, "fmuladd", p, r, every(coefficient))
        bits = builder.add(builder.fptosi(n, whole), ir.Constant(whole, [127] * kind.count))
        two_to_n = builder.bitcast(builder.shl(bits, ir.Constant(whole, [23] * kind.count)), kind)
        inside = builder.fcmp_ordered(">=", values[0], every(LOWEST))
        return builder.select(inside, builder.fmul(p, two_to_n), every(0.0))

    return vector(vector), code
