"""Scatter plots of features in two dimensions."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from selfray.check import require
from selfray.report.canvas import DPI, new_axes, new_figure, put_dot, put_text, render
from selfray.report.style import (
    FAINT,
    INK,
    LABEL,
    MARGIN,
    PALETTE,
    UNKNOWN,
    WIDTH,
    Colour,
    fitted,
    font,
    label_name,
    paler,
    require_labels,
)


def embedding_maps(
    maps: Mapping[str, np.ndarray],
    labels: np.ndarray,
    label_names: Sequence[str] | None = None,
    title: str = "Features in two dimensions",
) -> Image.Image:
    """Scatter plots of the same images side by side, such as {"untrained": ..., "SimCLR": ...}.

    Args:
        maps: float [n, 2] by name, see `project_2d`.
        labels: int [n]; negative ones, and all but the 20 most common, are grey.
        label_names: names by label for the legend; None prints the numbers.
        title: the picture's title.

    Raises ValueError if a shape, type or label is not as described.
    """
    return render(_maps_figure(maps, labels, label_names, title))


_COLOURED_LABELS = 2 * len(PALETTE)


def _maps_figure(
    maps: Mapping[str, np.ndarray],
    labels: np.ndarray,
    label_names: Sequence[str] | None,
    title: str,
) -> Figure:
    require(len(maps) > 0, "there is no map to draw")
    for name, points in maps.items():
        require(
            points.ndim == 2 and points.shape[1] == 2 and len(points) > 0,
            f"map {name!r} must be [n, 2] with n > 0, got {list(points.shape)}",
        )
        require_labels("labels", labels, (len(points),), label_names)

    found, counts = np.unique(labels[labels >= 0], return_counts=True)
    shown = np.sort(found[np.argsort(-counts, kind="stable")[:_COLOURED_LABELS]])
    colours = {int(label): _label_colour(i) for i, label in enumerate(shown)}
    key = [(colour, label_name(label, label_names)) for label, colour in colours.items()]
    if len(found) > len(shown):
        key.append((UNKNOWN, f"{len(found) - len(shown)} more"))
    if (labels < 0).any():
        key.append((UNKNOWN, "no label"))

    across = min(4, len(maps))
    gap_x, gap_y = 28, 64
    side = (WIDTH - 2 * MARGIN - (across - 1) * gap_x) // across
    panel_height = min(side, 640)
    rows = math.ceil(len(maps) / across)
    top = 112 if any(maps) else 84
    bottom = top + rows * (panel_height + gap_y) - gap_y
    places = _key_places([font(LABEL).getlength(fitted(text, 200, LABEL)) for _, text in key])
    lines = places[-1][1] + 1
    figure = new_figure(bottom + 40 + 30 * lines, title)
    colour_of = np.array([to_rgb(colours.get(int(label), UNKNOWN)) for label in labels])
    # In a fixed random order, so that no class covers another.
    order = np.random.default_rng(0).permutation(len(labels))
    dots = float(np.clip(38000 / len(labels) * (side / WIDTH), 8, 70))
    for index, (name, points) in enumerate(maps.items()):
        axes = new_axes(
            figure,
            MARGIN + index % across * (side + gap_x),
            top + index // across * (panel_height + gap_y),
            side,
            panel_height,
            name,
        )
        axes.scatter(
            *points[order].T, s=dots, c=colour_of[order], alpha=0.85, linewidths=0.4,
            edgecolors="white",
        )  # fmt: skip
        axes.margins(0.05)
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(visible=True, color=FAINT)
    height = figure.get_size_inches()[1] * DPI
    for (colour, text), (x, line) in zip(key, places, strict=True):
        y = height - bottom - 32 - line * 30
        put_dot(figure, x, y, colour, colour)
        put_text(figure, x + 16, y, fitted(text, 200, LABEL), LABEL, INK)
    return figure


def _key_places(widths: Sequence[float]) -> list[tuple[float, int]]:
    """(x, line) of a key's entries: in one line if they fit, else in columns of equal width."""
    room, mark = WIDTH - 2 * MARGIN, 48
    if sum(widths) + mark * len(widths) <= room:
        return [(MARGIN + 8 + sum(widths[:i]) + mark * i, 0) for i in range(len(widths))]
    step = max(widths) + mark
    lines = math.ceil(len(widths) / max(1, room // step))
    columns = math.ceil(len(widths) / lines)
    return [(MARGIN + 8 + i % columns * room / columns, i // columns) for i in range(len(widths))]


def _label_colour(index: int) -> Colour:
    """The palette's colours, then the same colours halfway to white."""
    colour = PALETTE[index % len(PALETTE)]
    return colour if index < len(PALETTE) else paler(colour, 0.5)
