"""Turns uniform random numbers into the parameters of views; compiled."""

import math

from selfray.pixels.compiled import compiled

TOP, LEFT, HEIGHT, WIDTH, FLIP, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE = range(10)
GRAYSCALE, BLUR_SIGMA, SOLARIZE, VERTICAL_FLIP, QUARTER_TURNS = range(10, 15)
PARAMETERS = 15
"""A view's parameters as float64 [15], in these columns: its crop box in pixels of the upright
image, whether it is flipped, the index of its jitter's order (-1: no jitter) and the jitter's
factors, the hue's shift in full turns, whether it is gray, the blur's sigma in pixels (0: no blur),
whether it is solarized, whether it is flipped vertically, and by how many quarter turns it is
turned counter-clockwise, after the flips. A view of a multispectral image has a brightness factor
for each channel as well, in further columns."""

SCALE_LOW, SCALE_HIGH, FLIP_SHARE, JITTER_SHARE = range(4)
BRIGHTNESS_STRENGTH, CONTRAST_STRENGTH, SATURATION_STRENGTH, HUE_STRENGTH = range(4, 8)
GRAYSCALE_SHARE, BLUR_SHARE, SOLARIZE_SHARE = range(8, 11)
VERTICAL_SHARE, TURN_SHARE = 11, 12
SPECS = 13
"""How a view is drawn, as float64 [13] in these columns: the range of the crop's area, and the
probabilities and strengths of views.View."""


@compiled
def _factor(strength, uniform):
    """A factor in 1 ± strength, at least 0, from a uniform number."""
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * uniform


@compiled
def draw_crop(low, high, attempts, uniform, aspects, height, width, row):
    """Set a row's crop box as RandomResizedCrop does: uniform in area, log-uniform in aspect.

    `low` and `high` are the range of the area as a fraction of the image's, `aspects` the range of
    width / height, and `uniform` float64 [2 * attempts + 2]. If no attempt fits into the image, or
    if the range is (1, 1), the crop is the whole image, or its centre if it is longer than 4:3.
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
    """Turn uniform numbers float64 [V, draws] into parameters float64 [V, 15], `out`.

    specs float64 [V, 13] say how each view is drawn, in the columns above; `orders` is the number
    of orders of the jitter's operations, and `sigmas` the range of the blur.
    """
    for view in range(len(specs)):
        spec, row, drawn = specs[view], out[view], uniform[view]
        draw_crop(spec[SCALE_LOW], spec[SCALE_HIGH], attempts, drawn, aspects, height, width, row)
        first = 2 * attempts + 2
        row[FLIP] = drawn[first] < spec[FLIP_SHARE]
        row[ORDER], row[BRIGHTNESS], row[CONTRAST], row[SATURATION], row[HUE] = -1, 1, 1, 1, 0
        if drawn[first + 1] < spec[JITTER_SHARE]:
            row[ORDER] = int(drawn[first + 2] * orders)
            row[BRIGHTNESS] = _factor(spec[BRIGHTNESS_STRENGTH], drawn[first + 3])
            row[CONTRAST] = _factor(spec[CONTRAST_STRENGTH], drawn[first + 4])
            row[SATURATION] = _factor(spec[SATURATION_STRENGTH], drawn[first + 5])
            row[HUE] = spec[HUE_STRENGTH] * (2 * drawn[first + 6] - 1)
        row[GRAYSCALE] = drawn[first + 7] < spec[GRAYSCALE_SHARE]
        row[BLUR_SIGMA] = 0
        if drawn[first + 8] < spec[BLUR_SHARE]:
            row[BLUR_SIGMA] = sigmas[0] + (sigmas[1] - sigmas[0]) * drawn[first + 9]
        row[SOLARIZE] = drawn[first + 10] < spec[SOLARIZE_SHARE]
        row[VERTICAL_FLIP] = row[QUARTER_TURNS] = 0


@compiled
def draw_more(specs, uniform, gains, out):
    """Set the parameters that draw_parameters leaves out, from uniform float64 [V, 2 + gains].

    These numbers are drawn only for views that need them: vertical flips, turns, and the brightness
    factors of `gains` channels.
    """
    for view in range(len(specs)):
        spec, row, drawn = specs[view], out[view], uniform[view]
        row[VERTICAL_FLIP] = drawn[0] < spec[VERTICAL_SHARE]
        if drawn[1] < spec[TURN_SHARE]:
            row[QUARTER_TURNS] = 1 + int(3 * drawn[1] / spec[TURN_SHARE])
        for channel in range(gains):
            factor = _factor(spec[BRIGHTNESS_STRENGTH], drawn[2 + channel])
            row[PARAMETERS + channel] = factor if row[ORDER] >= 0 else 1.0


@compiled
def extend_cover(rows, size, cover):
    """Extend a cover float64 [5] so that its box contains the crops of parameters float64 [V, 15].

    The cover is (top, left, bottom, right, least factor by which a crop is shrunk to `size`).
    """
    for row in rows:
        cover[0], cover[1] = min(cover[0], row[TOP]), min(cover[1], row[LEFT])
        cover[2] = max(cover[2], row[TOP] + row[HEIGHT])
        cover[3] = max(cover[3], row[LEFT] + row[WIDTH])
        cover[4] = min(cover[4], min(row[HEIGHT], row[WIDTH]) / size)
