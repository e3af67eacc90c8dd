"""Augmentation's arithmetic, compiled by numba: one image at a time, in place, no Python objects.

Pixels are planes: uint8 [3, H, W] or [3, n], as a batch has them, so nothing is rearranged at the
end. Each operation computes what torchvision.transforms.v2.functional computes on uint8; only
resizing, blurring and the step from a JPEG's Y, Cb and Cr to RGB are in fixed point, for those
vectorise to 16-bit products of a machine word's upper halves (`(a * b) >> 16`). Sums are of
integers and fast-math is off, so a processor's vector width changes no pixel.
"""

import math

import numpy as np

from selfray.pixels.compiled import compiled
from selfray.pixels.intrinsics import TILE, add_product, transpose_tile

LUMA = (0.2989, 0.587, 0.114)
"""ITU-R 601, with the digits that torchvision has."""

i16, i32, i64, f32 = np.int16, np.int32, np.int64, np.float32
u8, u64 = np.uint8, np.uint64
_RED, _GREEN, _BLUE = (f32(weight) for weight in LUMA)
_ZERO = i64(0)
"""A literal 0 is a type of its own to numba, for which it would compile the callee once more."""


# Names of images


@compiled
def digest(words, lanes):
    """Mix uint64 words, a multiple of 4 of them, into the 4 lanes.

    Each step is a bijection of its lane, so two texts that differ in one word differ in the end.
    """
    factor, half = np.uint64(0xD2E7470EE14C6C93), np.uint64(32)
    a, b, c, d = lanes[0], lanes[1], lanes[2], lanes[3]
    for i in range(0, len(words), 4):
        a = (a ^ words[i]) * factor
        b = (b ^ words[i + 1]) * factor
        c = (c ^ words[i + 2]) * factor
        d = (d ^ words[i + 3]) * factor
        a, b, c, d = a ^ (a >> half), b ^ (b >> half), c ^ (c >> half), d ^ (d >> half)
    lanes[0], lanes[1], lanes[2], lanes[3] = a, b, c, d


# Random numbers: those of numpy's Philox, which takes 18 us to make and ask for each image; these
# take 0.3.


