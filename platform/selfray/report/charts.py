"""Charts of runs: losses and probes against images seen, and comparisons of methods."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from selfray.check import require
from selfray.metrics import probe_name
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
    put_mark,
    put_text,
    render,
    require_accuracy,
    require_points,
    typeface,
    x_label,
)
from selfray.report.style import (
    CAPTION,
    INK,
    LABEL,
    MARGIN,
    MUTED,
    PALETTE,
    WIDTH,
    fitted,
    font,
    paler,
    percent,
)


def training_curves(
    losses: Mapping[str, Points],
    probes: Mapping[str, Mapping[str, Points]],
    baselines: Mapping[str, float] | None = None,
    title: str = "Pretraining",
) -> Image.Image:
    """Losses, in one panel per method because they are not comparable, and probes in one panel.

    Args:
        losses: by method, (images seen, loss).
        probes: by method and probe ("knn", "linear"), (images seen, accuracy in 0..1).
        baselines: accuracies in 0..1 by name, such as {"raw pixels, kNN": 0.35}; dashed lines.
        title: the picture's title.

    Raises ValueError if there is nothing to draw or an accuracy lies outside 0..1.
    """
    return render(_curves_figure(losses, probes, baselines or {}, title))


@dataclass(frozen=True)
class Compared:
    """A method's accuracies in 0..1 by probe ("knn", "linear"), before and after pretraining."""

    untrained: Mapping[str, float]
    pretrained: Mapping[str, float]
    judged_by: str
    """The probe by which this method is ranked; it is drawn in full colour."""


def comparison(
    methods: Mapping[str, Compared],
    baselines: Mapping[str, float] | None = None,
    title: str = "Pretrained without labels",
) -> Image.Image:
    """One row per method and one panel per probe: a line from untrained to pretrained accuracy.

    Args:
        methods: by name, from the top down; all with the same probes.
        baselines: raw pixels' accuracy in 0..1 by probe, a dashed line in the probe's panel.
        title: the picture's title.

    Raises ValueError if there is nothing to draw or an accuracy lies outside 0..1.
    """
    return render(_comparison_figure(methods, baselines or {}, title))


_LOSS_HEIGHT, _ROW_GAP, _COLUMN_GAP = 150, 88, 80
_SMOOTH_FROM = 60
_PANEL_GAP, _NUMBERS = 28, 150


def _curves_figure(
    losses: Mapping[str, Points],
    probes: Mapping[str, Mapping[str, Points]],
    baselines: Mapping[str, float],
    title: str,
) -> Figure:
    probes = {method: kinds for method, kinds in probes.items() if kinds}
    require(bool(losses or probes), "there is nothing to draw: losses and probes are both empty")
    for method, curve in losses.items():
        require_points(f"losses[{method!r}]", curve)
    for method, kinds in probes.items():
        for kind, curve in kinds.items():
            name = f"probes[{method!r}][{kind!r}]"
            require_points(name, curve)
            for _, accuracy in curve:
                require_accuracy(name, accuracy)
    for name, accuracy in baselines.items():
        require_accuracy(f"baselines[{name!r}]", accuracy)

    methods = list(dict.fromkeys([*losses, *probes]))
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(methods)}
    # Up to three losses are in a column left of the probes, more than three in rows below.
    column = 0 < len(losses) <= 3 and bool(probes)
    across = 1 if column else min(4, max(1, len(losses)))
    rows = math.ceil(len(losses) / across)
    losses_height = max(rows * (_LOSS_HEIGHT + _ROW_GAP) - _ROW_GAP, 400 if column else 0)
    losses_width = 300 if column else WIDTH - 2 * MARGIN - TICKS
    stacked = 0 if column or not (losses and probes) else 400 + _ROW_GAP + 30
    probes_height = losses_height if column else 400 if probes else 0
    top = 112
    height = top + 64 + (losses_height if column else stacked + losses_height or probes_height)
    figure = new_figure(height, title)
    panel_width = (losses_width - (across - 1) * _COLUMN_GAP) // across
    panel_height = (losses_height - (rows - 1) * _ROW_GAP) // max(1, rows)
    for index, (method, curve) in enumerate(losses.items()):
        left = MARGIN + TICKS + index % across * (panel_width + _COLUMN_GAP)
        upper = top + stacked + index // across * (panel_height + _ROW_GAP)
        axes = new_axes(figure, left, upper, panel_width, panel_height, f"{method}: loss")
        _draw_loss(axes, curve, colours[method])
        if index + across >= len(losses):
            x_label(axes, "images seen")
    if probes:
        left = MARGIN + TICKS + 12 + (losses_width + _COLUMN_GAP if column else 0)
        _draw_probes(figure, left, top, probes_height, probes, baselines, colours)
    return figure


