"""Pictures of an evaluation: the confusion matrix, and accuracy against the number of labels."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator
from PIL import Image

from selfray.check import require
from selfray.report.canvas import DPI, new_axes, new_figure, put_dot, put_text, render, x_label
from selfray.report.style import INK, LABEL, MARGIN, MUTED, PALETTE, WIDTH, fitted, percent

MOST_NAMES = 40
"""With more classes than this, the matrix is drawn without class names."""
_SIDE, _NAMES = 760, 190


def confusion_matrix(counts: np.ndarray, names: Sequence[str], title: str) -> Image.Image:
    """Shares of each true class's test images (row) predicted as each class (column).

    Args:
        counts: int [C, C], numbers of test images; names: those of the C classes.

    Raises ValueError if the shapes do not fit.
    """
    classes = len(names)
    require(
        counts.shape == (classes, classes),
        f"counts must be [{classes}, {classes}] for {classes} names, got {list(counts.shape)}",
    )
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = new_figure(_SIDE + 290, title)
    axes = new_axes(figure, MARGIN + _NAMES, 110, _SIDE, _SIDE, "share of each class's images")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.grid(visible=False)
    if classes > MOST_NAMES:
        axes.xaxis.set_major_locator(NullLocator())
        axes.yaxis.set_major_locator(NullLocator())
        x_label(axes, f"predicted class, {classes} in all")
        return render(figure)
    shown = [fitted(name, _NAMES - 30, 15) for name in names]
    axes.set_xticks(range(classes), shown, rotation=90 if classes > 10 else 0)
    axes.set_yticks(range(classes), shown)
    x_label(axes, "predicted class")
    if classes <= 20:
        for row, column in np.ndindex(classes, classes):
            if counts[row, column]:
                colour = "white" if shares[row, column] > 0.5 else INK
                text = str(counts[row, column])
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return render(figure)


def label_efficiency(
    curves: Mapping[str, Sequence[tuple[float, float, float, float]]], title: str
) -> Image.Image:
    """Accuracy against the number of labels, on a logarithmic axis, a line for each encoder.

    Args:
        curves: by encoder, (labels, accuracy, low, high) with accuracies in 0..1; the band from low
            to high is the interval.
    """
    require(
        bool(curves) and all(len(points) > 0 for points in curves.values()),
        "there is nothing to draw: curves are empty",
    )
    height, key = 440, 30 * len(curves)
    figure = new_figure(height + 220 + key, title)
    width = WIDTH - 2 * MARGIN - 60
    axes = new_axes(figure, MARGIN + 60, 110, width, height, "accuracy on test images")
    axes.set_xscale("log")
    full = figure.get_size_inches()[1] * DPI
    for place, (name, points) in enumerate(curves.items()):
        colour = PALETTE[place % len(PALETTE)]
        labels, values, low, high = np.array(sorted(points)).T
        axes.fill_between(labels, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(labels, values, color=colour, marker="o", markersize=5, linewidth=2)
        y = full - (110 + height + 76 + 30 * place)
        put_dot(figure, MARGIN + 70, y, colour, colour)
        text = f"{fitted(name, 700, LABEL)}: {percent(values[-1], 1)} at {labels[-1]:,.0f} labels"
        put_text(figure, MARGIN + 90, y, text, LABEL, colour)
    ticks = sorted({point[0] for points in curves.values() for point in points})
    axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    x_label(axes, "labelled train images")
    put_text(figure, MARGIN, 28, "bands: 95 % intervals over test images and subsets", 15, MUTED)
    return render(figure)
