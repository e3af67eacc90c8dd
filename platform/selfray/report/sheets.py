"""Sheets of images: arrays -> a PIL image, laid out in whole pixels, so that each pixel of a 16 x
16 digit is an exact square."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageDraw
from torch import Tensor

from selfray.check import require
from selfray.models.decoder import patchify, unpatchify
from selfray.models.encoder import normalize
from selfray.report.style import (
    AGREES,
    CAPTION,
    DIFFERS,
    FAINT,
    INK,
    LABEL,
    MARGIN,
    MUTED,
    TITLE,
    UNKNOWN,
    WIDTH,
    fitted,
    font,
    label_name,
    percent,
    plural,
    require_labels,
)

HIDDEN = (146, 153, 165)
"""The slate grey of a hidden patch: not a neutral grey, so digits and scans cannot contain it."""
HEADINGS = 100
"""Height in pixels of a sheet's title, subtitle and column headers."""


def views_grid(
    images: np.ndarray,
    views: np.ndarray,
    mask: np.ndarray | None = None,
    method: str = "the method",
) -> Image.Image:
    """Each image beside its augmented views.

    Args:
        images: uint8 [n, 3, H, W].
        views: uint8 [n, V, 3, h, w].
        mask: bool [n, V, N] in row-major patches; True ones are greyed out.
        method: the name for the title.

    Raises ValueError if a shape or type is not as described.
    """
    images, views = as_rgb(images), as_rgb(views)
    _require_images("images", images, "n 3 H W")
    _require_images("views", views, "n V 3 h w", n=len(images))
    if mask is not None:
        views = hide(views, mask)
    share = "" if mask is None else f"; grey patches are hidden ({percent(mask.mean())})"
    count = views.shape[1]
    return _sheet(
        f"Augmented views that {method} sees",
        f"{plural(count, 'view')} of each image{share}",
        ["original", *(f"view {view + 1}" for view in range(count))],
        [[_Tile(image), *map(_Tile, drawn)] for image, drawn in zip(images, views, strict=True)],
        size=views.shape[-1],
    )


def reconstructions(
    originals: np.ndarray, mask: np.ndarray, rebuilt: np.ndarray, method: str = "MAE"
) -> Image.Image:
    """Each image, its visible patches, and its reconstruction.

    Args:
        originals: uint8 [n, 3, H, W].
        mask: bool [n, N] in row-major patches; True is a hidden patch.
        rebuilt: uint8 [n, 3, H, W], see `rebuild`.
        method: the name for the title.

    Raises ValueError if a shape or type is not as described.
    """
    originals, rebuilt = as_rgb(originals), as_rgb(rebuilt)
    _require_images("originals", originals, "n 3 H W")
    _require_images("rebuilt", rebuilt, "n 3 H W", n=len(originals))
    require(
        rebuilt.shape == originals.shape,
        f"rebuilt must have the shape of originals {originals.shape}, got {rebuilt.shape}",
    )
    masked = hide(originals, mask)
    return _sheet(
        f"What {method} reconstructs",
        f"{percent(mask.mean())} of the patches are hidden from the encoder",
        ["original", "masked", "rebuilt"],
        [[_Tile(image) for image in row] for row in zip(originals, masked, rebuilt, strict=True)],
        size=originals.shape[-1],
    )


def tokens(
    originals: np.ndarray, tokens: np.ndarray, rebuilt: np.ndarray, codes: int
) -> Image.Image:
    """Each image, its tokens as a map with one colour per code, and its reconstruction from them.

    Args:
        originals: uint8 [n, 3, H, W].
        tokens: int [n, N] in row-major patches, in 0..codes - 1.
        rebuilt: uint8 [n, 3, H, W].
        codes: the size of the codebook.

    Raises ValueError if a shape or type is not as described.
    """
    originals, rebuilt = as_rgb(originals), as_rgb(rebuilt)
    _require_images("originals", originals, "n 3 H W")
    _require_images("rebuilt", rebuilt, "n 3 H W", n=len(originals))
    grid = math.isqrt(tokens.shape[-1])
    require(
        tokens.shape == (len(originals), grid * grid),
        f"tokens must be [{len(originals)}, N] with N a square, got {list(tokens.shape)}",
    )
    # Hues lie a golden ratio apart, so that codes with close numbers look different.
    hues = (np.arange(codes) * 0.618034) % 1
    values = 0.55 + 0.45 * ((np.arange(codes) * 0.381966) % 1)
    palette = hsv_to_rgb(np.stack([hues, np.full(codes, 0.65), values], axis=-1))  # [codes, 3]
    maps = (palette[tokens] * 255).round().astype(np.uint8).reshape(-1, grid, grid, 3)
    used = len(np.unique(tokens))
    return _sheet(
        "What the tokenizer keeps",
        f"each patch is one of {codes:,} codes, {used:,} of which occur here",
        ["original", "tokens", "rebuilt"],
        [
            [_Tile(image), _Tile(codes_map.transpose(2, 0, 1)), _Tile(again)]
            for image, codes_map, again in zip(originals, maps, rebuilt, strict=True)
        ],
        size=originals.shape[-1],
    )