def _draw_loss(axes: Axes, curve: Points, colour: str) -> None:
    data = np.array(sorted(curve), dtype=np.float64)  # [n, 2]
    data = data[np.isfinite(data[:, 1])]
    if len(data) == 0:
        axes.text(0.5, 0.5, "no finite value", color=MUTED, ha="center", transform=axes.transAxes)
        return
    images_seen, values = data.T
    if len(values) >= _SMOOTH_FROM:
        axes.plot(images_seen, values, color=colour, alpha=0.28, linewidth=1)
        window = len(values) // 20 | 1
        axes.plot(images_seen, _running_mean(values, window), color=colour, linewidth=2.2)
        axes.text(
            0.98, 0.94, f"bold: mean of {window} points", color=MUTED, ha="right", va="top",
            fontproperties=typeface(CAPTION - 1), transform=axes.transAxes,
        )  # fmt: skip
    else:
        marker = "o" if len(values) == 1 else ""
        axes.plot(images_seen, values, color=colour, linewidth=2.2, marker=marker)
    axes.set_xlim(0, max(images_seen.max(), 1e-9) * 1.02)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The centred running mean of values [n] over `window` values, over fewer at the ends: [n]."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _draw_probes(
    figure: Figure,
    left: int,
    top: int,
    height: int,
    probes: Mapping[str, Mapping[str, Points]],
    baselines: Mapping[str, float],
    colours: Mapping[str, str],
) -> None:
    """Draw the probes' panel and, right of it, its key, with each name near the end of its line."""
    key: list[_KeyLine] = []
    for method, kinds in probes.items():
        for kind, curve in kinds.items():
            last = max(curve)[1]
            face = "white" if kind == "knn" else colours[method]
            name = f"{method}, {probe_name(kind)}"
            key.append(_KeyLine(last, name, colours[method], face))
    key += [_KeyLine(accuracy, name, MUTED, None) for name, accuracy in baselines.items()]
    key.sort(key=lambda line: line.value)
    names = [fitted(line.name, 240, LABEL) for line in key]
    number_width = font(LABEL).getlength("100.0 %") + 12
    key_width = KEY_MARK + max(map(font(LABEL).getlength, names)) + number_width
    key_left = WIDTH - MARGIN - key_width
    width = int(key_left - KEY_GAP) - left

    axes = new_axes(figure, left, top, width, height, "probe accuracy on test images")
    x_label(axes, "images seen")
    last_seen = 0.0
    for method, kinds in probes.items():
        for kind, curve in kinds.items():
            images_seen, values = np.array(sorted(curve), dtype=np.float64).T
            face = "white" if kind == "knn" else colours[method]
            axes.plot(
                images_seen, 100 * values, color=colours[method], linewidth=2.2, marker="o",
                markersize=7, markerfacecolor=face, markeredgewidth=1.8, clip_on=False, zorder=3,
            )  # fmt: skip
            last_seen = max(last_seen, images_seen[-1])
    for accuracy in baselines.values():
        axes.axhline(100 * accuracy, color=MUTED, linewidth=1.3, dashes=(5, 4), zorder=1)
    drawn = [100 * v for kinds in probes.values() for curve in kinds.values() for _, v in curve]
    drawn += [100 * accuracy for accuracy in baselines.values()]
    pad = max(2.0, 0.06 * (max(drawn) - min(drawn)))
    low, high = max(0.0, min(drawn) - pad), min(100.0, max(drawn) + pad)
    axes.set_ylim(low, high)
    axes.set_xlim(0, max(last_seen, 1e-9) * 1.02)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))

    bottom = figure.get_size_inches()[1] * DPI - top - height
    ends = [bottom + (100 * line.value - low) / (high - low) * height for line in key]
    ends = _spread_out(ends, KEY_STEP, bottom, bottom + height)
    for y, line, name in zip(ends, key, names, strict=True):
        if line.face is None:
            put_mark(figure, [key_left - 4, key_left + 15], [y, y], line.colour, dashes=(4, 3))
        else:
            put_dot(figure, key_left + 6, y, line.colour, line.face)
        put_text(figure, key_left + KEY_MARK, y, name, LABEL, line.colour)
        number = percent(line.value, digits=1)
        x = WIDTH - MARGIN - font(LABEL).getlength(number)
        put_text(figure, x, y, number, LABEL, line.colour)


@dataclass(frozen=True)
class _KeyLine:
    value: float
    """The last accuracy, in 0..1."""
    name: str
    colour: str
    face: str | None
    """Fill colour of the marker; None for a baseline, which has no marker."""


def _spread_out(
    positions: Sequence[float], distance: float, low: float = -math.inf, high: float = math.inf
) -> list[float]:
    """Move ascending positions as little as possible so that they are `distance` apart in
    low..high.
    """
    # Groups that touch are merged and centred on the mean of their members' original positions.
    groups: list[list[float]] = []

    def first(group: list[float]) -> float:
        extent = distance * (len(group) - 1)
        return max(low, min(high - extent, sum(group) / len(group) - extent / 2))

    for position in positions:
        groups.append([position])
        while len(groups) > 1:
            before, last = groups[-2:]
            if first(before) + distance * len(before) <= first(last):
                break
            groups[-2:] = [before + last]
    return [first(group) + distance * i for group in groups for i in range(len(group))]


