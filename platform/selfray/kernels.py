"""Augmentation's arithmetic, compiled by numba: one image at a time, in place, no Python objects.

Pixels are planes: uint8 [3, H, W] or [3, n], as a batch has them, so nothing is rearranged at the
end. Each operation computes what torchvision.transforms.v2.functional computes on uint8; only
resizing and blurring are in fixed point, for those that vectorise to 16-bit products of a machine
word's upper halves (`(a * b) >> 16`). Sums are of integers and fast-math is off, so a processor's
vector width changes no pixel.

Compiled code is kept beside this file or, where that cannot be written, in numba's cache folder.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LUMA = (0.2989, 0.587, 0.114)
"""ITU-R 601, with the digits that torchvision has."""

_compiled = njit(cache=True, nogil=True, error_model="numpy")

i16, i32, i64, u8, u16, f32 = np.int16, np.int32, np.int64, np.uint8, np.uint16, np.float32
_RED, _GREEN, _BLUE = (f32(weight) for weight in LUMA)


# numba widens whatever it adds or multiplies to 64 bits, and LLVM then finds the processor's 16-bit
# products for some loops and not for others: four times slower. So this one step is given in LLVM's
# own words.


def _add_product_in_llvm(context, total, a, b) -> Any:
    """total + (a * b >> 16) of three int16 or three uint16, wrapping around."""
    kind: Any = types.uint16 if total == types.uint16 else types.int16

    def emit(context, builder, signature, arguments):
        wide, narrow = ir.IntType(32), ir.IntType(16)
        extend = builder.zext if kind == types.uint16 else builder.sext
        product = builder.mul(extend(arguments[1], wide), extend(arguments[2], wide))
        upper = builder.trunc(builder.lshr(product, ir.Constant(wide, 16)), narrow)
        return builder.add(arguments[0], upper)

    return kind(kind, kind, kind), emit


_add_product: Any = intrinsic(_add_product_in_llvm)


# Names of images


@_compiled
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


@_compiled
def _high_product(a, b):
    """The upper 64 bits of a product of two uint64."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    a_low, a_high, b_low, b_high = a & low, a >> half, b & low, b >> half
    middle = a_high * b_low + ((a_low * b_low) >> half)
    other = a_low * b_high + (middle & low)
    return a_high * b_high + (middle >> half) + (other >> half)


@_compiled
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


@_compiled
def _cubic(distance):
    """Keys' kernel with a = -0.5, Pillow's."""
    distance = abs(distance)
    if distance < 1:
        return (1.5 * distance - 2.5) * distance * distance + 1
    if distance < 2:
        return ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return 0.0


@_compiled
def _resampling(length, start, span, flip, first, weights):
    """For each of the new pixels that divide [start, start + span) among `length` old ones, the
    first old one that it sees and the weights int16 (1 is 2**15) of those from there on; `weights`
    come as zeros. Returns the largest number of them.

    An old pixel beyond an edge stands for the one at the edge: there a weight can exceed 1, which
    int16 cannot hold, and its rest is put beyond.
    """
    size, most = len(first), 0
    step = span / size
    scale = max(step, 1.0)
    values = np.empty(weights.shape[1] + 1, np.float64)
    for new in range(size):
        place = size - 1 - new if flip else new
        centre = start + (new + 0.5) * step
        low = max(0, int(centre - 2 * scale + 0.5))
        high = min(length, int(centre + 2 * scale + 0.5))
        # Whole factors have zeros there: an image of the size itself is copied.
        while high - low > 1 and _cubic((low + 0.5 - centre) / scale) == 0:
            low += 1
        while high - low > 1 and _cubic((high - 0.5 - centre) / scale) == 0:
            high -= 1
        count, total, peak = high - low, 0.0, 0
        for k in range(count):
            values[k] = _cubic((low + k + 0.5 - centre) / scale)
            total += values[k]
            peak = k if values[k] > values[peak] else peak
        rest = 32768
        for k in range(count):
            if k != peak:
                weights[place, k] = i16(round(values[k] / total * 32768))
                rest -= i64(weights[place, k])
        # What is left goes to the largest: the weights sum to one, so a flat surface stays flat.
        weights[place, peak] = i16(min(rest, 32767))
        if rest > 32767:
            if low == 0:
                for k in range(count, 0, -1):
                    weights[place, k] = weights[place, k - 1]
                weights[place, 0] = i16(rest - 32767)
                low = -1
            else:
                weights[place, count] = i16(rest - 32767)
            count += 1
        first[place] = low
        most = max(most, count)
    return most