def segmentation(
    originals: np.ndarray, attention: np.ndarray, colours: np.ndarray, title: str
) -> Image.Image:
    """Each image, where the class token looks, and its patch tokens as colours.

    Args:
        originals: uint8 [n, 3, H, W].
        attention: float [n, H, W] in 0..1.
        colours: uint8 [n, 3, H, W], principal components.

    Raises ValueError where a shape or type is another.
    """
    originals = as_rgb(originals)
    _require_images("originals", originals, "n 3 H W")
    _require_images("colours", colours, "n 3 H W", n=len(originals))
    require(
        attention.shape == (len(originals), *originals.shape[2:]),
        f"attention must be [n, H, W] of the images, got {list(attention.shape)}",
    )
    maps = np.repeat((attention[:, None] * 255).round().astype(np.uint8), 3, axis=1)
    rows = zip(originals, maps, colours, strict=True)
    return _sheet(
        title,
        "attention of the class token, the head that fits best; patch tokens by their first three "
        "principal components",
        ["original", "attention", "patches"],
        [[_Tile(image) for image in row] for row in rows],
        size=originals.shape[-1],
    )


def neighbours(
    queries: np.ndarray,
    neighbours: np.ndarray,
    query_labels: np.ndarray,
    neighbour_labels: np.ndarray,
    label_names: Sequence[str] | None = None,
    title: str = "Nearest neighbours in feature space",
) -> Image.Image:
    """Each test image beside its nearest train images; frames show whether the classes agree.

    Args:
        queries: uint8 [m, 3, H, W].
        neighbours: uint8 [m, k, 3, H, W], the nearest first.
        query_labels: int [m]; a negative label is unknown and its frames are grey.
        neighbour_labels: int [m, k].
        label_names: captions by label; None prints no captions.
        title: the picture's title, such as the method's name.

    Raises ValueError if a shape, type or label is not as described.
    """
    queries, neighbours = as_rgb(queries), as_rgb(neighbours)
    _require_images("queries", queries, "m 3 H W")
    _require_images("neighbours", neighbours, "m k 3 h w", m=len(queries))
    count, k = neighbours.shape[:2]
    require_labels("query_labels", query_labels, (count,), label_names)
    require_labels("neighbour_labels", neighbour_labels, (count, k), label_names)

    def caption(label: int) -> str:
        return "" if label_names is None else label_name(label, label_names)

    blocks = []
    for query, label, near, near_labels in zip(
        queries, query_labels, neighbours, neighbour_labels, strict=True
    ):
        block = [_Tile(query, caption=caption(label), colour=INK)]
        for image, other in zip(near, near_labels, strict=True):
            known = label >= 0 and other >= 0
            frame = UNKNOWN if not known else AGREES if other == label else DIFFERS
            colour = DIFFERS if frame == DIFFERS else MUTED
            block.append(_Tile(image, frame, caption(other), colour))
        blocks.append(block)
    known = (query_labels[:, None] >= 0) & (neighbour_labels >= 0)  # [m, k]
    agree = int(((query_labels[:, None] == neighbour_labels) & known).sum())
    key = [(AGREES, f"same class ({agree})"), (DIFFERS, f"other class ({known.sum() - agree})")]
    if not known.all():
        key.append((UNKNOWN, f"no label ({(~known).sum()})"))
    header = ["test image", "nearest train image" if k == 1 else "nearest train images"]
    return _sheet(title, key, header + [""] * (k - 1), blocks, size=neighbours.shape[-1])


def as_rgb(images: np.ndarray) -> np.ndarray:
    """Images uint8 [..., C, H, W] as RGB [..., 3, H, W], for display.

    Gray is repeated in all channels; multispectral images show their first three channels (with two
    channels, the first as gray).
    """
    channels = images.shape[-3]
    if channels >= 3:
        return images[..., :3, :, :]
    return np.repeat(images[..., :1, :, :], 3, axis=-3)


