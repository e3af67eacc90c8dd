"""The random parameters of a view, and how they follow from uniform numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np

from selfray.pixels.draw import PARAMETERS, draw_more, draw_parameters
from selfray.views import BLUR_SIGMA, CROP_ASPECT, RGB, View, Views

CROP_ATTEMPTS = 10
JITTER_ORDERS = tuple(permutations(("brightness", "contrast", "saturation", "hue")))
LOG_ASPECT = (math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1]))
# Every view takes the same number of random numbers, used or not: crop attempts, the crop's corner,
# flip, jitter (whether, order, four strengths), grayscale, blur (whether, sigma), solarize.
CROP_DRAWS = 2 * CROP_ATTEMPTS + 2
DRAWS = CROP_DRAWS + 11
MORE_DRAWS = 2
"""Further numbers for views with vertical flips or turns: one for each of the two, plus one for
each multispectral channel. They are drawn after the other numbers of all views, which thus do not
change.
"""
_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
ORDERS = np.array([[_OPERATIONS.index(name) for name in order] for order in JITTER_ORDERS])
_ASPECTS, _SIGMAS = np.array(CROP_ASPECT), np.array(BLUR_SIGMA)


@dataclass(frozen=True, slots=True)
class Jitter:
    """Colour jitter: the order of the four operations, their factors, and the shift of the hue."""

    order: tuple[str, ...]
    brightness: float
    contrast: float
    saturation: float
    hue: float
    """In full turns, within [-0.5, 0.5]."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """The random parameters of one view; the crop box is in pixels of the source image."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False
    jitter: Jitter | None = None
    grayscale: bool = False
    blur_sigma: float | None = None
    solarize: bool = False
    vertical_flip: bool = False
    quarter_turns: int = 0
    """Counter-clockwise, after the flips."""

    @property
    def row(self) -> np.ndarray:
        """The parameters as float64 [15], in the columns that draw.py names."""
        jitter = self.jitter
        colour = (-1, 1.0, 1.0, 1.0, 0.0)
        if jitter is not None:
            order = JITTER_ORDERS.index(jitter.order)
            colour = (order, jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        box = (self.top, self.left, self.height, self.width)
        others = (self.grayscale, self.blur_sigma or 0.0, self.solarize)
        others = (*others, self.vertical_flip, self.quarter_turns)
        return np.array([*box, self.flip, *colour, *others], np.float64)

    @classmethod
    def of(cls, row: np.ndarray) -> "Parameters":
        """The inverse of `row`."""
        top, left, height, width, flip, order, *colour = row[:10].tolist()
        gray, sigma, solarizes, vertical, turns = row[10:PARAMETERS].tolist()
        jitter = Jitter(JITTER_ORDERS[int(order)], *colour) if order >= 0 else None
        box = (int(top), int(left), int(height), int(width))
        flags = (bool(gray), sigma or None, bool(solarizes), bool(vertical), int(turns))
        return cls(*box, bool(flip), jitter, *flags)


def draw(view: View, rng: np.random.Generator, height: int, width: int) -> Parameters:
    """One view's parameters for an image of this height and width. Takes DRAWS numbers from rng."""
    return parameters_from(view, rng.random(DRAWS), height, width)


def parameters_from(
    view: View, uniform: Sequence[float] | np.ndarray, height: int, width: int
) -> Parameters:
    """The parameters of a view from DRAWS uniform numbers in [0, 1); the only place that maps
    them."""
    drawn = np.asarray(uniform, np.float64)[None]
    return Parameters.of(draw_rows(specs_of((view,)), drawn, height, width)[0])


@lru_cache
def specs_of(views: tuple[View, ...]) -> np.ndarray:
    """How views are drawn, float64 [V, 13] in the columns that draw.py names."""
    rows = []
    for view in views:
        jitter = view.color_jitter
        colour = (-1.0, 0.0, 0.0, 0.0, 0.0)
        if jitter is not None:
            strengths = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
            colour = (jitter.probability, *strengths)
        others = (view.grayscale, view.blur, view.solarize, view.vertical_flip, view.rotate90)
        rows.append([*view.crop_scale, view.flip, *colour, *others])
    return np.array(rows, np.float64)


def gains_of(channels: int) -> int:
    """The number of channels with a brightness factor of their own: all of a multispectral
    image."""
    return 0 if channels in (1, RGB) else channels


def draws_of(views: Views, channels: int = RGB) -> tuple[int, int]:
    """(random numbers of each view at first, further numbers of each view after all views)."""
    more = any(v.vertical_flip or v.rotate90 for group in views.values() for v in group)
    gains = gains_of(channels)
    return DRAWS, MORE_DRAWS + gains if more or gains else 0


def draw_rows(
    specs: np.ndarray,
    uniform: np.ndarray,
    height: int,
    width: int,
    more: np.ndarray | None = None,
    gains: int = 0,
) -> np.ndarray:
    """Parameters float64 [V, 15 + gains] from uniform [V, DRAWS] and more [V, 2 + gains]."""
    rows = np.empty((len(specs), PARAMETERS + gains))
    draw_parameters(
        specs,
        uniform,
        CROP_ATTEMPTS,
        _ASPECTS,
        _SIGMAS,
        len(JITTER_ORDERS),
        height,
        width,
        rows,
    )
    if more is not None:
        draw_more(specs, more, gains, rows)
    return rows