@_compiled
def _weight_columns(length, size):
    """Room for one new pixel's weights, in whole groups of four."""
    return (int(4 * max(length / size, 1.0)) + 5) // 4 * 4


@_compiled
def _weigh(rows, last, first, weights, count, out):
    """out[i] = the sum over k of row first + k at i times weights[k], its fraction one bit shorter.

    Row r lies in rows[r % len(rows)]; rows beyond the edges 0 and `last` are those at the edges.
    Takes four rows at a time: their partial sums stay in registers.
    """
    ring = len(rows)
    # Products are cut, not rounded: half a unit each on average comes back here.
    half = i16((count + 1) // 2)
    for k in range(0, count, 4):
        a = rows[min(max(first + k, 0), last) % ring]
        b = rows[min(max(first + k + 1, 0), last) % ring]
        c = rows[min(max(first + k + 2, 0), last) % ring]
        d = rows[min(max(first + k + 3, 0), last) % ring]
        w, x, y, z = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        if k == 0:
            for i in range(len(out)):
                total = _add_product(_add_product(half, a[i], w), b[i], x)
                out[i] = _add_product(_add_product(total, c[i], y), d[i], z)
        else:
            for i in range(len(out)):
                total = _add_product(_add_product(out[i], a[i], w), b[i], x)
                out[i] = _add_product(_add_product(total, c[i], y), d[i], z)


@_compiled
def resize_rows(image, window, start, span, out):
    """A window (top, left, height, width) of an image uint8 [H, W, 3], of which the rows [start,
    start + span), counted from its top and not always whole, are resized along their height alone.

    Into int16 out [size, width * 3] with 6 fractional bits. Transposed, [width, 3 * size], it is
    what resize_columns takes: the channels part without a pass of their own.
    """
    top, left, height, width = window
    size = len(out)
    room = _weight_columns(span, size)
    first, weights = np.empty(size, i64), np.zeros((size, room), i16)
    count = _resampling(height, start, span, False, first, weights)
    ring = np.empty((room + 1, 3 * width), i16)
    flat = image.reshape(image.shape[0], image.shape[1] * 3)
    ready = 0
    for row in range(size):
        while ready < min(height, first[row] + count):
            source = flat[top + ready, 3 * left : 3 * (left + width)]
            wide = ring[ready % len(ring)]
            for i in range(3 * width):  # 7 fractional bits
                wide[i] = i16(source[i]) << 7
            ready += 1
        _weigh(ring, height - 1, first[row], weights[row], count, out[row])


@_compiled
def resize_columns(columns, start, span, flip, out):
    """Columns [start, start + span) of int16 [width, 3 * size] with 6 fractional bits to columns
    uint8 [size, 3 * size]."""
    size = len(out)
    width = len(columns)
    first, weights = np.empty(size, i64), np.zeros((size, _weight_columns(span, size)), i16)
    count = _resampling(width, start, span, flip, first, weights)
    line = np.empty(columns.shape[1], i16)
    for column in range(size):
        _weigh(columns, width - 1, first[column], weights[column], count, line)
        target = out[column]
        for i in range(len(target)):
            value = i16(line[i] + i16(16)) >> 5
            value = value if value > 0 else i64(0)
            target[i] = u8(value if value < 255 else i64(255))


# Colour. `planes` are uint8 [3, n], changed in place; values are cut to integers after each
# operation, as torchvision does.


@_compiled
def _cut(value):
    value = value if value > f32(0) else f32(0)
    return u8(i32(value if value < f32(255) else f32(255)))


@_compiled
def _luma(red, green, blue):
    return f32(i32(_RED * f32(red) + _GREEN * f32(green) + _BLUE * f32(blue)))


@_compiled
def adjust_brightness(planes, factor):
    factor = f32(factor)
    values = planes.reshape(planes.size)
    for i in range(len(values)):
        values[i] = _cut(f32(values[i]) * factor)


@_compiled
def adjust_contrast(planes, factor):
    """Blend with the mean luma."""
    red, green, blue = planes[0], planes[1], planes[2]
    total = i64(0)
    for i in range(len(red)):
        total += i32(_RED * f32(red[i]) + _GREEN * f32(green[i]) + _BLUE * f32(blue[i]))
    other = f32(f32(1 - factor) * f32(total / len(red)))
    factor = f32(factor)
    values = planes.reshape(planes.size)
    for i in range(len(values)):
        values[i] = _cut(f32(values[i]) * factor + other)


@_compiled
def adjust_saturation(planes, factor):
    """Blend with each pixel's luma."""
    red, green, blue = planes[0], planes[1], planes[2]
    rest = f32(1 - factor)
    factor = f32(factor)
    for i in range(len(red)):
        other = rest * _luma(red[i], green[i], blue[i])
        red[i] = _cut(f32(red[i]) * factor + other)
        green[i] = _cut(f32(green[i]) * factor + other)
        blue[i] = _cut(f32(blue[i]) * factor + other)


@_compiled
def _turned(hue, offset, value, chroma):
    sector = hue + f32(offset)
    sector = sector - f32(6) if sector >= f32(6) else sector
    sector = sector - f32(6) if sector >= f32(6) else sector
    fall = f32(4) - sector
    share = sector if sector < fall else fall
    share = share if share > f32(0) else f32(0)
    share = share if share < f32(1) else f32(1)
    # 255.999 / 255 and then a cut: how torchvision goes from [0, 1] to integers.
    return u8(i32((value - chroma * share) * f32(255.999 / 255)))


@_compiled
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
        # A gray pixel has no hue, and no chroma to show a wrong one by.
        scale = f32(1) / (chroma if chroma > f32(0) else f32(1))
        hue_red = (g - b) * scale
        hue_green = (b - r) * scale + f32(2)
        hue_blue = (r - g) * scale + f32(4)
        hue = hue_green if value == g else hue_blue
        hue = hue_red if value == r else hue
        hue = hue + turn  # in [-1, 11)
        hue = hue + f32(6) if hue < f32(0) else hue
        hue = hue - f32(6) if hue >= f32(6) else hue
        red[i] = _turned(hue, 5, value, chroma)
        green[i] = _turned(hue, 3, value, chroma)
        blue[i] = _turned(hue, 1, value, chroma)


@_compiled
def to_grayscale(planes):
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(len(red)):
        luma = u8(i32(_luma(red[i], green[i], blue[i])))
        red[i] = luma
        green[i] = luma
        blue[i] = luma


@_compiled
def solarize(planes):
    """Invert the values from 128 up."""
    values = planes.reshape(planes.size)
    for i in range(len(values)):
        value = values[i]
        values[i] = u8(255 - value) if value > 127 else value


# Blur


@_compiled
def _mirrored(place, length):
    """A place beyond an edge, reflected without repeating the edge; often, in a narrow image."""
    if length == 1:
        return 0
    while place < 0 or place >= length:
        place = -place if place < 0 else 2 * (length - 1) - place
    return place


@_compiled
def _weigh_centre(centre, weight, half, out):
    for i in range(len(out)):
        out[i] = _add_product(half, centre[i], weight)


@_compiled
def _add_two_pairs(a, b, weight, c, d, other_weight, out):
    for i in range(len(out)):
        total = _add_product(out[i], u16(a[i] + b[i]), weight)
        out[i] = _add_product(total, u16(c[i] + d[i]), other_weight)


@_compiled
def gaussian_blur(planes, reach, sigma, padded, blurred):
    """Blur planes [3, H, W] with a kernel of `reach` pixels on each side; edges are mirrored.

    Works in `padded` uint16 [W + 2 * reach + 2] and `blurred` uint16 [H + 1, 3 * W].
    """
    # Beyond three sigma a kernel moves no pixel by a whole level, and costs as much as within.
    reach = min(reach, math.ceil(3 * sigma))
    weights = np.zeros(reach + 2, u16)  # 1 is 2**16
    total = 1.0
    for k in range(1, reach + 1):
        total += 2 * math.exp(-0.5 * (k / sigma) ** 2)
    rest = 65536
    for k in range(1, reach + 1):
        weights[k] = u16(round(math.exp(-0.5 * (k / sigma) ** 2) / total * 65536))
        rest -= 2 * i64(weights[k])
    weights[0] = u16(min(65535, rest))
    # Products are cut, not rounded: half a unit each on average comes back here.
    half = u16((reach + 1) // 2)
    height, width = planes.shape[1], planes.shape[2]
    margin = reach + 1
    for channel in range(3):
        for row in range(height):
            source = planes[channel, row]
            inner = padded[margin : margin + width]
            for i in range(width):  # 7 fractional bits: a pair's sum still fits
                inner[i] = u16(u16(source[i]) << 7)
            for k in range(1, margin + 1):
                padded[margin - k] = u16(source[_mirrored(-k, width)]) << 7
                beyond = width - 1 + k
                padded[margin + beyond] = u16(source[_mirrored(beyond, width)]) << 7
            line = blurred[row, channel * width : (channel + 1) * width]
            _weigh_centre(inner, weights[0], half, line)
            for k in range(1, reach + 1, 2):
                _add_two_pairs(
                    padded[margin - k :],
                    padded[margin + k :],
                    weights[k],
                    padded[margin - k - 1 :],
                    padded[margin + k + 1 :],
                    weights[k + 1],
                    line,
                )
    sums = blurred[height]
    for row in range(height):
        _weigh_centre(blurred[row], weights[0], u16(half + 64), sums)
        for k in range(1, reach + 1, 2):
            _add_two_pairs(
                blurred[_mirrored(row - k, height)],
                blurred[_mirrored(row + k, height)],
                weights[k],
                blurred[_mirrored(row - k - 1, height)],
                blurred[_mirrored(row + k + 1, height)],
                weights[k + 1],
                sums,
            )
        for channel in range(3):
            target, line = planes[channel, row], sums[channel * width : (channel + 1) * width]
            for i in range(width):
                target[i] = u8(line[i] >> 7)


# A view


TOP, LEFT, HEIGHT, WIDTH, FLIP, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE = range(10)
GRAYSCALE, BLUR_SIGMA, SOLARIZE = 10, 11, 12
PARAMETERS = 13
"""A view's parameters as float64 [13], in these columns. ORDER is -1 where there is no jitter, and
BLUR_SIGMA 0 where there is no blur."""


@_compiled
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


@_compiled
def window_of(start, length, reduction, limit):
    """Where [start, start + length) lies in an image `limit` long whose sides were divided by
    `reduction`: the first pixel, how many, the start counted from there, and the span."""
    first = int(start // reduction)
    last = min(limit, math.ceil((start + length) / reduction))
    return first, last - first, start / reduction - first, length / reduction


@_compiled
def _transpose(source, out):
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = source[j, i]


@_compiled
def draw_small(image, reduction, rows, orders, reach, padded, blurred, views, recolours):
    """All views [V, 3, size, size] of an image with parameters [V, 13], in one call."""
    size = views.shape[2]
    for view in range(len(views)):
        row, planes = rows[view], views[view]
        top, height, y, y_span = window_of(row[TOP], row[HEIGHT], reduction, image.shape[0])
        left, width, x, x_span = window_of(row[LEFT], row[WIDTH], reduction, image.shape[1])
        lines, columns = np.empty((size, 3 * width), i16), np.empty((3 * width, size), i16)
        resize_rows(image, (top, left, height, width), y, y_span, lines)
        _transpose(lines, columns)
        turned = np.empty((size, 3 * size), u8)
        resize_columns(columns.reshape(width, 3 * size), x, x_span, row[FLIP] > 0, turned)
        _transpose(turned, planes.reshape(3 * size, size))
        if recolours:
            recolour(planes, row, orders, reach, padded, blurred)


# What is drawn


@_compiled
def _factor(strength, uniform):
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * uniform


@_compiled
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


@_compiled
def draw_parameters(specs, uniform, attempts, aspects, sigmas, orders, height, width, out):
    """What uniform numbers [V, draws] mean for views: parameters [V, 13]; see augment.specs_of."""
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
