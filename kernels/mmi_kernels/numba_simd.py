"""Blocks of float32 channels as one machine value inside numba code. Importing this file imports numba.

Place in the flow: `numba_loops.py` moves channels (the D axis) with these operations, 64, 32, 16 or 1 at once. numba
turns off LLVM's straight-line vectoriser, and its loop vectoriser cannot prove that the arrays do not overlap; saying
"sixty-four at once" explicitly is what makes the loops fast. LLVM splits a block into the registers the CPU has
(AVX-512, AVX2, SSE, NEON).

Memory is named by its address (int64, in bytes), as tensors give it: no array objects, so no bounds checks and no
reference counts in the loops. Products may be fused with sums, sums may be reassociated; NaN and infinities are kept.

Source: numba's extension interface (`@intrinsic`, primitive data models) over LLVM vector types.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_FLAGS = ("contract", "reassoc", "nsz")
_QUAD = 4  # what `sum4` returns


class Block(types.Type):
    """numba's name for a value of ``width`` float32 numbers."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(name=f"Block{width}")


@register_model(Block)
class _BlockModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, ir.VectorType(_FLOAT, numba_type.width))


class Operations(NamedTuple):
    """Operations on blocks of one width; a block in memory is at any float's address."""

    zero: Any  # () → zeros
    load: Any  # (address) → block
    store: Any  # (address, block)
    add: Any  # (block, block) → sum
    multiply: Any  # (block, block) → product
    fma: Any  # (factor, block, total) → total + factor · block, factor a float32 scalar
    pairs: Any  # (scalar, scalar) → the two in turns (not for a width of 1)
    sum4: Any  # (block, block, block, block) → the four blocks' sums, in an order that is fixed


def _shuffled(builder: Any, left: Any, right: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(_INT, len(lanes)), lanes))


