"""Figures and axes in one style, placed in pixels, on matplotlib's Agg canvas. It neither uses
pyplot nor changes matplotlib's settings."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from selfray.check import require
from selfray.report.style import (
    BOLD,
    CAPTION,
    FAINT,
    INK,
    LABEL,
    MARGIN,
    MUTED,
    REGULAR,
    TITLE,
    UNKNOWN,
    WIDTH,
    Colour,
)

Points = Sequence[tuple[float, float]]
"""(images seen, value) pairs of one curve, in any order."""
DPI = 100
TICKS = 44
"""Pixels reserved for the numbers of an axis."""
KEY_GAP, KEY_MARK, KEY_STEP = 18, 22, 26
ROW_STEP = 46
"""Height in pixels of a row, in charts with a name for each row."""


def new_figure(height: int, title: str) -> Figure:
    """A white figure of WIDTH x height pixels with its title."""
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    put_text(figure, MARGIN, height - MARGIN - TITLE / 2, title, TITLE, INK, bold=True)
    return figure


def new_axes(figure: Figure, left: int, top: int, width: int, height: int, title: str) -> Axes:
    """Axes in the common style at (left, top), in pixels from the top left of the figure."""
    full_width, full_height = figure.get_size_inches() * DPI
    axes = figure.add_axes(
        (
            left / full_width,
            1 - (top + height) / full_height,
            width / full_width,
            height / full_height,
        ),
        facecolor="white",
    )
    axes.set_title(
        title, loc="left", pad=9, color=INK, fontproperties=typeface(LABEL), parse_math=False
    )
    axes.grid(visible=True, color=FAINT, linewidth=1)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set(visible=name == "bottom", color=UNKNOWN, linewidth=1)
    axes.tick_params(length=0, pad=6, labelcolor=MUTED, labelsize=_points(CAPTION))
    axes.xaxis.set_major_locator(MaxNLocator(max(3, width // 70)))
    axes.yaxis.set_major_locator(MaxNLocator(max(3, height // 60)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    return axes


def x_label(axes: Axes, text: str) -> None:
    axes.set_xlabel(text, color=MUTED, labelpad=6, fontproperties=typeface(CAPTION))


def put_text(
    figure: Figure, x: float, y: float, text: str, pixels: int, colour: str, bold: bool = False
) -> None:
    """Text that starts at x and is centred on y, in pixels from the bottom left."""
    full_width, full_height = figure.get_size_inches() * DPI
    figure.text(
        x / full_width, y / full_height, text, color=colour, va="center_baseline",
        fontproperties=typeface(pixels, bold), parse_math=False,
    )  # fmt: skip


def put_dot(figure: Figure, x: float, y: float, colour: Colour, face: Colour) -> None:
    put_mark(figure, [x], [y], colour, marker="o", markersize=7, markerfacecolor=face)


def put_mark(figure: Figure, x: list[float], y: list[float], colour: Colour, **style: Any) -> None:
    """A line or marker at places in pixels from the bottom left."""
    full_width, full_height = figure.get_size_inches() * DPI
    x, y = [value / full_width for value in x], [value / full_height for value in y]
    figure.add_artist(Line2D(x, y, color=colour, **style))


def typeface(pixels: int, bold: bool = False) -> FontProperties:
    return FontProperties(fname=BOLD if bold else REGULAR, size=_points(pixels))


def _points(pixels: float) -> float:
    return pixels * 72 / DPI


def render(figure: Figure) -> Image.Image:
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _count(value: float) -> str:
    """A number of images in short form: 800, 20k, 1.5M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def require_points(name: str, curve: Points) -> None:
    require(
        len(curve) > 0 and all(len(point) == 2 for point in curve),
        f"{name} must be (images seen, value) pairs, at least one",
    )


def require_accuracy(name: str, value: float) -> None:
    require(0 <= value <= 1, f"{name} is an accuracy and must lie in [0, 1], got {value}")
