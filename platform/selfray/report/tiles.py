"""Lays out tiles, which are images with frames and captions, on one picture under a title."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from selfray.report.style import (
    CAPTION,
    FAINT,
    INK,
    LABEL,
    MARGIN,
    MUTED,
    TITLE,
    WIDTH,
    fitted,
    font,
)

HEADINGS = 100
"""Height in pixels of a sheet's title, subtitle and column headers."""
_GAP = 8
_FRAMED_GAP = 12
_LEAD_GAP = 20
_BLOCK_GAP = 40
_FRAME = 4
_LARGEST_CELL = 240
_SHRUNK_CELLS = (80, 96, 112, 128, 160, 192, 224)
_WIDEST = 1400


@dataclass(frozen=True)
class Tile:
    pixels: np.ndarray
    """uint8 [3, h, w]."""
    frame: str | None = None
    caption: str = ""
    colour: str = MUTED


def sheet(
    title: str,
    subtitle: str | Sequence[tuple[str, str]],
    header: Sequence[str],
    blocks: Sequence[Sequence[Tile]],
    size: int,
) -> Image.Image:
    """Draw blocks of tiles under a title; a block is a row of one image and its related tiles.

    `subtitle` is a line of text, or a key of (colour, text). `header` names a block's columns; an
    empty name leaves its space to the previous one. `size` is the side of most tiles in pixels.
    """
    columns = len(header)
    caption = 28 if any(tile.caption for block in blocks for tile in block) else 0
    gap = _FRAMED_GAP if any(tile.frame for block in blocks for tile in block) else _GAP
    cell, across = _layout(len(blocks), columns, size, gap)
    offsets = [0] + [cell + _LEAD_GAP + i * (cell + gap) for i in range(columns - 1)]
    block_width, row_height = offsets[-1] + cell, cell + caption + _LEAD_GAP
    down = math.ceil(len(blocks) / across)
    used = across * (block_width + _BLOCK_GAP) - _BLOCK_GAP
    # Even a single narrow block must be wide enough for the title.
    width = 2 * MARGIN + max(used, math.ceil(font(TITLE, bold=True).getlength(title)))
    top = MARGIN + HEADINGS
    drawn = Image.new("RGB", (width, top + down * row_height - _LEAD_GAP + MARGIN), "white")
    draw = ImageDraw.Draw(drawn)
    draw.text((MARGIN, MARGIN), title, INK, font(TITLE, bold=True), anchor="lt")
    _draw_subtitle(draw, subtitle, MARGIN + 50)
    for index, block in enumerate(blocks):
        left = MARGIN + index % across * (block_width + _BLOCK_GAP)
        y = top + index // across * row_height
        for column, (tile, offset) in enumerate(zip(block, offsets, strict=True)):
            x = left + offset
            if index < across and header[column]:
                end = next((c for c in range(column + 1, columns) if header[c]), columns)
                room = (offsets[end] - 6 if end < columns else block_width) - offset
                text = fitted(header[column], room, LABEL)
                draw.text((x, top - 12), text, MUTED, font(LABEL), anchor="ls")
            picture = _enlarged(tile.pixels, cell)
            at_x, at_y = x + (cell - picture.width) // 2, y + (cell - picture.height) // 2
            # At least a hairline, so that photographs with a white background have an edge.
            edge = _FRAME if tile.frame else 1
            outline = (at_x - edge, at_y - edge, at_x + picture.width + edge - 1)
            draw.rectangle((*outline, at_y + picture.height + edge - 1), tile.frame or FAINT)
            drawn.paste(picture, (at_x, at_y))
            if tile.caption:
                text = fitted(tile.caption, cell + gap // 2, CAPTION)
                draw.text((x + cell / 2, y + cell + 21), text, tile.colour, font(CAPTION), "ms")
    return drawn


def _layout(blocks: int, columns: int, size: int, gap: int) -> tuple[int, int]:
    """(side of a cell, blocks across): the sheet is near WIDTH and wider than tall; cells are
    preferably multiples of `size`."""

    def extent(cell: int, across: int) -> tuple[int, int]:
        block = columns * cell + (columns - 1) * gap + _LEAD_GAP - gap
        rows = math.ceil(blocks / across)
        return 2 * MARGIN + across * (block + _BLOCK_GAP) - _BLOCK_GAP, rows * (cell + _LEAD_GAP)

    def cost(choice: tuple[int, int]) -> float:
        cell, across = choice
        width, height = extent(cell, across)
        slots = math.ceil(blocks / across) * across
        shape = math.log(height / width / 0.5)
        return (
            abs(math.log(width / WIDTH))
            + (2 * shape if shape > 0 else -0.4 * shape)  # too tall is worse than too wide
            + 4 * (slots - blocks) / slots
            + (2 if cell < 72 else 0)
        )

    cells = list(range(size, _LARGEST_CELL + 1, size))
    cells += [cell for cell in _SHRUNK_CELLS if cell < size]
    choices = [
        (cell, across)
        for cell in cells
        for across in range(1, blocks + 1)
        if extent(cell, across)[0] <= _WIDEST
    ]
    if not choices:
        return max(8, (_WIDEST - 2 * MARGIN) // columns - gap), 1
    return min(choices, key=cost)


def _enlarged(pixels: np.ndarray, side: int) -> Image.Image:
    """An image uint8 [3, h, w], resized to fit a square: nearest-neighbour up, Lanczos down."""
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    factor = side / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    resample = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    return picture.resize(size, resample)


def _draw_subtitle(
    draw: ImageDraw.ImageDraw, subtitle: str | Sequence[tuple[str, str]], baseline: int
) -> None:
    if isinstance(subtitle, str):
        draw.text((MARGIN, baseline), subtitle, MUTED, font(LABEL), anchor="ls")
        return
    x = MARGIN
    for colour, text in subtitle:
        draw.rectangle((x, baseline - 13, x + 13, baseline), None, colour, 4)
        draw.text((x + 22, baseline), text, MUTED, font(LABEL), anchor="ls")
        x += 22 + int(font(LABEL).getlength(text)) + 32


def as_rgb(images: np.ndarray) -> np.ndarray:
    """Images uint8 [..., C, H, W] as RGB [..., 3, H, W], for display.

    Gray is repeated in all channels; multispectral images show their first three channels (with two
    channels, the first as gray).
    """
    channels = images.shape[-3]
    if channels >= 3:
        return images[..., :3, :, :]
    return np.repeat(images[..., :1, :, :], 3, axis=-3)
