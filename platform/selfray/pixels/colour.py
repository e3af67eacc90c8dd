"""Colour operations and blur, on views.

`planes` are uint8 [C, n] or [C, H, W] and are changed in place: gray (C = 1), red, green and blue
(3), or the channels of a multispectral image. On red, green and blue each operation computes what
torchvision.transforms.v2.functional computes on uint8, and like it cuts values to integers
afterwards. Fast-math is off, so that all processors compute the same pixels.
"""

import math

import numpy as np

from selfray.pixels.compiled import compiled
from selfray.pixels.intrinsics import add_product
from selfray.pixels.resize import ZERO, cut_fifth, padded_length, room_for, weigh

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in the brightness: ITU-R 601, with torchvision's digits."""

i16, i32, i64, f32 = np.int16, np.int32, np.int64, np.float32
u8, u64 = np.uint8, np.uint64
_RED, _GREEN, _BLUE = (f32(weight) for weight in LUMA)


@compiled
def cut(value):
    """The whole part of a float32, clamped to [0, 255], as uint8."""
    # Compare integers: LLVM needs four instructions for each comparison of float32.
    value = i32(value)
    value = value if value > i32(0) else i32(0)
    return u8(value if value < i32(255) else i32(255))


@compiled
def _luma(red, green, blue):
    """The brightness of one pixel, a float32 that is a whole number."""
    return f32(i32(_RED * f32(red) + _GREEN * f32(green) + _BLUE * f32(blue)))


@compiled
def _luma_sum(red, green, blue):
    total = i32(0)
    for i in range(len(red)):
        total = i32(total + i32(_luma(red[i], green[i], blue[i])))
    return i64(total)


@compiled
def to_rgb(planes):
    """Convert planes uint8 [3, n] of Y, Cb and Cr, as JFIF defines them, to red, green and blue.

    Exact to 1 / 16 of a level before it is rounded.
    """
    red, green, blue = planes[0], planes[1], planes[2]
    # The product of a chroma with 7 fractional bits and a weight with 14, >> 16, has 5.
    for i in range(len(red)):
        y = i16(i16(red[i]) << 5) + i16(16)
        cb, cr = i16(i16(green[i]) - i16(128)) << 7, i16(i16(blue[i]) - i16(128)) << 7
        red[i] = cut_fifth(add_product(i16(y), i16(cr), i16(22970)))  # 1.402
        mixed = add_product(i16(y), i16(cb), i16(-5638))  # 0.344136
        green[i] = cut_fifth(add_product(mixed, i16(cr), i16(-11700)))  # 0.714136
        blue[i] = cut_fifth(add_product(i16(y), i16(cb), i16(29032)))  # 1.772


@compiled
def adjust_brightness(planes, factor):
    """Multiply all values by the factor."""
    factor = f32(factor)
    values = planes.reshape(planes.size)
    for i in range(len(values)):
        values[i] = cut(f32(values[i]) * factor)


@compiled
def adjust_contrast(planes, factor):
    """Scale the distance from the mean luma by the factor."""
    red, green, blue = planes[0], planes[1], planes[2]
    total = 0
    for start in range(0, len(red), 65536):  # their sum fits into 32 bits
        end = start + 65536
        total += _luma_sum(red[start:end], green[start:end], blue[start:end])
    other = f32(f32(1 - factor) * f32(total / len(red)))
    factor = f32(factor)
    values = planes.reshape(planes.size)
    for i in range(len(values)):
        values[i] = cut(f32(values[i]) * factor + other)


@compiled
def adjust_gains(planes, factors):
    """Multiply each channel of planes by its own factor, float64 [C]."""
    for channel in range(len(planes)):
        factor = f32(factors[channel])
        for i in range(planes.shape[1]):
            planes[channel, i] = cut(f32(planes[channel, i]) * factor)


@compiled
def adjust_contrasts(planes, factor):
    """Scale the distance from each channel's own mean by the factor."""
    rest = f32(1 - factor)
    factor = f32(factor)
    for channel in range(len(planes)):
        total = i64(0)
        for i in range(planes.shape[1]):
            total += i64(planes[channel, i])
        other = rest * f32(total / planes.shape[1])
        for i in range(planes.shape[1]):
            planes[channel, i] = cut(f32(planes[channel, i]) * factor + other)


@compiled
def adjust_saturation(planes, factor):
    """Scale the distance from each pixel's luma by the factor."""
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
    """The value of a channel whose own hue lies `hue` away, in sixths of the circle times chroma.

    `hue` / `chroma` lies in [-2, 9).
    """
    hue = hue - f32(6) * chroma if hue >= f32(3) * chroma else hue
    share = f32(2) * chroma - abs(hue)
    share = share if share > f32(0) else f32(0)
    share = share if share < chroma else chroma
    # Times 255.999 / 255 and cut: torchvision converts from [0, 1] to integers like this.
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
        # Hues are multiplied by chroma: that needs no division, and a gray pixel stays as it is.
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
    """Set all three channels to the luma."""
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


@compiled
def _mirrored(place, length):
    """The pixel that a place beyond an edge mirrors; the edge itself is not repeated.

    A narrow image is mirrored several times.
    """
    if length == 1:
        return 0
    while place < 0 or place >= length:
        place = -place if place < 0 else 2 * (length - 1) - place
    return place


@compiled
def blurred_length(width, reach, channels=3):
    """Length in int16 of a line of all channels and the margins between them."""
    return padded_length(channels * width + 2 * (channels - 1) * reach)


@compiled
def gaussian_blur(planes, reach, sigma, padded, blurred):
    """Blur planes uint8 [C, H, W] in place; edges are mirrored.

    `sigma` is in pixels, and the kernel has `reach` pixels on each side. Works in `padded`, int16
    [blurred_length + 2 * reach], and `blurred`, int16 [H * blurred_length].
    """
    # Beyond three sigma a kernel changes no pixel by a whole level, and costs as much as within.
    reach = min(reach, math.ceil(3 * sigma))
    number = 2 * reach + 1
    weights, places = np.zeros((1, room_for(number)), i16), np.zeros(room_for(number), u64)
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
    # One line has a row of all channels, each with its margins. The blurred margins between
    # channels are computed as well, and ignored.
    channels = len(planes)
    step, length = width + 2 * reach, blurred_length(width, reach, channels)
    for row in range(height):
        for channel in range(channels):
            start, to = u64((channel * height + row) * width), u64(channel * step + reach)
            for i in range(u64(width)):  # 7 fractional bits
                padded[to + i] = i16(pixels[start + i]) << 7
            for k in range(1, reach + 1):
                padded[to - u64(k)] = padded[to + u64(_mirrored(-k, width))]
                beyond = width - 1 + k
                padded[to + u64(beyond)] = padded[to + u64(_mirrored(beyond, width))]
        for k in range(number):
            places[k] = k
        weigh(padded, places, weights, ZERO, number, blurred, row * length, length)
    for row in range(height):
        for k in range(number):
            places[k] = _mirrored(row + k - reach, height) * length
        weigh(blurred, places, weights, ZERO, number, padded, ZERO, length)
        for channel in range(channels):
            start, to = u64((channel * height + row) * width), u64(channel * step)
            for i in range(u64(width)):
                pixels[start + i] = cut_fifth(i16(padded[to + i] + i16(16)))
