"""Views composed from an image's decoded planes: crop, resize, flip, colour; compiled.

Pixels stay in planes, uint8 [C, H, W], as a batch has them, so that nothing is rearranged at the
end. One image is computed at a time, in arrays that exist already, without Python objects.
"""

import math

from selfray.pixels.colour import (
    adjust_brightness,
    adjust_contrast,
    adjust_contrasts,
    adjust_gains,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
    solarize,
    to_grayscale,
    to_rgb,
)
from selfray.pixels.compiled import compiled
from selfray.pixels.draw import (
    BLUR_SIGMA,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAYSCALE,
    HEIGHT,
    HUE,
    LEFT,
    ORDER,
    PARAMETERS,
    QUARTER_TURNS,
    SATURATION,
    SOLARIZE,
    TOP,
    VERTICAL_FLIP,
    WIDTH,
)
from selfray.pixels.headers import MIRRORED, TRANSPOSED, UPSIDE_DOWN
from selfray.pixels.resize import (
    ZERO,
    padded_length,
    resampling,
    resize_columns,
    resize_rows,
    transpose,
)

START, STORED, STRIDE, FIRST_ROW, FIRST_COLUMN, ROWS, COLUMNS, DOWN, ACROSS = range(9)
PLANE_COLUMNS = 9
"""A decoded plane as int64 [9], in these columns: its first index among all pixels, how many rows
are there and their length in bytes; which row and column of the whole plane these begin with; the
whole plane's height and width; and by what the image's height and width are divided to give it."""


@compiled
def recolour(planes, row, orders, reach, padded, blurred):
    """Apply the operations after crop and flip to planes uint8 [C, H, W], in SimCLR's and BYOL's
    order.

    row float64 [15] is the view's parameters, and orders int64 [orders, 4] the operations of each
    jitter order; `reach`, `padded` and `blurred` are those of gaussian_blur.
    """
    channels = len(planes)
    flat = planes.reshape(channels, planes.shape[1] * planes.shape[2])
    if row[ORDER] >= 0 and channels != 3:
        for operation in orders[int(row[ORDER])]:
            if operation == 0 and channels == 1:
                adjust_brightness(flat, row[BRIGHTNESS])
            elif operation == 0:
                adjust_gains(flat, row[PARAMETERS:])
            elif operation == 1:
                adjust_contrasts(flat, row[CONTRAST])
    elif row[ORDER] >= 0:
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
    if row[GRAYSCALE] > 0 and channels == 3:
        to_grayscale(flat)
    if row[BLUR_SIGMA] > 0:
        gaussian_blur(planes, reach, row[BLUR_SIGMA], padded, blurred)
    if row[SOLARIZE] > 0:
        solarize(flat)


@compiled
def window_of(start, length, reduction, limit):
    """Where [start, start + length) of an image lies after its sides were divided by `reduction`.

    `limit` is the divided side. Returns the first pixel and the number of pixels that cover it, the
    start counted from that first pixel, and the span, both with fractions.
    """
    first = int(start // reduction)
    last = min(limit, math.ceil((start + length) / reduction))
    return first, last - first, start / reduction - first, length / reduction


@compiled
def stored_box(stored, box):
    """Where a box (top, left, height, width) of the upright image lies in the stored one.

    `stored` is the image's (turn, height, width) as stored; see headers.TURNS.
    """
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
    """Copy a square of [size, size] elements, whose columns lie `step` apart, to rows in `out`.

    On the way it is turned upside down and then transposed, if wanted.
    """
    for column in range(size):
        for row in range(size):
            new = size - 1 - row if upside_down else row
            new = column * size + new if transposed else new * size + column
            out[place + new] = columns[start + column * step + row]


@compiled
def _draw_channels(
    pixels, starts, stride, box, plans, transposed, upside_down, room, planes, first, count
):
    """Resize a box (top, left, height, width) of `count` channels into planes.

    They fill planes uint8 [C, size, size] from number `first` on. `starts` are the channels' first
    indices in pixels uint8 [n]; a single start for several channels means that their values are
    interleaved. `plans` are those of `resampling` for the height and the width, and `room` is
    augment's _room.
    """
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
        transpose(lines, ZERO, step, columns, ZERO, size, size, count * width)
    else:
        for channel in range(count):
            old, new = channel * width, channel * size
            transpose(lines, old, step, columns, new, length, size, width)
    resize_columns(columns, width, length, across, turned)
    flat = planes.reshape(planes.size)
    for channel in range(count):
        old, new = channel * size, (first + channel) * size * size
        if transposed or upside_down:
            _turn(turned, old, length, flat, new, size, transposed, upside_down)
        else:
            transpose(turned, old, length, flat, new, size, size, size)


@compiled
def _alike(plane, other):
    """Whether two planes have the same layout, wherever they start."""
    alike = True
    for column in range(STORED, ACROSS + 1):
        alike &= plane[column] == other[column]
    return alike


@compiled
def draw_views(pixels, planes, turns, stored, rows, orders, reach, room, views, recolours):
    """Compute the views uint8 [V, C, size, size] of one image from rows of its parameters.

    With C = 3 and a plane of Y, all three channels are gray; with C = 1 and planes of Y, Cb and Cr,
    only Y is used.

    Args:
        pixels: uint8 [n], the decoded values of all planes.
        planes: int64 [P, 9], where the planes lie in it, in the columns above.
        turns: the number of channels if there is one plane in which they are interleaved; 1 for Y,
            or Y, Cb and Cr.
        stored: the whole image's (turn, height, width) as stored.
        rows: float64 [V, 15], the parameters, in the columns that draw.py names.
        orders, reach: those of `recolour`.
        room: the arrays of augment's _room.
        recolours: False to stop after crop and flip.
    """
    channels, size = views.shape[1], views.shape[2]
    number = min(len(planes), channels)
    for view in range(len(views)):
        row, channel = rows[view], ZERO
        crop = stored_box(stored, (row[TOP], row[LEFT], row[HEIGHT], row[WIDTH]))
        transposed = stored[0] & TRANSPOSED > 0
        upside_down = (stored[0] & UPSIDE_DOWN > 0) != (row[VERTICAL_FLIP] > 0)
        mirrored = (stored[0] & MIRRORED > 0) != (row[FLIP] > 0)
        for _ in range(int(row[QUARTER_TURNS])):
            transposed = not transposed
            upside_down, mirrored = not mirrored, upside_down
        if transposed:  # rows of the view are columns of the stored image
            upside_down, mirrored = mirrored, upside_down
        while channel < number:
            plane, count = planes[channel], 1
            # Resize planes of the same layout together: fewer and longer lines are faster.
            while channel + count < number and _alike(plane, planes[channel + count]):
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
        flat = views[view].reshape(channels, size * size)
        if number == 3:
            to_rgb(flat)
        elif turns == 1 and channels == 3:
            for i in range(size * size):
                flat[1, i] = flat[2, i] = flat[0, i]
        if recolours:
            recolour(views[view], row, orders, reach, room[3], room[4])
