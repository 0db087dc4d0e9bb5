"""Sixteen float32 channels as one machine value inside numba code. Importing this file imports numba.

Place in the flow: `numba_loops.py` moves channels (the D axis) in blocks of 16 with these operations. numba turns off
LLVM's straight-line vectoriser, and its loop vectoriser cannot prove that the arrays do not overlap; saying "sixteen at
once" explicitly is what makes the loops fast. LLVM splits the block into the registers the CPU has (AVX-512, AVX2,
SSE, NEON).

`load16(array, i)` and `store16(array, i, block)` touch array[i : i + 16] of a one-dimensional contiguous float32 array,
without bounds checks. Products may be fused with sums, sums may be reassociated; NaN and infinities are kept.

Source: numba's extension interface (`@intrinsic`, primitive data models) over LLVM vector types.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

WIDTH = 16

_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
_LANE = ir.IntType(32)
_FLAGS = ("contract", "reassoc", "nsz")


class Block16(types.Type):
    """numba's name for the sixteen-channel value."""

    def __init__(self) -> None:
        super().__init__(name="Block16")


@register_model(Block16)
class _Block16Model(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _VECTOR)


block16 = Block16()


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())


def _shuffled(builder: Any, vector: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(_LANE, len(lanes)), lanes)
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


@intrinsic
def zero16(typing_context: Any) -> Any:
    """() → sixteen zeros."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(_VECTOR, [0.0] * WIDTH)

    return block16(), generate


@intrinsic
def load16(typing_context: Any, array: Any, index: Any) -> Any:
    """(array, index) → array[index : index + 16]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loaded = builder.load(_address(context, builder, signature.args[0], args[0], args[1]))
        loaded.align = 4  # any float boundary
        return loaded

    return block16(array, index), generate


@intrinsic
def store16(typing_context: Any, array: Any, index: Any, block: Any) -> Any:
    """array[index : index + 16] = block."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = builder.store(args[2], _address(context, builder, signature.args[0], args[0], args[1]))
        stored.align = 4
        return context.get_dummy_value()

    return types.void(array, index, block), generate


@intrinsic
def fma16(typing_context: Any, factor: Any, block: Any, total: Any) -> Any:
    """total + factor · block, factor a float32 scalar."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        single = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), args[0], ir.Constant(_LANE, 0))
        factors = _shuffled(builder, single, [0] * WIDTH)
        return builder.fadd(args[2], builder.fmul(factors, args[1], flags=_FLAGS), flags=_FLAGS)

    return block16(types.float32, block, total), generate


@intrinsic
def dot16(typing_context: Any, left: Any, right: Any) -> Any:
    """Σ left · right, a float32 scalar; summed pairwise, halves first, so the order is fixed."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, width = builder.fmul(args[0], args[1], flags=_FLAGS), WIDTH
        while width > 1:
            width //= 2
            low, high = _shuffled(builder, sums, [*range(width)]), _shuffled(builder, sums, [*range(width, 2 * width)])
            sums = builder.fadd(low, high, flags=_FLAGS)
        return builder.extract_element(sums, ir.Constant(_LANE, 0))

    return types.float32(left, right), generate