def _comparison_figure(
    methods: Mapping[str, Compared], baselines: Mapping[str, float], title: str
) -> Figure:
    require(len(methods) > 0, "there is no method to compare")
    probes = list(next(iter(methods.values())).pretrained)
    for name, method in methods.items():
        for when, values in (("untrained", method.untrained), ("pretrained", method.pretrained)):
            require(
                list(values) == probes,
                f"methods[{name!r}].{when} has the probes {', '.join(values)}, not those of the "
                f"first method, {', '.join(probes)}",
            )
            for probe, accuracy in values.items():
                require_accuracy(f"methods[{name!r}].{when}[{probe!r}]", accuracy)
        require(
            method.judged_by in probes,
            f"methods[{name!r}].judged_by {method.judged_by!r} is not one of {', '.join(probes)}",
        )
    for probe, accuracy in baselines.items():
        require_accuracy(f"baselines[{probe!r}]", accuracy)

    names = [fitted(name, 220, LABEL) for name in methods]
    names_width = math.ceil(max(map(font(LABEL).getlength, names))) + 20
    room = (WIDTH - 2 * MARGIN - names_width + _PANEL_GAP) // len(probes) - _PANEL_GAP
    width = room - _NUMBERS
    top, height = 132, len(methods) * ROW_STEP
    figure = new_figure(top + height + 104, title)
    full = figure.get_size_inches()[1] * DPI
    rows = [full - top - (index + 0.5) * ROW_STEP for index in range(len(methods))]
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(methods)}
    for shown, y, colour in zip(names, rows, colours.values(), strict=True):
        put_text(figure, MARGIN, y, shown, LABEL, colour, bold=True)
    for index, probe in enumerate(probes):
        left = MARGIN + names_width + index * (room + _PANEL_GAP)
        panel_title = f"{probe_name(probe)} accuracy on test images"
        axes = new_axes(figure, left, top, width, height, panel_title)
        _draw_compared(axes, probe, methods, colours, baselines.get(probe))
        for (name, method), y in zip(methods.items(), rows, strict=True):
            judges = probe == method.judged_by
            ink = colours[name] if judges else MUTED
            number = percent(method.pretrained[probe], digits=1)
            put_text(figure, left + width + 14, y, number, LABEL, ink, bold=judges)
            gain = f"{100 * (method.pretrained[probe] - method.untrained[probe]):+.1f}"
            put_text(figure, left + width + 94, y, gain, CAPTION, MUTED)
    _comparison_key(figure, bool(baselines))
    return figure


def _draw_compared(
    axes: Axes,
    probe: str,
    methods: Mapping[str, Compared],
    colours: Mapping[str, str],
    baseline: float | None,
) -> None:
    """A line from each method's untrained encoder (hollow) to its pretrained one (filled)."""
    drawn = [] if baseline is None else [100 * baseline]
    for index, (name, method) in enumerate(methods.items()):
        ends = [100 * method.untrained[probe], 100 * method.pretrained[probe]]
        drawn += ends
        colour = colours[name] if probe == method.judged_by else paler(colours[name])
        axes.plot(ends, [index, index], color=colour, linewidth=3, zorder=2)
        for value, face in zip(ends, ("white", colour), strict=True):
            axes.plot(
                value, index, marker="o", markersize=9, color=colour, markerfacecolor=face,
                markeredgewidth=1.8, clip_on=False, zorder=3,
            )  # fmt: skip
    if baseline is not None:
        axes.axvline(100 * baseline, color=MUTED, linewidth=1.3, dashes=(5, 4), zorder=1)
    pad = max(2.0, 0.05 * (max(drawn) - min(drawn)))
    axes.set_xlim(max(0.0, min(drawn) - pad), min(100.0, max(drawn) + pad))
    axes.set_ylim(len(methods) - 0.5, -0.5)  # the first method on top
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))


def _comparison_key(figure: Figure, has_baselines: bool) -> None:
    """Draw the legend in one line at the bottom."""
    y = 34
    entries = [("white", "untrained encoder"), (INK, "pretrained"), (None, "raw pixels")]
    x = float(MARGIN)
    for face, text in entries[: 3 if has_baselines else 2]:
        if face is None:
            put_mark(figure, [x, x + 26], [y, y], MUTED, dashes=(5, 4), linewidth=1.3)
        else:
            put_dot(figure, x + 12, y, INK, face)
        put_text(figure, x + 34, y, text, CAPTION, MUTED)
        x += 34 + font(CAPTION).getlength(text) + 30
    put_text(figure, x, y, "in full colour: the probe that ranks the method", CAPTION, MUTED)
