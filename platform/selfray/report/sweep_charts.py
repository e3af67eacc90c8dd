"""Charts of a sweep: the result of each tried value, and the curve of each run."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from selfray.check import require
from selfray.report.canvas import (
    DPI,
    KEY_GAP,
    KEY_MARK,
    KEY_STEP,
    ROW_STEP,
    TICKS,
    Points,
    new_axes,
    new_figure,
    put_dot,
    put_text,
    render,
    require_accuracy,
    require_points,
    x_label,
)
from selfray.report.style import (
    CAPTION,
    FAINT,
    INK,
    LABEL,
    MARGIN,
    MUTED,
    PALETTE,
    WIDTH,
    fitted,
    font,
    percent,
)


def sweep(
    values: Mapping[str, Sequence[float]],
    metric: str,
    untrained: float | None,
    title: str,
    answer: str = "",
    is_accuracy: bool = True,
) -> Image.Image:
    """One row per tried value: a dot for each run, and a bar at their mean.

    Args:
        values: accuracies in 0..1 of the runs, by tried value, from the top down.
        metric: the probe's name.
        untrained: the untrained encoder's accuracy, a dashed line; None draws none.
        title: the picture's title.
        answer: a sentence at the bottom.
        is_accuracy: False if the values are plain figures such as RankMe, not accuracies.

    Raises ValueError if there is nothing to draw or an accuracy lies outside 0..1.
    """
    return render(_sweep_figure(values, metric, untrained, title, answer, is_accuracy))


def sweep_curves(
    curves: Mapping[tuple[str, int], Points], metric: str, title: str, is_accuracy: bool = True
) -> Image.Image:
    """The probes of all runs of a sweep against images seen, in one chart.

    Args:
        curves: (images seen, value) pairs by (tried value, seed); the seeds of a value share its
            colour.
        metric: the probe's name.
        title: the picture's title.
        is_accuracy: whether the values are accuracies in 0..1.

    Raises ValueError if there is nothing to draw or an accuracy lies outside 0..1.
    """
    return render(_sweep_curves_figure(curves, metric, title, is_accuracy))


def _sweep_figure(
    values: Mapping[str, Sequence[float]],
    metric: str,
    untrained: float | None,
    title: str,
    answer: str,
    is_accuracy: bool,
) -> Figure:
    require(len(values) > 0, "there is no run to draw")
    for name, runs in values.items():
        require(len(runs) > 0, f"values[{name!r}] is empty")
        for value in runs:
            _require_figure(f"values[{name!r}]", value, is_accuracy)
    unit = 100 if is_accuracy else 1
    names = [fitted(name, 360, LABEL) for name in values]
    names_width = math.ceil(max(map(font(LABEL).getlength, names))) + 20
    width = WIDTH - 2 * MARGIN - names_width - 90
    top, height = 132, len(values) * ROW_STEP
    lines = textwrap.wrap(answer, 118)
    foot = 30 + 24 * max(0, len(lines) - 1)
    figure = new_figure(top + height + 74 + foot, title)
    full = figure.get_size_inches()[1] * DPI
    axes = new_axes(
        figure,
        MARGIN + names_width,
        top,
        width,
        height,
        _metric_title(metric, is_accuracy),
    )
    means = [sum(runs) / len(runs) for runs in values.values()]
    best = max(means)
    drawn = [unit * v for runs in values.values() for v in runs]
    for index, (shown, runs, mean) in enumerate(zip(names, values.values(), means, strict=True)):
        colour = PALETTE[0] if mean == best else MUTED
        y = full - top - (index + 0.5) * ROW_STEP
        put_text(figure, MARGIN, y, shown, LABEL, colour, bold=mean == best)
        axes.plot(
            [unit * v for v in runs], [index] * len(runs), linestyle="none", marker="o",
            markersize=9, color=colour, markerfacecolor="white", markeredgewidth=1.8, zorder=3,
        )  # fmt: skip
        axes.plot([unit * mean] * 2, [index - 0.32, index + 0.32], color=colour, linewidth=3)
        number = percent(mean, digits=1) if is_accuracy else f"{mean:.3g}"
        x = MARGIN + names_width + width + 14
        put_text(figure, x, y, number, LABEL, colour, bold=mean == best)
    if untrained is not None:
        _require_figure("untrained", untrained, is_accuracy)
        drawn.append(unit * untrained)
        axes.axvline(unit * untrained, color=MUTED, linewidth=1.3, dashes=(5, 4), zorder=1)
    axes.set_xlim(*_limits(drawn, is_accuracy))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(_formatter(is_accuracy))
    key = "a dot for each run, a bar at their mean"
    key += "; dashed: untrained" if untrained is not None else ""
    put_text(figure, MARGIN, foot + 28, key, CAPTION, MUTED)
    for index, line in enumerate(lines):
        shown = fitted(line, WIDTH - 2 * MARGIN, CAPTION)
        put_text(figure, MARGIN, foot - 24 * index, shown, CAPTION, INK)
    return figure


def _sweep_curves_figure(
    curves: Mapping[tuple[str, int], Points], metric: str, title: str, is_accuracy: bool
) -> Figure:
    require(len(curves) > 0, "there is no curve to draw")
    for name, curve in curves.items():
        require_points(f"curves[{name!r}]", curve)
        for _, value in curve:
            _require_figure(f"curves[{name!r}]", value, is_accuracy)
    unit = 100 if is_accuracy else 1
    labels = list(dict.fromkeys(label for label, _ in curves))
    # There are only as many colours as in the palette: they go to the best values.
    ends = {name: [max(c)[1] for (n, _), c in curves.items() if n == name] for name in labels}
    best = sorted(labels, key=lambda name: -max(ends[name]))[: len(PALETTE)]
    colours = {name: PALETTE[i] for i, name in enumerate(n for n in labels if n in best)}
    keyed = [name for name in labels if name in colours]
    shown = {name: fitted(name, 300, LABEL) for name in keyed}
    key_width = KEY_MARK + math.ceil(max(map(font(LABEL).getlength, shown.values()))) + 8
    top, height = 132, max(360, len(keyed) * KEY_STEP)
    left = MARGIN + TICKS + 12
    width = WIDTH - MARGIN - key_width - KEY_GAP - left
    figure = new_figure(top + height + 92, title)
    axes = new_axes(figure, left, top, width, height, _metric_title(metric, is_accuracy))
    x_label(axes, "images seen")
    drawn = []
    for (name, _), curve in curves.items():
        images_seen, values = np.array(sorted(curve), dtype=np.float64).T
        colour = colours.get(name, FAINT)
        axes.plot(
            images_seen, unit * values, color=colour, linewidth=2, marker="o", markersize=5,
            alpha=0.85, clip_on=False, zorder=3 if name in colours else 2,
        )  # fmt: skip
        drawn += list(unit * values)
    axes.set_ylim(*_limits(drawn, is_accuracy))
    axes.yaxis.set_major_formatter(_formatter(is_accuracy))
    full = figure.get_size_inches()[1] * DPI
    for index, name in enumerate(keyed):
        x, y = WIDTH - MARGIN - key_width, full - top - (index + 0.5) * KEY_STEP
        put_dot(figure, x + 6, y, colours[name], colours[name])
        put_text(figure, x + KEY_MARK, y, shown[name], LABEL, colours[name])
    rest = len(labels) - len(keyed)
    key = "a line for each run, to where it ended; seeds share a colour"
    put_text(figure, MARGIN, 30, key + (f"; gray: {rest} more" if rest else ""), CAPTION, MUTED)
    return figure


def _metric_title(metric: str, is_accuracy: bool) -> str:
    return f"{metric} accuracy on test images" if is_accuracy else f"{metric}, label-free"


def _limits(drawn: Sequence[float], is_accuracy: bool) -> tuple[float, float]:
    """Axis limits around the drawn values; for accuracies within 0 and 100 percent."""
    low, high = min(drawn), max(drawn)
    if not is_accuracy:
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return low - pad, high + pad
    pad = max(2.0, 0.05 * (high - low))
    return max(0.0, low - pad), min(100.0, high + pad)


def _formatter(is_accuracy: bool) -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:g} %" if is_accuracy else f"{value:g}")


def _require_figure(name: str, value: float, is_accuracy: bool) -> None:
    if is_accuracy:
        require_accuracy(name, value)
    require(math.isfinite(value), f"{name} holds {value}")