def hide(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Grey out the hidden patches of images uint8 [..., 3, H, W]; mask bool [..., N], row-major."""
    require(
        mask.dtype == bool and mask.shape[:-1] == images.shape[:-3],
        f"mask must be bool [{', '.join(map(str, images.shape[:-3]))}, N], "
        f"got {mask.dtype} {list(mask.shape)}",
    )
    height, width = images.shape[-2:]
    grid = math.isqrt(mask.shape[-1])
    require(
        grid > 0 and grid**2 == mask.shape[-1] and height % grid == 0 and width % grid == 0,
        f"mask has {mask.shape[-1]} patches, which do not form a square grid on images of "
        f"{height} x {width} pixels",
    )
    cells = mask.reshape(*mask.shape[:-1], grid, grid)
    pixels = cells.repeat(height // grid, axis=-2).repeat(width // grid, axis=-1)  # [..., H, W]
    colour = np.array(HIDDEN, np.uint8).reshape(3, 1, 1)
    return np.where(pixels[..., None, :, :], colour, images)


def rebuild(
    predicted: Tensor | np.ndarray,
    originals: np.ndarray,
    mask: np.ndarray,
    patch: int,
    normalize_pixels: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> np.ndarray:
    """MAE's predictions as images: hidden patches reconstructed, visible ones from the original.

    Args:
        predicted: float [n, N, P], the decoder's patches in the layout of `patchify`.
        originals: uint8 [n, C, H, H].
        mask: bool [n, N], True is a hidden patch.
        patch: side of a patch in pixels.
        normalize_pixels: whether predictions are normalised per patch; the mean and deviation of
            the original patch then undo it, as in the paper's pictures.
        mean, std: of each channel of the data, in 0..1.

    Returns:
        uint8 [n, C, H, H]. Raises ValueError if a shape is wrong or a prediction is not finite.
    """
    require(
        originals.dtype == np.uint8 and originals.ndim == 4 and originals.size > 0,
        f"originals must be uint8 [n, C, H, W] and not empty, got {originals.dtype} "
        f"{list(originals.shape)}",
    )
    n, channels, height, width = originals.shape
    require(height == width, f"originals must be square, got {height} x {width} pixels")
    require(patch > 0 and height % patch == 0, f"patch {patch} does not divide {height} pixels")
    patches = (height // patch) ** 2
    require(
        mask.dtype == bool and mask.shape == (n, patches),
        f"mask must be bool [{n}, {patches}], got {mask.dtype} {list(mask.shape)}",
    )
    pixels = torch.as_tensor(predicted).detach().float().cpu()  # [n, N, P]
    require(
        pixels.shape == (n, patches, channels * patch**2),
        f"predicted must be [{n}, {patches}, {channels * patch**2}], got {list(pixels.shape)}",
    )
    require(bool(pixels.isfinite().all()), "predicted holds NaN or infinity: the run diverged")
    if normalize_pixels:
        target = patchify(normalize(torch.tensor(originals), mean, std), patch)  # [n, N, P]
        # The inverse of losses.masked_pixel_error's normalisation.
        deviation = (target.var(-1, keepdim=True) + 1e-6).sqrt()
        pixels = pixels * deviation + target.mean(-1, keepdim=True)
    images = unpatchify(pixels, patch).numpy()  # [n, C, H, H]
    scale, shift = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (std, mean))
    images = ((images * scale + shift) * 255).round().clip(0, 255).astype(np.uint8)
    hidden = unpatchify(torch.tensor(mask)[:, :, None].expand_as(pixels), patch).numpy()
    return np.where(hidden, images, originals)


_GAP = 8
_FRAMED_GAP = 12
_LEAD_GAP = 20
_BLOCK_GAP = 40
_FRAME = 4
_LARGEST_CELL = 240
_SHRUNK_CELLS = (80, 96, 112, 128, 160, 192, 224)
_WIDEST = 1400


@dataclass(frozen=True)
class _Tile:
    pixels: np.ndarray
    """uint8 [3, h, w]."""
    frame: str | None = None
    caption: str = ""
    colour: str = MUTED


def _sheet(
    title: str,
    subtitle: str | Sequence[tuple[str, str]],
    header: Sequence[str],
    blocks: Sequence[Sequence[_Tile]],
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
    sheet = Image.new("RGB", (width, top + down * row_height - _LEAD_GAP + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
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
            sheet.paste(picture, (at_x, at_y))
            if tile.caption:
                text = fitted(tile.caption, cell + gap // 2, CAPTION)
                draw.text((x + cell / 2, y + cell + 21), text, tile.colour, font(CAPTION), "ms")
    return sheet


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


def _require_images(name: str, images: np.ndarray, shape: str, **sizes: int) -> None:
    letters = shape.split()
    require(
        images.dtype == np.uint8
        and images.ndim == len(letters)
        and images.shape[-3] == 3
        and images.size > 0
        and all(images.shape[letters.index(letter)] == size for letter, size in sizes.items()),
        f"{name} must be uint8 [{', '.join(str(sizes.get(x, x)) for x in letters)}] and not empty, "
        f"got {images.dtype} {list(images.shape)}",
    )