@compiled
def _high_product(a, b):
    """The upper 64 bits of a product of two uint64."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    a_low, a_high, b_low, b_high = a & low, a >> half, b & low, b >> half
    middle = a_high * b_low + ((a_low * b_low) >> half)
    other = a_low * b_high + (middle & low)
    return a_high * b_high + (middle >> half) + (other >> half)


@compiled
def fill_uniforms(keys, seed, epoch, out):
    """Row i of out float64 [n, m] as numpy's Generator(Philox(key=(keys[i], seed), counter=(0, 0,
    0, epoch))).random(m) fills it."""
    factor_0, factor_1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
    step_0, step_1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
    shift = np.uint64(11)
    width = out.shape[1]
    for row in range(len(keys)):
        for start in range(0, width, 4):
            block = start // 4 + 1
            c0, c1, c2, c3 = np.uint64(block), np.uint64(0), np.uint64(0), np.uint64(epoch)
            k0, k1 = np.uint64(keys[row]), np.uint64(seed)
            for _ in range(10):
                low_0, high_0 = factor_0 * c0, _high_product(factor_0, c0)
                low_1, high_1 = factor_1 * c2, _high_product(factor_1, c2)
                c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
                k0 += step_0
                k1 += step_1
            for place, word in enumerate((c0, c1, c2, c3)):
                if start + place < width:
                    out[row, start + place] = np.float64(word >> shift) * 2.0**-53


# Resizing: antialiased bicubic, as Pillow and torchvision have it


@compiled
def _cubic(distance):
    """Keys' kernel with a = -0.5, Pillow's."""
    distance = abs(distance)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return near if distance < 1 else far if distance < 2 else 0.0


# A slice of an array costs numba two atomic additions, as much as what is done with a line of
# pixels. So kernels go over lines within whole arrays, by the places of their first pixels; these
# are unsigned, or numba would test each for being negative.


@compiled
def _weigh(lines, places, weights, new, number, out, to, length):
    """out[to + i] = the sum over k of lines[places[k] + i] times weights[new, k], its fraction one
    bit shorter, for i below `length`.

    Takes six lines at a time, whose partial sums stay in registers: beyond `number`, weights are 0
    and places anywhere.
    """
    # Products are cut, not rounded: half a unit each on average comes back here.
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
def _room_for(number):
    """In whole groups of six."""
    return (number + 5) // 6 * 6


@compiled
def padded_length(length):
    """Lines of so many 16-bit numbers start where lines of the processor's cache do."""
    return -(-length // 32) * 32


@compiled
def resampling(length, start, span, size, flip):
    """What resizes [start, start + span) of `length` old pixels to `size` new ones: for each of
    these the first old one that it sees, the weights int16 (1 is 2**15) of those from there on, and
    how many of them count.

    An old pixel beyond an edge stands for the one at the edge: there a weight can exceed 1, which
    int16 cannot hold, and its rest is put beyond.
    """
    step = span / size
    scale = max(step, 1.0)
    room = _room_for(int(4 * scale) + 2)
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
        # What is left goes to the largest: the weights sum to one, so a flat surface stays flat.
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
    """A window (top, left, height, width) of channels uint8, resized along its height alone by
    resampling's plan.

    Channels start at `starts` of pixels [n], and their rows lie `stride` apart. Into int16 lines
    [size, length] with 6 fractional bits, side by side.
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
        _weigh(ring, places, weights, row, number, lines, row * length, length)


@compiled
def resize_columns(columns, width, length, plan, pixels):
    """`width` columns int16 of `length` with 6 fractional bits to `size` columns uint8."""
    first, weights, number = plan
    line, places = np.empty(length, i16), np.zeros(weights.shape[1], u64)
    for column in range(len(first)):
        for k in range(number):
            places[k] = min(max(first[column] + k, 0), width - 1) * length
        _weigh(columns, places, weights, column, number, line, _ZERO, length)
        to = u64(column * length)
        for i in range(u64(length)):
            pixels[to + i] = _cut_fifth(i16(line[i] + i16(16)))


@compiled
def _transpose(source, start, step, out, place, out_step, height, width):
    """[height, width] elements whose rows lie `step` apart, transposed."""
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


# Colour. `planes` are uint8 [3, n], changed in place; values are cut to integers after each
# operation, as torchvision does.


@compiled
def cut(value):
    # As an integer: of two comparisons of float32, LLVM makes four instructions for one each.
    value = i32(value)
    value = value if value > i32(0) else i32(0)
    return u8(value if value < i32(255) else i32(255))


@compiled
def _luma(red, green, blue):
    return f32(i32(_RED * f32(red) + _GREEN * f32(green) + _BLUE * f32(blue)))


@compiled
def _luma_sum(red, green, blue):
    total = i32(0)
    for i in range(len(red)):
        total = i32(total + i32(_luma(red[i], green[i], blue[i])))
    return i64(total)


@compiled
def to_rgb(planes):
    """From Y, Cb and Cr, as JFIF has them; exact to 1 / 16 of a level, before it is rounded."""
    red, green, blue = planes[0], planes[1], planes[2]
    # A chroma with 7 fractional bits times a weight with 14, >> 16, has 5.
    for i in range(len(red)):
        y = i16(i16(red[i]) << 5) + i16(16)
        cb, cr = i16(i16(green[i]) - i16(128)) << 7, i16(i16(blue[i]) - i16(128)) << 7
        red[i] = _cut_fifth(add_product(i16(y), i16(cr), i16(22970)))  # 1.402
        mixed = add_product(i16(y), i16(cb), i16(-5638))  # 0.344136
        green[i] = _cut_fifth(add_product(mixed, i16(cr), i16(-11700)))  # 0.714136
        blue[i] = _cut_fifth(add_product(i16(y), i16(cb), i16(29032)))  # 1.772


@compiled
def _cut_fifth(value):
    """Of a number with 5 fractional bits."""
    value = i16(value) >> 5
    value = value if value > 0 else i64(0)
    return u8(value if value < 255 else i64(255))


@compiled
def adjust_brightness(planes, factor):
    factor = f32(factor)
    values = planes.reshape(planes.size)
    for i in range(len(values)):
        values[i] = cut(f32(values[i]) * factor)


@compiled
def adjust_contrast(planes, factor):
    """Blend with the mean luma."""
    red, green, blue = planes[0], planes[1], planes[2]
    total = 0
    for start in range(0, len(red), 65536):  # the sum of so many fits into 32 bits
        end = start + 65536
        total += _luma_sum(red[start:end], green[start:end], blue[start:end])
    other = f32(f32(1 - factor) * f32(total / len(red)))
    factor = f32(factor)
    values = planes.reshape(planes.size)
    for i in range(len(values)):
        values[i] = cut(f32(values[i]) * factor + other)


@compiled
def adjust_saturation(planes, factor):
    """Blend with each pixel's luma."""
    red, green, blue = planes[0], planes[1], planes[2]
    rest = f32(1 - factor)
    factor = f32(factor)
    for i in range(len(red)):
        other = rest * _luma(red[i], green[i], blue[i])
        red[i] = cut(f32(red[i]) * factor + other)
        green[i] = cut(f32(green[i]) * factor + other)
        blue[i] = cut(f32(blue[i]) * factor + other)


@compiled
def _turned(hue, value, chroma):
    """A channel at a hue's distance from its own, within [-2, 9) sixths of the circle."""
    hue = hue - f32(6) * chroma if hue >= f32(3) * chroma else hue
    share = f32(2) * chroma - abs(hue)
    share = share if share > f32(0) else f32(0)
    share = share if share < chroma else chroma
    # 255.999 / 255 and then a cut: how torchvision goes from [0, 1] to integers.
    return u8(i32((value - share) * f32(255.999 / 255)))


@compiled
def adjust_hue(planes, shift):
    """Turn the hue by a fraction of the circle, within [-0.5, 0.5]."""
    red, green, blue = planes[0], planes[1], planes[2]
    turn = f32(6 * (shift % 1.0))  # in sixths of the circle, [0, 6)
    for i in range(len(red)):
        r, g, b = f32(red[i]), f32(green[i]), f32(blue[i])
        value = r if r > g else g
        value = b if b > value else value
        least = r if r < g else g
        least = b if b < least else least
        chroma = value - least
        # Hues are times chroma here: no division, and a gray pixel stays what it is.
        hue_green, hue_blue = (b - r) + f32(2) * chroma, (r - g) + f32(4) * chroma
        hue = hue_green if value == g else hue_blue
        hue = g - b if value == r else hue
        hue = hue + turn * chroma  # in [-1, 11)
        hue = hue - f32(6) * chroma if hue >= f32(6) * chroma else hue
        red[i] = _turned(hue + f32(3) * chroma, value, chroma)
        green[i] = _turned(hue + chroma, value, chroma)
        blue[i] = _turned(hue - chroma, value, chroma)


@compiled
def to_grayscale(planes):
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(len(red)):
        luma = u8(i32(_luma(red[i], green[i], blue[i])))
        red[i] = luma
        green[i] = luma
        blue[i] = luma


@compiled
def solarize(planes):
    """Invert the values from 128 up."""
    values = planes.reshape(planes.size)
    for i in range(len(values)):
        value = values[i]
        values[i] = u8(255 - value) if value > 127 else value


# Blur


@compiled
def _mirrored(place, length):
    """A place beyond an edge, reflected without repeating the edge; often, in a narrow image."""
    if length == 1:
        return 0
    while place < 0 or place >= length:
        place = -place if place < 0 else 2 * (length - 1) - place
    return place


@compiled
def blurred_length(width, reach):
    """Of a line of all three channels, with what lies between them."""
    return padded_length(3 * width + 4 * reach)


@compiled
def gaussian_blur(planes, reach, sigma, padded, blurred):
    """Blur planes [3, H, W] with a kernel of `reach` pixels on each side; edges are mirrored.

    Works in `padded` int16 [blurred_length + 2 * reach] and `blurred` int16 [H * blurred_length].
    """
    # Beyond three sigma a kernel moves no pixel by a whole level, and costs as much as within.
    reach = min(reach, math.ceil(3 * sigma))
    number = 2 * reach + 1
    weights, places = np.zeros((1, _room_for(number)), i16), np.zeros(_room_for(number), u64)
    total = 1.0
    for k in range(1, reach + 1):
        total += 2 * math.exp(-0.5 * (k / sigma) ** 2)
    rest = 32768
    for k in range(1, reach + 1):
        weight = math.floor(math.exp(-0.5 * (k / sigma) ** 2) / total * 32768 + 0.5)
        weights[0, reach - k] = weights[0, reach + k] = i16(weight)
        rest -= 2 * weight
    weights[0, reach] = i16(min(32767, rest))
    height, width = planes.shape[1], planes.shape[2]
    pixels = planes.reshape(planes.size)
    # A row of all three channels at a time, each with its margins: what lies over these is left.
    step, length = width + 2 * reach, blurred_length(width, reach)
    for row in range(height):
        for channel in range(3):
            start, to = u64((channel * height + row) * width), u64(channel * step + reach)
            for i in range(u64(width)):  # 7 fractional bits
                padded[to + i] = i16(pixels[start + i]) << 7
            for k in range(1, reach + 1):
                padded[to - u64(k)] = padded[to + u64(_mirrored(-k, width))]
                beyond = width - 1 + k
                padded[to + u64(beyond)] = padded[to + u64(_mirrored(beyond, width))]
        for k in range(number):
            places[k] = k
        _weigh(padded, places, weights, _ZERO, number, blurred, row * length, length)
    for row in range(height):
        for k in range(number):
            places[k] = _mirrored(row + k - reach, height) * length
        _weigh(blurred, places, weights, _ZERO, number, padded, _ZERO, length)
        for channel in range(3):
            start, to = u64((channel * height + row) * width), u64(channel * step)
            for i in range(u64(width)):
                pixels[start + i] = _cut_fifth(i16(padded[to + i] + i16(16)))


# A view


TOP, LEFT, HEIGHT, WIDTH, FLIP, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE = range(10)
GRAYSCALE, BLUR_SIGMA, SOLARIZE = 10, 11, 12
PARAMETERS = 13
"""A view's parameters as float64 [13], in these columns. ORDER is -1 where there is no jitter, and
BLUR_SIGMA 0 where there is no blur."""


@compiled
def recolour(planes, row, orders, reach, padded, blurred):
    """All that follows crop and flip, in the order of SimCLR and BYOL, on planes [3, H, W]."""
    flat = planes.reshape(3, planes.shape[1] * planes.shape[2])
    if row[ORDER] >= 0:
        order = orders[int(row[ORDER])]
        for operation in order:
            if operation == 0:
                adjust_brightness(flat, row[BRIGHTNESS])
            elif operation == 1:
                adjust_contrast(flat, row[CONTRAST])
            elif operation == 2:
                adjust_saturation(flat, row[SATURATION])
            else:
                adjust_hue(flat, row[HUE])
    if row[GRAYSCALE] > 0:
        to_grayscale(flat)
    if row[BLUR_SIGMA] > 0:
        gaussian_blur(planes, reach, row[BLUR_SIGMA], padded, blurred)
    if row[SOLARIZE] > 0:
        solarize(flat)


@compiled
def window_of(start, length, reduction, limit):
    """Where [start, start + length) lies in an image `limit` long whose sides were divided by
    `reduction`: the first pixel, how many, the start counted from there, and the span."""
    first = int(start // reduction)
    last = min(limit, math.ceil((start + length) / reduction))
    return first, last - first, start / reduction - first, length / reduction


MIRRORED, UPSIDE_DOWN, TRANSPOSED = 1, 2, 4
TURNS = (0, 0, 1, 3, 2, 4, 5, 7, 6)
"""How an image that is stored becomes upright, by its EXIF orientation: it is transposed, and what
comes of it turned upside down and mirrored."""


@compiled
def stored_box(stored, box):
    """Where a box (top, left, height, width) of an upright image lies in the stored one, of which
    these are the turn, the height and the width."""
    turn, height, width = stored
    top, left, rows, columns = box
    if turn & TRANSPOSED:
        height, width = width, height
    if turn & UPSIDE_DOWN:
        top = height - top - rows
    if turn & MIRRORED:
        left = width - left - columns
    return (left, top, columns, rows) if turn & TRANSPOSED else (top, left, rows, columns)


@compiled
def _turn(columns, start, step, out, place, size, transposed, upside_down):
    """[size, size] elements, whose columns lie `step` apart, to rows; if wanted the other way up,
    and then transposed."""
    for column in range(size):
        for row in range(size):
            new = size - 1 - row if upside_down else row
            new = column * size + new if transposed else new * size + column
            out[place + new] = columns[start + column * step + row]


@compiled
def _draw_channels(
    pixels, starts, stride, box, plans, transposed, upside_down, room, planes, first, count
):
    """A box (top, left, height, width) of `count` channels that lie alike, into planes [3, size,
    size] from the `first` on. One start of several channels means that their pixels take turns."""
    top, left, height, width = box
    down, across = plans
    lines, columns, turned = room[0], room[1], room[2]
    size = planes.shape[1]
    taking_turns = count // len(starts)
    window = (top, left * taking_turns, height, width * taking_turns)
    step, length = padded_length(count * width), count * size
    resize_rows(pixels, starts, stride, window, down, lines, step)
    # From [size, start, x, turn] to [x, start or turn, size].
    if taking_turns > 1:
        _transpose(lines, _ZERO, step, columns, _ZERO, size, size, count * width)
    else:
        for channel in range(count):
            old, new = channel * width, channel * size
            _transpose(lines, old, step, columns, new, length, size, width)
    resize_columns(columns, width, length, across, turned)
    flat = planes.reshape(planes.size)
    for channel in range(count):
        old, new = channel * size, (first + channel) * size * size
        if transposed or upside_down:
            _turn(turned, old, length, flat, new, size, transposed, upside_down)
        else:
            _transpose(turned, old, length, flat, new, size, size, size)


START, STORED, STRIDE, FIRST_ROW, FIRST_COLUMN, ROWS, COLUMNS, DOWN, ACROSS = range(9)
"""A decoded plane as int64 [9]: where it starts among all bytes, its rows there and their length in
bytes, which row and column of the whole plane comes first, the whole one's size, and by what the
image's height and width are divided to give it."""


@compiled
def _alike(plane, other):
    alike = True
    for column in range(STORED, ACROSS + 1):
        alike &= plane[column] == other[column]
    return alike


@compiled
def draw_views(pixels, planes, turns, stored, rows, orders, reach, room, views, recolours):
    """All views [V, 3, size, size] of an image with parameters [V, 13].

    Its planes int64 [P, 9] lie in uint8 pixels [n]: Y alone, or Y, Cb and Cr, or with 3 `turns` one
    of RGB; `stored` is the whole image's turn, height and width. `room` is augment's _room. Without
    `recolours`, nothing follows crop and flip.
    """
    size = views.shape[2]
    transposed = stored[0] & TRANSPOSED > 0
    for view in range(len(views)):
        row, channel = rows[view], _ZERO
        crop = stored_box(stored, (row[TOP], row[LEFT], row[HEIGHT], row[WIDTH]))
        upside_down = stored[0] & UPSIDE_DOWN > 0
        mirrored = (stored[0] & MIRRORED > 0) != (row[FLIP] > 0)
        if transposed:  # as the stored image has its rows and columns
            upside_down, mirrored = mirrored, upside_down
        while channel < len(planes):
            plane, count = planes[channel], 1
            # Planes alike are resized together: fewer lines, and longer ones.
            while channel + count < len(planes) and _alike(plane, planes[channel + count]):
                count += 1
            top, height, y, span = window_of(crop[0], crop[2], plane[DOWN], plane[ROWS])
            down = resampling(height, y, span, size, False)
            left, width, x, span = window_of(crop[1], crop[3], plane[ACROSS], plane[COLUMNS])
            plans = (down, resampling(width, x, span, size, mirrored))
            box = (top - plane[FIRST_ROW], left - plane[FIRST_COLUMN], height, width)
            starts = planes[channel : channel + count, START]
            _draw_channels(
                pixels,
                starts,
                plane[STRIDE],
                box,
                plans,
                transposed,
                upside_down,
                room,
                views[view],
                channel,
                count * turns,
            )
            channel += count
        flat = views[view].reshape(3, size * size)
        if len(planes) == 3:
            to_rgb(flat)
        elif turns == 1:
            for i in range(size * size):
                flat[1, i] = flat[2, i] = flat[0, i]
        if recolours:
            recolour(views[view], row, orders, reach, room[3], room[4])


# What is drawn


@compiled
def _factor(strength, uniform):
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * uniform


@compiled
def draw_crop(low, high, attempts, uniform, aspects, height, width, row):
    """(top, left, height, width) as in RandomResizedCrop: uniform in area, log-uniform in aspect.

    A scale of (1, 1) is no random crop: the whole image, or its centre where it is longer than
    4:3. That is also where the attempts end if none of them fits into the image.
    """
    if low != 1 or high != 1:
        log_low, log_high = math.log(aspects[0]), math.log(aspects[1])
        for attempt in range(attempts):
            area = height * width * (low + (high - low) * uniform[2 * attempt])
            aspect = math.exp(log_low + (log_high - log_low) * uniform[2 * attempt + 1])
            crop_width = round(math.sqrt(area * aspect))
            crop_height = round(math.sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                row[TOP] = int(uniform[2 * attempts] * (height - crop_height + 1))
                row[LEFT] = int(uniform[2 * attempts + 1] * (width - crop_width + 1))
                row[HEIGHT], row[WIDTH] = crop_height, crop_width
                return
    crop_height = min(height, round(width / aspects[0]))
    crop_width = min(width, round(height * aspects[1]))
    row[TOP], row[LEFT] = (height - crop_height) // 2, (width - crop_width) // 2
    row[HEIGHT], row[WIDTH] = crop_height, crop_width


@compiled
def draw_parameters(specs, uniform, attempts, aspects, sigmas, orders, height, width, out):
    """What uniform numbers [V, draws] mean for views: parameters [V, 13]; see augment._specs_of."""
    for view in range(len(specs)):
        spec, row, drawn = specs[view], out[view], uniform[view]
        draw_crop(spec[0], spec[1], attempts, drawn, aspects, height, width, row)
        first = 2 * attempts + 2
        row[FLIP] = drawn[first] < spec[2]
        row[ORDER], row[BRIGHTNESS], row[CONTRAST], row[SATURATION], row[HUE] = -1, 1, 1, 1, 0
        if drawn[first + 1] < spec[3]:
            row[ORDER] = int(drawn[first + 2] * orders)
            row[BRIGHTNESS] = _factor(spec[4], drawn[first + 3])
            row[CONTRAST] = _factor(spec[5], drawn[first + 4])
            row[SATURATION] = _factor(spec[6], drawn[first + 5])
            row[HUE] = spec[7] * (2 * drawn[first + 6] - 1)
        row[GRAYSCALE] = drawn[first + 7] < spec[8]
        row[BLUR_SIGMA] = 0
        if drawn[first + 8] < spec[9]:
            row[BLUR_SIGMA] = sigmas[0] + (sigmas[1] - sigmas[0]) * drawn[first + 9]
        row[SOLARIZE] = drawn[first + 10] < spec[10]


@compiled
def extend_cover(rows, size, cover):
    """Extend a box (top, left, bottom, right) float64 [5] over the crops of parameters [V, 13], and
    in its last place keep the least factor by which a crop is shrunk to `size`."""
    for row in rows:
        cover[0], cover[1] = min(cover[0], row[TOP]), min(cover[1], row[LEFT])
        cover[2] = max(cover[2], row[TOP] + row[HEIGHT])
        cover[3] = max(cover[3], row[LEFT] + row[WIDTH])
        cover[4] = min(cover[4], min(row[HEIGHT], row[WIDTH]) / size)