def _halves(builder: Any, left: Any, right: Any, group: int) -> Any:
    """Each group of `group` numbers of left, then of right, folded to its half: lower half + upper half."""
    starts = range(0, 2 * left.type.count, group)
    low = [start + i for start in starts for i in range(group // 2)]
    folded = (_shuffled(builder, left, right, lanes) for lanes in (low, [lane + group // 2 for lane in low]))
    return builder.fadd(*folded, flags=_FLAGS)


def _load_store(vector: Any, block: Any) -> tuple[Any, Any]:
    @intrinsic
    def load(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(builder.inttoptr(args[0], vector.as_pointer()), align=4)

        return block(types.int64), generate

    @intrinsic
    def store(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[1], builder.inttoptr(args[0], vector.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, block), generate

    return load, store


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Asks for the cache line at an address, into the second-level cache: the first has few places for one stride."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _INT, _INT, _INT])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        read, second_level, data = (ir.Constant(_INT, number) for number in (0, 2, 1))
        builder.call(function, [builder.inttoptr(args[0], pointer), read, second_level, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def operations(width: int) -> Operations:
    """The operations on blocks of ``width`` numbers, a power of two."""
    block, vector = Block(width), ir.VectorType(_FLOAT, width)
    load, store = _load_store(vector, block)

    @intrinsic
    def zero(typing_context: Any) -> Any:
        return block(), lambda context, builder, signature, args: ir.Constant(vector, [0.0] * width)

    @intrinsic
    def add(typing_context: Any, left: Any, right: Any) -> Any:
        return block(block, block), lambda context, builder, signature, args: builder.fadd(*args, flags=_FLAGS)

    @intrinsic
    def multiply(typing_context: Any, left: Any, right: Any) -> Any:
        return block(block, block), lambda context, builder, signature, args: builder.fmul(*args, flags=_FLAGS)

    @intrinsic
    def fma(typing_context: Any, factor: Any, value: Any, total: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            undefined = ir.Constant(vector, ir.Undefined)
            single = builder.insert_element(undefined, args[0], ir.Constant(_INT, 0))
            factors = _shuffled(builder, single, undefined, [0] * width)
            return builder.fadd(args[2], builder.fmul(factors, args[1], flags=_FLAGS), flags=_FLAGS)

        return block(types.float32, block, block), generate

    @intrinsic
    def pairs(typing_context: Any, even: Any, odd: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pair = ir.Constant(ir.VectorType(_FLOAT, 2), ir.Undefined)
            for lane, number in enumerate(args):
                pair = builder.insert_element(pair, number, ir.Constant(_INT, lane))
            return _shuffled(builder, pair, pair, [0, 1] * (width // 2))

        return block(types.float32, types.float32), generate

    @intrinsic
    def sum4(typing_context: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if width == 1:
                left, right = (_shuffled(builder, *pair, [0, 1]) for pair in (args[:2], args[2:]))
                return _shuffled(builder, left, right, [0, 1, 2, 3])
            left, right, group = _halves(builder, *args[:2], width), _halves(builder, *args[2:], width), width // 2
            while group > 1:  # a transposition on the way: eleven steps for 16 channels where single sums take 32
                whole, half = _halves(builder, left, right, group), left.type.count // 2
                left = _shuffled(builder, whole, whole, [*range(half)])
                right = _shuffled(builder, whole, whole, [*range(half, 2 * half)])
                group //= 2
            return _shuffled(builder, left, right, [0, 1, 2, 3])

        return Block(_QUAD)(block, block, block, block), generate

    return Operations(zero, load, store, add, multiply, fma, pairs, sum4)


_EXP_WIDTH = 16
_SINGLE = ir.VectorType(_FLOAT, _EXP_WIDTH)
_LOG2E, _LN2, _LOWEST = 1.4426950408889634, 0.6931471805599453, -87.0
_EXP = (0.00138146, 0.00836871, 0.04166839, 0.16666521, 0.49999993)
"""e^r = 1 + r + r² · (((c₀ r + c₁) r + …) + c₄) on [−ln 2 / 2, ln 2 / 2]."""


def _filled(number: float) -> Any:
    return ir.Constant(_SINGLE, [number] * _EXP_WIDTH)


@intrinsic
def exp16(typing_context: Any, exponents: Any) -> Any:
    """e^x of sixteen x ≤ 0, NaN for NaN; 0 at −87 and below."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def fma(factor: Any, value: Any, total: Any) -> Any:
            return builder.fadd(total, builder.fmul(factor, value, flags=_FLAGS), flags=_FLAGS)

        whole = ir.VectorType(_INT, _EXP_WIDTH)
        counts = builder.fcmp_ordered(">", args[0], _filled(_LOWEST))
        x = builder.select(counts, args[0], _filled(_LOWEST))
        n = builder.fptosi(fma(x, _filled(_LOG2E), _filled(-0.5)), whole)  # towards 0, so the nearest
        r = fma(builder.sitofp(n, _SINGLE), _filled(-_LN2), x)
        tail = _filled(_EXP[0])
        for coefficient in _EXP[1:]:
            tail = fma(tail, r, _filled(coefficient))
        grown = fma(builder.fmul(r, r, flags=_FLAGS), tail, builder.fadd(r, _filled(1.0), flags=_FLAGS))
        biased = builder.add(n, ir.Constant(whole, [127] * _EXP_WIDTH))
        power = builder.bitcast(builder.shl(biased, ir.Constant(whole, [23] * _EXP_WIDTH)), _SINGLE)
        found = builder.select(counts, builder.fmul(grown, power, flags=_FLAGS), _filled(0.0))
        return builder.select(builder.fcmp_unordered("uno", args[0], args[0]), args[0], found)

    return Block(_EXP_WIDTH)(Block(_EXP_WIDTH)), generate


@intrinsic
def larger16(typing_context: Any, left: Any, right: Any) -> Any:
    """The larger of each two numbers; the right one where either is NaN."""
    block = Block(_EXP_WIDTH)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return block(block, block), generate


@intrinsic
def filled16(typing_context: Any, number: Any) -> Any:
    """Sixteen times the same number."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        undefined = ir.Constant(_SINGLE, ir.Undefined)
        single = builder.insert_element(undefined, args[0], ir.Constant(_INT, 0))
        return _shuffled(builder, single, undefined, [0] * _EXP_WIDTH)

    return Block(_EXP_WIDTH)(types.float32), generate


@intrinsic
def first16(typing_context: Any, value: Any, count: Any, other: Any) -> Any:
    """The first `count` numbers of a block, those of another after them."""
    block = Block(_EXP_WIDTH)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = ir.VectorType(_INT, _EXP_WIDTH)
        undefined = ir.Constant(whole, ir.Undefined)
        limit = builder.insert_element(undefined, builder.trunc(args[1], _INT), ir.Constant(_INT, 0))
        limit = _shuffled(builder, limit, undefined, [0] * _EXP_WIDTH)
        within = builder.icmp_signed("<", ir.Constant(whole, [*range(_EXP_WIDTH)]), limit)
        return builder.select(within, args[0], args[2])

    return block(block, types.int64, block), generate


@intrinsic
def first_of16(typing_context: Any, value: Any) -> Any:
    """A block's first number."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(args[0], ir.Constant(_INT, 0))

    return types.float32(Block(_EXP_WIDTH)), generate


def _swapped(distance: int) -> Any:
    block = Block(_EXP_WIDTH)

    @intrinsic
    def swapped(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _shuffled(builder, args[0], args[0], [lane ^ distance for lane in range(_EXP_WIDTH)])

        return block(block), generate

    return swapped


swapped1, swapped2, swapped4, swapped8 = (_swapped(distance) for distance in (1, 2, 4, 8))
"""A block's numbers exchanged with their neighbours at that distance, in pairs."""


@intrinsic
def divided16(typing_context: Any, above: Any, below: Any) -> Any:
    block = Block(_EXP_WIDTH)
    return block(block, block), lambda context, builder, signature, args: builder.fdiv(*args, flags=_FLAGS)


@intrinsic
def less16(typing_context: Any, left: Any, right: Any) -> Any:
    """left − right."""
    block = Block(_EXP_WIDTH)
    return block(block, block), lambda context, builder, signature, args: builder.fsub(*args, flags=_FLAGS)


load4, store4 = _load_store(ir.VectorType(_FLOAT, _QUAD), Block(_QUAD))
add4 = operations(_QUAD).add
load_float, store_float = _load_store(_FLOAT, types.float32)
load_int, _ = _load_store(_INT, types.int32)
