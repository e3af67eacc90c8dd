"""Antialiased bicubic resizing as Pillow and torchvision do it, in fixed point.

It sums the upper halves of 16-bit products, `(a * b) >> 16`, which one vector instruction computes
for 16 to 32 pixels. Integer sums are the same on every processor, with vectors of any width.
"""

import math

import numpy as np

from selfray.pixels.compiled import compiled
from selfray.pixels.intrinsics import TILE, add_product, transpose_tile

i16, i64, u8, u64 = np.int16, np.int64, np.uint8, np.uint64
ZERO = i64(0)
"""For an int64 parameter: for a literal 0, numba would compile the function once more."""


@compiled
def _cubic(distance):
    """The weight of a pixel at this distance, by Keys' kernel with a = -0.5 (Pillow's)."""
    distance = abs(distance)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return near if distance < 1 else far if distance < 2 else 0.0


# To slice an array costs numba two atomic additions, which take as long as the work on one line of
# pixels. So the kernels below take whole arrays and the index of each line's first pixel. These
# indices are unsigned, because numba tests each signed one for being negative.


@compiled
def weigh(lines, places, weights, new, number, out, to, length):
    """Add up weighted lines: out[to + i] = sum over k of lines[places[k] + i] * weights[new, k].

    `number` lines of `length` int16; weights are int16 [new pixels, n], where 2**15 is 1. The sum
    has one fractional bit less than the lines. Six lines are added at a time, so that partial sums
    stay in registers: from `number` up to a multiple of six the weights must be 0, and the places
    may be any line.
    """
    # Products are cut, not rounded, which loses half a unit each on average. Give it back here.
    half = i16((number + 1) // 2)
    to, length = u64(to), u64(length)
    for k in range(0, number, 6):
        a, b, c = places[k], places[k + 1], places[k + 2]
        d, e, f = places[k + 3], places[k + 4], places[k + 5]
        u, v, w = weights[new, k], weights[new, k + 1], weights[new, k + 2]
        x, y, z = weights[new, k + 3], weights[new, k + 4], weights[new, k + 5]
        if number <= 4:
            for i in range(length):
                total = add_product(add_product(half, lines[a + i], u), lines[b + i], v)
                out[to + i] = add_product(add_product(total, lines[c + i], w), lines[d + i], x)
        elif k == 0:
            for i in range(length):
                total = add_product(add_product(half, lines[a + i], u), lines[b + i], v)
                total = add_product(add_product(total, lines[c + i], w), lines[d + i], x)
                out[to + i] = add_product(add_product(total, lines[e + i], y), lines[f + i], z)
        elif number - k <= 3:
            for i in range(length):
                total = add_product(add_product(out[to + i], lines[a + i], u), lines[b + i], v)
                out[to + i] = add_product(total, lines[c + i], w)
        else:
            for i in range(length):
                total = add_product(add_product(out[to + i], lines[a + i], u), lines[b + i], v)
                total = add_product(add_product(total, lines[c + i], w), lines[d + i], x)
                out[to + i] = add_product(add_product(total, lines[e + i], y), lines[f + i], z)


@compiled
def room_for(number):
    """The smallest multiple of six that is at least `number`."""
    return (number + 5) // 6 * 6


@compiled
def padded_length(length):
    """`length` int16, rounded up to a multiple of 32: rows start on 64-byte cache lines."""
    return -(-length // 32) * 32


@compiled
def resampling(length, start, span, size, flip):
    """A plan that resizes [start, start + span) of `length` old pixels to `size` new ones.

    Returns (first, weights, number): for each new pixel the first old one that it sees, int64
    [size], the weights of the old pixels from there on, int16 [size, n] where 2**15 is 1, and how
    many of these columns are used. With `flip` the new pixels come in reverse order.

    A place beyond an edge means the pixel at the edge. A weight there can exceed 1, which int16
    cannot hold; the excess goes to the place beyond the edge.
    """
    step = span / size
    scale = max(step, 1.0)
    room = room_for(int(4 * scale) + 2)
    first, weights = np.empty(size, i64), np.zeros((size, room), i16)
    counts, offsets, totals = np.empty(size, i64), np.empty(size), np.zeros(size)
    most = 0
    for new in range(size):
        centre = start + ((size - 1 - new if flip else new) + 0.5) * step
        low = max(0, int(centre - 2 * scale + 0.5))
        counts[new] = min(length, int(centre + 2 * scale + 0.5)) - low
        most = max(most, counts[new])
        first[new] = low
        offsets[new] = low + 0.5 - centre
    values = np.empty((most, size))
    for k in range(most):
        for new in range(size):
            value = _cubic((offsets[new] + k) * (1 / scale))
            value = value if k < counts[new] else 0.0
            values[k, new] = value
            totals[new] += value
    for new in range(size):
        rest, peak, unit = 32768, 0, 32768 / totals[new]
        for k in range(counts[new]):
            weight = i64(math.floor(values[k, new] * unit + 0.5))
            weights[new, k] = i16(min(weight, 32767))
            rest -= weight
            peak = k if values[k, new] > values[peak, new] else peak
        # The largest weight takes up what rounding left, so that the weights sum to exactly 1 and a
        # flat area stays flat.
        largest = i64(math.floor(values[peak, new] * unit + 0.5)) + rest
        weights[new, peak] = i16(min(largest, 32767))
        if largest > 32767:
            if first[new] == 0 and peak == 0:
                for k in range(counts[new], 0, -1):
                    weights[new, k] = weights[new, k - 1]
                weights[new, 0] = i16(largest - 32767)
                first[new] = -1
            else:
                weights[new, counts[new]] = i16(largest - 32767)
            most = max(most, counts[new] + 1)
    return first, weights, most


@compiled
def resize_rows(pixels, starts, stride, window, plan, lines, length):
    """Resize a window (top, left, height, width) along its height, by a plan of `resampling`.

    Channels start at the indices `starts` of pixels uint8 [n], and their rows lie `stride` apart.
    They come out side by side in lines int16 [size, length], with 6 fractional bits.
    """
    top, left, height, width = window
    first, weights, number = plan
    count = weights.shape[1] + 1
    ring, places = np.empty(count * length, i16), np.zeros(count, u64)
    ready = 0
    for row in range(len(first)):
        while ready < min(height, first[row] + number):
            to = u64(ready % count * length)
            for channel in range(len(starts)):
                start = u64(starts[channel] + (top + ready) * stride + left)
                for i in range(u64(width)):  # 7 fractional bits
                    ring[to + i] = i16(pixels[start + i]) << 7
                to += u64(width)
            ready += 1
        for k in range(number):
            line = min(max(first[row] + k, 0), height - 1)
            places[k] = line % count * length
        weigh(ring, places, weights, row, number, lines, row * length, length)


@compiled
def cut_fifth(value):
    """The whole part of a number with 5 fractional bits, clamped to [0, 255]."""
    value = i16(value) >> 5
    value = value if value > 0 else i64(0)
    return u8(value if value < 255 else i64(255))


@compiled
def resize_columns(columns, width, length, plan, pixels):
    """Resize along the width, by a plan of `resampling`.

    `columns` holds `width` columns of `length` int16 with 6 fractional bits, one after the other;
    pixels gets as many columns of `length` uint8 as the plan has new pixels.
    """
    first, weights, number = plan
    line, places = np.empty(length, i16), np.zeros(weights.shape[1], u64)
    for column in range(len(first)):
        for k in range(number):
            places[k] = min(max(first[column] + k, 0), width - 1) * length
        weigh(columns, places, weights, column, number, line, ZERO, length)
        to = u64(column * length)
        for i in range(u64(length)):
            pixels[to + i] = cut_fifth(i16(line[i] + i16(16)))


@compiled
def transpose(source, start, step, out, place, out_step, height, width):
    """Transpose [height, width] elements of `source` into `out`.

    They start at index `start` with rows `step` apart, and come out at `place` with rows `out_step`
    apart.
    """
    whole_height, whole_width = height // TILE * TILE, width // TILE * TILE
    for row in range(0, whole_height, TILE):
        for column in range(0, whole_width, TILE):
            old, new = start + row * step + column, place + column * out_step + row
            transpose_tile(source, old, step, out, new, out_step)
        for column in range(whole_width, width):
            for i in range(row, row + TILE):
                out[place + column * out_step + i] = source[start + i * step + column]
    for row in range(whole_height, height):
        for column in range(width):
            out[place + column * out_step + row] = source[start + row * step + column]
