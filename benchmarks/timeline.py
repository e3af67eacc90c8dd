"""Draws where the CPU seconds of a command went, process by process, from what start.py measured.

python benchmarks/timeline.py start.json simclr-digits docs/start.png
"""

import json
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

from selfray.report.canvas import new_axes, new_figure, put_text, render, x_label
from selfray.report.style import CAPTION, INK, MARGIN, MUTED, PALETTE, WIDTH, paler

NAMES = 300
"""Width in pixels of the column of names."""
ROW, HEAD, FOOT = 30, 110, 70
LEAST_SECONDS = 0.3
"""Processes that used less CPU time are left out."""


def draw(measured: dict[str, Any], title: str, path: Path) -> None:
    """Write the picture: a row for each process, dark where it kept a CPU busy."""
    rows = [each for each in measured["processes"] if each["seconds"] >= LEAST_SECONDS]
    rows.sort(key=lambda each: each["began"])
    height = HEAD + ROW * len(rows) + FOOT
    figure = new_figure(height, title)
    axes = new_axes(figure, NAMES, HEAD, WIDTH - NAMES - MARGIN, ROW * len(rows), "")
    for number, each in enumerate(rows):
        began = before = (each["began"], 0.0)
        axes.barh(number, each["ended"] - began[0], 0.7, began[0], color=paler(PALETTE[0], 0.85))
        for moment, used in (*each["course"], (each["ended"], each["seconds"])):
            if moment > before[0]:
                busy = min(1.0, (used - before[1]) / (moment - before[0]))
                shade = paler(PALETTE[0], 0.85 * (1 - busy))
                axes.barh(number, moment - before[0], 0.7, before[0], color=shade)
                before = (moment, used)
        y = height - HEAD - ROW * (number + 0.5)
        text = f"{each['name']}: {each['seconds']:.1f} s, {each['memory_gib']:.2f} GiB"
        put_text(figure, MARGIN, y, text, CAPTION, INK)
    for name, moment in measured["seconds"].items():
        axes.axvline(moment, color=MUTED, linewidth=1)
        axes.annotate(
            name,
            (moment, 1),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            rotation=30,
            color=MUTED,
        )
    axes.set(ylim=(len(rows) - 0.5, -0.5), yticks=[], xlim=(0, None))
    x_label(axes, "seconds from the command; each row: CPU seconds and largest memory (PSS)")
    render(figure).save(path, optimize=True)


def main(file: Positional[Path], case: Positional[str], picture: Positional[Path]) -> None:
    """Draw the last round of a case of `start.py --output FILE`."""
    draw(json.loads(file.read_text())[case][-1], f"Processes of {case}", picture)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
