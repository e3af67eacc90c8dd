"""Steps of the kernels written in LLVM's language, where numba's own code is missing or slow.

Arrays must be contiguous, and their bounds are not checked.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

WORD = 8
"""Bytes of a uint64."""
TILE = 8
"""Side of the square that transpose_tile transposes."""


def _add_product_in_llvm(context, total, a, b) -> Any:
    # numba widens operands to 64 bits. LLVM turns that back into the processor's 16-bit products in
    # some loops only, and the others are four times slower.
    def emit(context, builder, signature, arguments):
        wide, narrow = ir.IntType(32), ir.IntType(16)
        product = builder.mul(*(builder.sext(value, wide) for value in arguments[1:]))
        upper = builder.trunc(builder.lshr(product, ir.Constant(wide, 16)), narrow)
        return builder.add(arguments[0], upper)

    return types.int16(types.int16, types.int16, types.int16), emit


def _pointer(context, builder, signature, arguments, array: int, index: Any, kind: ir.Type) -> Any:
    """A pointer to element `index` of the argument number `array`, which is an array."""
    wrapped = context.make_array(signature.args[array])(context, builder, arguments[array])
    return builder.bitcast(builder.gep(wrapped.data, [index]), kind.as_pointer())


def _load_word_in_llvm(context, array, index) -> Any:
    def emit(context, builder, signature, arguments):
        word = ir.IntType(64)
        place = _pointer(context, builder, signature, arguments, 0, arguments[1], word)
        return builder.bswap(builder.load(place, align=1))

    return types.uint64(array, types.uint64), emit


def _copy_word_in_llvm(context, source, start, out, place) -> Any:
    def emit(context, builder, signature, arguments):
        word = ir.IntType(64)
        old = _pointer(context, builder, signature, arguments, 0, arguments[1], word)
        new = _pointer(context, builder, signature, arguments, 2, arguments[3], word)
        value = builder.load(old, align=1)
        builder.store(value, new, align=1)
        return value

    return types.uint64(source, types.int64, out, types.int64), emit


def _transposed(builder, rows: list[Any], width: int) -> list[Any]:
    """Transpose [8, width] elements, given and returned as eight vectors of `width`.

    From a loop over elements LLVM makes no shuffle instructions.
    """
    halves = [
        ir.Constant(
            ir.VectorType(ir.IntType(32), width),
            [first + to // 2 + width * (to % 2) for to in range(width)],
        )
        for first in (0, width // 2)
    ]
    # Each round moves the highest bit of an element's index to its lowest; a row's number has 3.
    for _ in range(3):
        pairs = zip(rows[:4], rows[4:], strict=True)
        rows = [builder.shuffle_vector(*pair, half) for pair in pairs for half in halves]
    return rows


def _transpose_tile_in_llvm(context, source, start, step, out, place, out_step) -> Any:
    def emit(context, builder, signature, arguments):
        kind = ir.VectorType(context.get_data_type(source.dtype), TILE)

        def row(array, first, step, number):
            offset = builder.mul(step, ir.Constant(ir.IntType(64), number))
            index = builder.add(first, offset)
            return _pointer(context, builder, signature, arguments, array, index, kind)

        rows = [
            builder.load(row(0, arguments[1], arguments[2], number), align=1)
            for number in range(TILE)
        ]
        for number, value in enumerate(_transposed(builder, rows, TILE)):
            builder.store(value, row(3, arguments[4], arguments[5], number), align=1)
        return context.get_dummy_value()

    number = types.int64
    return types.void(source, number, number, out, number, number), emit


def _interleave_in_llvm(context, source, start, out, place) -> Any:
    def emit(context, builder, signature, arguments):
        kind = ir.VectorType(ir.IntType(8), 16)

        def row(array, first, number):
            index = builder.add(first, ir.Constant(ir.IntType(64), 16 * number))
            return _pointer(context, builder, signature, arguments, array, index, kind)

        rows = [builder.load(row(0, arguments[1], number), align=1) for number in range(8)]
        for number, value in enumerate(_transposed(builder, rows, 16)):
            builder.store(value, row(2, arguments[3], number), align=1)
        return context.get_dummy_value()

    return types.void(source, types.int64, out, types.int64), emit


add_product: Any = intrinsic(_add_product_in_llvm)
"""add_product(total, a, b): total + (a * b >> 16) of int16; the sum wraps around."""

load_word: Any = intrinsic(_load_word_in_llvm)
"""load_word(array, index): eight bytes of a uint8 array as one big-endian uint64."""

copy_word: Any = intrinsic(_copy_word_in_llvm)
"""copy_word(source, start, out, place): copy eight bytes between uint8 arrays. Returns them as a
uint64 in the processor's byte order."""

transpose_tile: Any = intrinsic(_transpose_tile_in_llvm)
"""transpose_tile(source, start, step, out, place, out_step): transpose TILE x TILE elements of
source, from `start` with rows `step` apart, into out, from `place` with rows `out_step` apart."""

interleave: Any = intrinsic(_interleave_in_llvm)
"""interleave(source, start, out, place): transpose 8 x 16 bytes of source into 16 x 8 of out."""
