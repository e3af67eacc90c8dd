"""Colours, fonts and number formats shared by sheets and charts."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from PIL import ImageFont

from selfray.check import require

Colour = str | tuple[float, float, float]
INK, MUTED, FAINT = "#1f2933", "#667080", "#e4e7eb"
AGREES, DIFFERS, UNKNOWN = "#2a9d5c", "#d64545", "#b4bac2"
PALETTE = (
    "#3b6fb6", "#e8833a", "#3f9d5c", "#d1495b", "#8661c1",
    "#2aa6b8", "#cf9a12", "#e07bb0", "#8c6248", "#2f3e57",
)  # fmt: skip
WIDTH = 1200
"""Width of charts, and approximate width of sheets, in pixels."""
MARGIN = 36
TITLE, LABEL, CAPTION = 25, 17, 15
"""Font sizes in pixels."""
_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
REGULAR, BOLD = str(_FONTS / "DejaVuSans.ttf"), str(_FONTS / "DejaVuSans-Bold.ttf")


@cache
def font(pixels: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(BOLD if bold else REGULAR, pixels)


def fitted(text: str, width: float, pixels: int) -> str:
    """The text, shortened with an ellipsis if it is wider than `width` pixels."""
    face = font(pixels)
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def paler(colour: Colour, share: float = 0.65) -> Colour:
    """A colour mixed with this share of white; opaque, unlike a transparent colour."""
    red, green, blue = (share + (1 - share) * value for value in to_rgb(colour))
    return red, green, blue


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def label_name(label: int, label_names: Sequence[str] | None) -> str:
    if label < 0:
        return "?"
    return str(label) if label_names is None else label_names[label]


def require_labels(
    name: str, labels: np.ndarray, shape: tuple[int, ...], label_names: Sequence[str] | None
) -> None:
    require(
        labels.shape == shape and np.issubdtype(labels.dtype, np.integer),
        f"{name} must be integers {list(shape)}, got {labels.dtype} {list(labels.shape)}",
    )
    require(
        label_names is None or int(labels.max()) < len(label_names),
        f"{name} holds {labels.max()}, but label_names has {len(label_names or ())} names",
    )
