"""Contact sheets: a choice of a data set's images, and pairs of images, as one picture."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from selfray.check import require
from selfray.report.style import AGREES, DIFFERS, MUTED
from selfray.report.tiles import Tile, as_rgb, sheet

TILE = 96
"""Side in pixels of most tiles of a contact sheet."""


def contact_sheet(
    images: Sequence[np.ndarray], title: str, subtitle: str, captions: Sequence[str] = ()
) -> Image.Image:
    """Images of any size side by side.

    Args:
        images: uint8 [H, W, C] each; of more than three channels the first three are shown.
        captions: a text below each image; empty for none.
    """
    require(len(images) > 0, "a contact sheet needs at least one image")
    texts = captions or [""] * len(images)
    blocks = [
        [Tile(_shown(image), caption=text)] for image, text in zip(images, texts, strict=True)
    ]
    return sheet(title, subtitle, [""], blocks, size=TILE)


def pairs_sheet(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    captions: Sequence[tuple[str, str]],
    title: str,
    subtitle: str,
) -> Image.Image:
    """Pairs of an image that stays, framed green, and one that goes, framed red.

    Args:
        pairs: (stays, goes), each uint8 [H, W, C].
        captions: a text below each image of each pair.
    """
    require(len(pairs) > 0, "a sheet of pairs needs at least one pair")
    blocks = [
        [Tile(_shown(stays), AGREES, first, MUTED), Tile(_shown(goes), DIFFERS, second, MUTED)]
        for (stays, goes), (first, second) in zip(pairs, captions, strict=True)
    ]
    return sheet(title, subtitle, ["stays", "goes"], blocks, size=TILE)


def views_sheet(
    images: Sequence[np.ndarray],
    views: Sequence[Sequence[np.ndarray]],
    title: str,
    names: list[str],
) -> Image.Image:
    """Each image beside its views, which may differ in size.

    Args:
        images: uint8 [H, W, C] each.
        views: for each image its views, uint8 [C, h, w] each.
        names: a name for each view.
    """
    blocks = [
        [Tile(_shown(image)), *(Tile(as_rgb(view)) for view in own)]
        for image, own in zip(images, views, strict=True)
    ]
    subtitle = f"{len(names)} views of each image; all are drawn at one size"
    return sheet(title, subtitle, ["original", *names], blocks, size=TILE)


def stacked(*pictures: Image.Image) -> Image.Image:
    """Pictures one below the other."""
    width = max(picture.width for picture in pictures)
    whole = Image.new("RGB", (width, sum(picture.height for picture in pictures)), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def channels_shown(channels: int) -> str:
    """Which channels of an image a picture shows; empty if it shows all."""
    if channels == 2:
        return "channel 1 of 2 as gray"
    if channels > 3:
        return f"channels 1, 2 and 3 of {channels} as red, green and blue"
    return ""


def _shown(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [3, H, W]."""
    return as_rgb(image.transpose(2, 0, 1))
