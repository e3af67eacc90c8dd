"""The pictures of a pretraining run, for a README and for MLflow: arrays in, a PIL image out.

Sheets of images are laid out in whole pixels with Pillow, so that a pixel of a 16 x 16 digit is an
exact square; charts are drawn with matplotlib's Agg canvas. Both share one palette and one font.
Nothing here touches pyplot or matplotlib's settings.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from selfray.check import require
from selfray.models.decoder import patchify, unpatchify
from selfray.models.encoder import normalize

Points = Sequence[tuple[float, float]]
"""(images seen, value) pairs of one curve, in any order."""

Colour = str | tuple[float, float, float]

INK, MUTED, FAINT = "#1f2933", "#667080", "#e4e7eb"
AGREES, DIFFERS, UNKNOWN = "#2a9d5c", "#d64545", "#b4bac2"
PALETTE = (
    "#3b6fb6", "#e8833a", "#3f9d5c", "#d1495b", "#8661c1",
    "#2aa6b8", "#cf9a12", "#e07bb0", "#8c6248", "#2f3e57",
)  # fmt: skip
HIDDEN = (146, 153, 165)
"""The slate grey of a hidden patch: no grey that a digit or a scan could hold itself."""

WIDTH = 1200
"""What charts are wide, and sheets are near to, in pixels."""
MARGIN = 36
HEADINGS = 100
"""The room of a sheet's title, subtitle and column headers above its first tile, in pixels."""
TITLE, LABEL, CAPTION = 25, 17, 15
"""Heights of the type in pixels."""

_DPI = 100
_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
_REGULAR, _BOLD = str(_FONTS / "DejaVuSans.ttf"), str(_FONTS / "DejaVuSans-Bold.ttf")


# Sheets of images


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

    Raises ValueError where a shape or type is another.
    """
    _require_images("images", images, "n 3 H W")
    _require_images("views", views, "n V 3 h w", n=len(images))
    if mask is not None:
        views = hide(views, mask)
    share = "" if mask is None else f"; grey patches are hidden ({_percent(mask.mean())})"
    count = views.shape[1]
    return _sheet(
        f"Augmented views that {method} sees",
        f"{_plural(count, 'view')} of each image{share}",
        ["original", *(f"view {view + 1}" for view in range(count))],
        [[_Tile(image), *map(_Tile, drawn)] for image, drawn in zip(images, views, strict=True)],
        size=views.shape[-1],
    )


def reconstructions(
    originals: np.ndarray, mask: np.ndarray, rebuilt: np.ndarray, method: str = "MAE"
) -> Image.Image:
    """Each image, what the encoder sees of it, and what the decoder makes of that.

    Args:
        originals: uint8 [n, 3, H, W].
        mask: bool [n, N] in row-major patches; True is a hidden patch.
        rebuilt: uint8 [n, 3, H, W], see `rebuild`.
        method: the name for the title.

    Raises ValueError where a shape or type is another.
    """
    _require_images("originals", originals, "n 3 H W")
    _require_images("rebuilt", rebuilt, "n 3 H W", n=len(originals))
    require(
        rebuilt.shape == originals.shape,
        f"rebuilt must have the shape of originals {originals.shape}, got {rebuilt.shape}",
    )
    masked = hide(originals, mask)
    return _sheet(
        f"What {method} rebuilds",
        f"{_percent(mask.mean())} of the patches are hidden from the encoder",
        ["original", "masked", "rebuilt"],
        [[_Tile(image) for image in row] for row in zip(originals, masked, rebuilt, strict=True)],
        size=originals.shape[-1],
    )


def tokens(
    originals: np.ndarray, tokens: np.ndarray, rebuilt: np.ndarray, codes: int
) -> Image.Image:
    """Each image, its tokens as a map with a colour for each code, and the image rebuilt of them.

    Args:
        originals: uint8 [n, 3, H, W].
        tokens: int [n, N] in row-major patches, in 0..codes - 1.
        rebuilt: uint8 [n, 3, H, W].
        codes: the size of the codebook.

    Raises ValueError where a shape or type is another.
    """
    _require_images("originals", originals, "n 3 H W")
    _require_images("rebuilt", rebuilt, "n 3 H W", n=len(originals))
    grid = math.isqrt(tokens.shape[-1])
    require(
        tokens.shape == (len(originals), grid * grid),
        f"tokens must be [{len(originals)}, N] with N a square, got {list(tokens.shape)}",
    )
    # Hues a golden ratio apart: codes with near numbers look different, the same one alike.
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


def neighbours(
    queries: np.ndarray,
    neighbours: np.ndarray,
    query_labels: np.ndarray,
    neighbour_labels: np.ndarray,
    label_names: Sequence[str] | None = None,
    title: str = "Nearest neighbours in feature space",
) -> Image.Image:
    """Each test image beside its nearest train images, framed by whether their class agrees.

    Args:
        queries: uint8 [m, 3, H, W].
        neighbours: uint8 [m, k, 3, H, W], the nearest first.
        query_labels: int [m]; a negative label is unknown and its frames are grey.
        neighbour_labels: int [m, k].
        label_names: captions by label; None prints no captions.
        title: the picture's title, such as the method's name.

    Raises ValueError where a shape, a type or a label is another.
    """
    _require_images("queries", queries, "m 3 H W")
    _require_images("neighbours", neighbours, "m k 3 h w", m=len(queries))
    count, k = neighbours.shape[:2]
    _require_labels("query_labels", query_labels, (count,), label_names)
    _require_labels("neighbour_labels", neighbour_labels, (count, k), label_names)

    def caption(label: int) -> str:
        return "" if label_names is None else _name(label, label_names)

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
        f"mask has {mask.shape[-1]} patches, which are no square grid on images of "
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
    """MAE's predictions as images: hidden patches rebuilt, visible ones as they were.

    Args:
        predicted: float [n, N, P], the decoder's patches in the layout of `patchify`.
        originals: uint8 [n, 3, H, H].
        mask: bool [n, N], True is a hidden patch.
        patch: side of a patch in pixels.
        normalize_pixels: whether the predictions are of pixels normalised for each patch; its
            original's own mean and deviation then undo that (as the paper's pictures do).
        mean, std: of the data, by channel, in 0..1.

    Returns:
        uint8 [n, 3, H, H]. Raises ValueError where a shape is another or a prediction not finite.
    """
    _require_images("originals", originals, "n 3 H W")
    n, _, height, width = originals.shape
    require(height == width, f"originals must be square, got {height} x {width} pixels")
    require(patch > 0 and height % patch == 0, f"patch {patch} does not divide {height} pixels")
    patches = (height // patch) ** 2
    require(
        mask.dtype == bool and mask.shape == (n, patches),
        f"mask must be bool [{n}, {patches}], got {mask.dtype} {list(mask.shape)}",
    )
    pixels = torch.as_tensor(predicted).detach().float().cpu()  # [n, N, P]
    require(
        pixels.shape == (n, patches, 3 * patch**2),
        f"predicted must be [{n}, {patches}, {3 * patch**2}], got {list(pixels.shape)}",
    )
    require(bool(pixels.isfinite().all()), "predicted holds NaN or infinity: the run diverged")
    if normalize_pixels:
        target = patchify(normalize(torch.tensor(originals), mean, std), patch)  # [n, N, P]
        # The inverse of losses.masked_pixel_error's normalisation.
        deviation = (target.var(-1, keepdim=True) + 1e-6).sqrt()
        pixels = pixels * deviation + target.mean(-1, keepdim=True)
    images = unpatchify(pixels, patch).numpy()  # [n, 3, H, H]
    scale, shift = (np.array(values, np.float32).reshape(3, 1, 1) for values in (std, mean))
    images = ((images * scale + shift) * 255).round().clip(0, 255).astype(np.uint8)
    hidden = unpatchify(torch.tensor(mask)[:, :, None].expand_as(pixels), patch).numpy()
    return np.where(hidden, images, originals)


# Charts


def training_curves(
    losses: Mapping[str, Points],
    probes: Mapping[str, Mapping[str, Points]],
    baselines: Mapping[str, float] | None = None,
    title: str = "Pretraining",
) -> Image.Image:
    """The losses, a panel for each method since they do not compare, beside the probes, which do.

    Args:
        losses: by method, (images seen, loss).
        probes: by method and probe ("knn", "linear"), (images seen, accuracy in 0..1).
        baselines: accuracies in 0..1 by name, such as {"raw pixels, kNN": 0.35}; dashed lines.
        title: the picture's title.

    Raises ValueError where there is nothing to draw or an accuracy is outside 0..1.
    """
    return _render(_curves_figure(losses, probes, baselines or {}, title))


@dataclass(frozen=True)
class Compared:
    """A method's accuracies in 0..1 by probe ("knn", "linear"), before and after pretraining."""

    untrained: Mapping[str, float]
    pretrained: Mapping[str, float]
    judged_by: str
    """The probe that tells how good this method is; it is drawn in full colour."""


def comparison(
    methods: Mapping[str, Compared],
    baselines: Mapping[str, float] | None = None,
    title: str = "Pretrained without labels",
) -> Image.Image:
    """Methods beneath one another, a panel for each probe: from untrained to pretrained.

    Args:
        methods: by name, from the top down; all with the same probes.
        baselines: raw pixels' accuracy in 0..1 by probe, a dashed line in the probe's panel.
        title: the picture's title.

    Raises ValueError where there is nothing to draw or an accuracy is outside 0..1.
    """
    return _render(_comparison_figure(methods, baselines or {}, title))


def sweep(
    values: Mapping[str, Sequence[float]],
    metric: str,
    untrained: float | None,
    title: str,
    answer: str = "",
    is_accuracy: bool = True,
) -> Image.Image:
    """What was varied, beneath one another: a dot for each run, a bar at their mean.

    Args:
        values: accuracies in 0..1 of the runs, by what was varied, from the top down.
        metric: the probe's name.
        untrained: the untrained encoder's accuracy, a dashed line; None draws none.
        title: the picture's title.
        answer: a sentence at the foot.
        is_accuracy: False where the values are no accuracies but plain figures, such as RankMe.

    Raises ValueError where there is nothing to draw or an accuracy is outside 0..1.
    """
    return _render(_sweep_figure(values, metric, untrained, title, answer, is_accuracy))


def sweep_curves(
    curves: Mapping[tuple[str, int], Points], metric: str, title: str, is_accuracy: bool = True
) -> Image.Image:
    """The probes of all runs of a sweep against images seen, in one chart.

    Args:
        curves: (images seen, value) by what was varied and by seed; the seeds of one value share
            its colour.
        metric: the probe's name.
        title: the picture's title.
        is_accuracy: whether the values are accuracies in 0..1.

    Raises ValueError where there is nothing to draw or an accuracy is outside 0..1.
    """
    return _render(_sweep_curves_figure(curves, metric, title, is_accuracy))


def embedding_map(
    points: np.ndarray,
    labels: np.ndarray,
    label_names: Sequence[str] | None = None,
    title: str = "Features in two dimensions",
) -> Image.Image:
    """A scatter plot of points [n, 2], coloured by int labels [n]; see embedding_maps."""
    return _render(_maps_figure({"": points}, labels, label_names, title))


def embedding_maps(
    maps: Mapping[str, np.ndarray],
    labels: np.ndarray,
    label_names: Sequence[str] | None = None,
    title: str = "Features in two dimensions",
) -> Image.Image:
    """Scatter plots of the same images side by side, such as {"untrained": ..., "SimCLR": ...}.

    Args:
        maps: float [n, 2] by name, see `project_2d`.
        labels: int [n]; negative ones are grey. So are all but the 20 commonest.
        label_names: names by label for the legend; None prints the numbers.
        title: the picture's title.

    Raises ValueError where a shape, a type or a label is another.
    """
    return _render(_maps_figure(maps, labels, label_names, title))


def project_2d(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Features float [n, D] -> float32 [n, 2]: t-SNE of L2-normalised features.

    On one thread, so that a seed always gives the same map on a machine (which holds the process's
    other OpenMP and BLAS threads at one meanwhile): 600 features take about 2 s of a core. Fewer
    than 10 features are projected on their principal components; collapsed features all lie at 0.
    ValueError where features are empty or not finite.
    """
    require(
        features.ndim == 2 and features.size > 0,
        f"features must be [n, D] and not empty, got {list(features.shape)}",
    )
    require(bool(np.isfinite(features).all()), "features hold NaN or infinity: the run diverged")
    # A second to import, which nobody but this function should pay.
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        unit = features.astype(np.float64)
        unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        components = _principal_components(unit, 50)  # [n, <= 50]
        start = np.zeros((len(features), 2))
        start[:, : components.shape[1]] = components[:, :2]
        spread = start[:, 0].std()
        if len(features) < 10 or spread < 1e-6:
            return start.astype(np.float32)
        tsne = TSNE(
            perplexity=min(30.0, (len(features) - 1) / 3),
            init=start / spread * 1e-4,
            max_iter=500,
            random_state=seed,
            n_jobs=1,
        )
        return tsne.fit_transform(components).astype(np.float32)


def _principal_components(features: np.ndarray, most: int) -> np.ndarray:
    """The coordinates [n, min(n, D, most)] on the principal axes, each axis with a fixed sign."""
    left, scale, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    coordinates = (left * scale)[:, :most]
    extreme = np.abs(coordinates).argmax(axis=0)
    return coordinates * np.where(np.take_along_axis(coordinates, extreme[None], 0) < 0, -1, 1)


# How a sheet is laid out

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
    """Blocks of tiles under a title; a block is one image and what belongs to it, in a row.

    `subtitle` is a line of text, or a key of (colour, text). `header` names a block's columns; an
    empty name lends its room to the one before. `size` is the side of most tiles in pixels.
    """
    columns = len(header)
    caption = 28 if any(tile.caption for block in blocks for tile in block) else 0
    gap = _FRAMED_GAP if any(tile.frame for block in blocks for tile in block) else _GAP
    cell, across = _layout(len(blocks), columns, size, gap)
    offsets = [0] + [cell + _LEAD_GAP + i * (cell + gap) for i in range(columns - 1)]
    block_width, row_height = offsets[-1] + cell, cell + caption + _LEAD_GAP
    down = math.ceil(len(blocks) / across)
    used = across * (block_width + _BLOCK_GAP) - _BLOCK_GAP
    # A lone narrow block still has to hold the title.
    width = 2 * MARGIN + max(used, math.ceil(_font(TITLE, bold=True).getlength(title)))
    top = MARGIN + HEADINGS
    sheet = Image.new("RGB", (width, top + down * row_height - _LEAD_GAP + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, _font(TITLE, bold=True), anchor="lt")
    _draw_subtitle(draw, subtitle, MARGIN + 50)
    for index, block in enumerate(blocks):
        left = MARGIN + index % across * (block_width + _BLOCK_GAP)
        y = top + index // across * row_height
        for column, (tile, offset) in enumerate(zip(block, offsets, strict=True)):
            x = left + offset
            if index < across and header[column]:
                end = next((c for c in range(column + 1, columns) if header[c]), columns)
                room = (offsets[end] - 6 if end < columns else block_width) - offset
                text = _fitted(header[column], room, LABEL)
                draw.text((x, top - 12), text, MUTED, _font(LABEL), anchor="ls")
            picture = _enlarged(tile.pixels, cell)
            at_x, at_y = x + (cell - picture.width) // 2, y + (cell - picture.height) // 2
            # A hairline at least: a photograph with a white background needs an edge.
            edge = _FRAME if tile.frame else 1
            outline = (at_x - edge, at_y - edge, at_x + picture.width + edge - 1)
            draw.rectangle((*outline, at_y + picture.height + edge - 1), tile.frame or FAINT)
            sheet.paste(picture, (at_x, at_y))
            if tile.caption:
                text = _fitted(tile.caption, cell + gap // 2, CAPTION)
                draw.text((x + cell / 2, y + cell + 21), text, tile.colour, _font(CAPTION), "ms")
    return sheet


def _layout(blocks: int, columns: int, size: int, gap: int) -> tuple[int, int]:
    """(side of a cell, blocks across): multiples of `size`, near WIDTH, rather flat than tall."""

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
            + (2 * shape if shape > 0 else -0.4 * shape)  # taller than wide is worse than flat
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
    """An image uint8 [3, h, w], made to fit a square: nearest-neighbour up, Lanczos down."""
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    factor = side / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    resample = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    return picture.resize(size, resample)


def _draw_subtitle(
    draw: ImageDraw.ImageDraw, subtitle: str | Sequence[tuple[str, str]], baseline: int
) -> None:
    if isinstance(subtitle, str):
        draw.text((MARGIN, baseline), subtitle, MUTED, _font(LABEL), anchor="ls")
        return
    x = MARGIN
    for colour, text in subtitle:
        draw.rectangle((x, baseline - 13, x + 13, baseline), None, colour, 4)
        draw.text((x + 22, baseline), text, MUTED, _font(LABEL), anchor="ls")
        x += 22 + int(_font(LABEL).getlength(text)) + 32


@cache
def _font(pixels: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_BOLD if bold else _REGULAR, pixels)


def _fitted(text: str, width: float, pixels: int) -> str:
    """The text, cut with an ellipsis where it is longer than `width` pixels."""
    font = _font(pixels)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


# How a chart is drawn

_LOSS_HEIGHT, _ROW_GAP, _COLUMN_GAP, _TICKS = 150, 88, 80, 44
_KEY_GAP, _KEY_MARK, _KEY_STEP = 18, 22, 26
_SMOOTH_FROM = 60
_METHOD_STEP, _PANEL_GAP, _NUMBERS = 46, 28, 150
_COLOURED_LABELS = 2 * len(PALETTE)
_PROBE_NAMES = {"knn": "kNN"}


def _curves_figure(
    losses: Mapping[str, Points],
    probes: Mapping[str, Mapping[str, Points]],
    baselines: Mapping[str, float],
    title: str,
) -> Figure:
    probes = {method: kinds for method, kinds in probes.items() if kinds}
    require(bool(losses or probes), "there is nothing to draw: losses and probes are both empty")
    for method, curve in losses.items():
        _require_points(f"losses[{method!r}]", curve)
    for method, kinds in probes.items():
        for kind, curve in kinds.items():
            name = f"probes[{method!r}][{kind!r}]"
            _require_points(name, curve)
            for _, accuracy in curve:
                _require_accuracy(name, accuracy)
    for name, accuracy in baselines.items():
        _require_accuracy(f"baselines[{name!r}]", accuracy)

    methods = list(dict.fromkeys([*losses, *probes]))
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(methods)}
    # Up to three losses stand in a column left of the probes, more of them in rows beneath.
    column = 0 < len(losses) <= 3 and bool(probes)
    across = 1 if column else min(4, max(1, len(losses)))
    rows = math.ceil(len(losses) / across)
    losses_height = max(rows * (_LOSS_HEIGHT + _ROW_GAP) - _ROW_GAP, 400 if column else 0)
    losses_width = 300 if column else WIDTH - 2 * MARGIN - _TICKS
    stacked = 0 if column or not (losses and probes) else 400 + _ROW_GAP + 30
    probes_height = losses_height if column else 400 if probes else 0
    top = 112
    height = top + 64 + (losses_height if column else stacked + losses_height or probes_height)
    figure = _figure(height, title)
    panel_width = (losses_width - (across - 1) * _COLUMN_GAP) // across
    panel_height = (losses_height - (rows - 1) * _ROW_GAP) // max(1, rows)
    for index, (method, curve) in enumerate(losses.items()):
        left = MARGIN + _TICKS + index % across * (panel_width + _COLUMN_GAP)
        upper = top + stacked + index // across * (panel_height + _ROW_GAP)
        axes = _axes(figure, left, upper, panel_width, panel_height, f"{method}: loss")
        _draw_loss(axes, curve, colours[method])
        if index + across >= len(losses):
            _x_label(axes, "images seen")
    if probes:
        left = MARGIN + _TICKS + 12 + (losses_width + _COLUMN_GAP if column else 0)
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
            fontproperties=_type(CAPTION - 1), transform=axes.transAxes,
        )  # fmt: skip
    else:
        marker = "o" if len(values) == 1 else ""
        axes.plot(images_seen, values, color=colour, linewidth=2.2, marker=marker)
    axes.set_xlim(0, max(images_seen.max(), 1e-9) * 1.02)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The centred mean over `window` values, of fewer at the ends."""
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
    """The probes' panel and, right of it, its key: names at the ends of their lines."""
    key: list[_KeyLine] = []
    for method, kinds in probes.items():
        for kind, curve in kinds.items():
            last = max(curve)[1]
            face = "white" if kind == "knn" else colours[method]
            name = f"{method}, {_PROBE_NAMES.get(kind, kind)}"
            key.append(_KeyLine(last, name, colours[method], face))
    key += [_KeyLine(accuracy, name, MUTED, None) for name, accuracy in baselines.items()]
    key.sort(key=lambda line: line.value)
    names = [_fitted(line.name, 240, LABEL) for line in key]
    number_width = _font(LABEL).getlength("100.0 %") + 12
    key_width = _KEY_MARK + max(map(_font(LABEL).getlength, names)) + number_width
    key_left = WIDTH - MARGIN - key_width
    width = int(key_left - _KEY_GAP) - left

    axes = _axes(figure, left, top, width, height, "probe accuracy on test images")
    _x_label(axes, "images seen")
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

    bottom = figure.get_size_inches()[1] * _DPI - top - height
    ends = [bottom + (100 * line.value - low) / (high - low) * height for line in key]
    ends = _apart(ends, _KEY_STEP, bottom, bottom + height)
    for y, line, name in zip(ends, key, names, strict=True):
        if line.face is None:
            _mark(figure, [key_left - 4, key_left + 15], [y, y], line.colour, dashes=(4, 3))
        else:
            _dot(figure, key_left + 6, y, line.colour, line.face)
        _text(figure, key_left + _KEY_MARK, y, name, LABEL, line.colour)
        number = _percent(line.value, digits=1)
        x = WIDTH - MARGIN - _font(LABEL).getlength(number)
        _text(figure, x, y, number, LABEL, line.colour)


@dataclass(frozen=True)
class _KeyLine:
    value: float
    """The last accuracy, in 0..1."""
    name: str
    colour: str
    face: str | None
    """What fills the marker; None is a baseline, which has none."""


def _apart(
    positions: Sequence[float], distance: float, low: float = -math.inf, high: float = math.inf
) -> list[float]:
    """Ascending positions, moved as little as need be to stand `distance` apart in low..high."""
    # Groups that touch are merged and centred on the mean of where their members wanted to be.
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
                _require_accuracy(f"methods[{name!r}].{when}[{probe!r}]", accuracy)
        require(
            method.judged_by in probes,
            f"methods[{name!r}].judged_by {method.judged_by!r} is none of {', '.join(probes)}",
        )
    for probe, accuracy in baselines.items():
        _require_accuracy(f"baselines[{probe!r}]", accuracy)

    names = [_fitted(name, 220, LABEL) for name in methods]
    names_width = math.ceil(max(map(_font(LABEL).getlength, names))) + 20
    room = (WIDTH - 2 * MARGIN - names_width + _PANEL_GAP) // len(probes) - _PANEL_GAP
    width = room - _NUMBERS
    top, height = 132, len(methods) * _METHOD_STEP
    figure = _figure(top + height + 104, title)
    full = figure.get_size_inches()[1] * _DPI
    rows = [full - top - (index + 0.5) * _METHOD_STEP for index in range(len(methods))]
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(methods)}
    for shown, y, colour in zip(names, rows, colours.values(), strict=True):
        _text(figure, MARGIN, y, shown, LABEL, colour, bold=True)
    for index, probe in enumerate(probes):
        left = MARGIN + names_width + index * (room + _PANEL_GAP)
        panel_title = f"{_PROBE_NAMES.get(probe, probe)} accuracy on test images"
        axes = _axes(figure, left, top, width, height, panel_title)
        _draw_compared(axes, probe, methods, colours, baselines.get(probe))
        for (name, method), y in zip(methods.items(), rows, strict=True):
            judges = probe == method.judged_by
            ink = colours[name] if judges else MUTED
            number = _percent(method.pretrained[probe], digits=1)
            _text(figure, left + width + 14, y, number, LABEL, ink, bold=judges)
            gain = f"{100 * (method.pretrained[probe] - method.untrained[probe]):+.1f}"
            _text(figure, left + width + 94, y, gain, CAPTION, MUTED)
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
        colour = colours[name] if probe == method.judged_by else _paler(colours[name])
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
    names = [_fitted(name, 360, LABEL) for name in values]
    names_width = math.ceil(max(map(_font(LABEL).getlength, names))) + 20
    width = WIDTH - 2 * MARGIN - names_width - 90
    top, height = 132, len(values) * _METHOD_STEP
    lines = textwrap.wrap(answer, 118)
    foot = 30 + 24 * max(0, len(lines) - 1)
    figure = _figure(top + height + 74 + foot, title)
    full = figure.get_size_inches()[1] * _DPI
    axes = _axes(
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
        y = full - top - (index + 0.5) * _METHOD_STEP
        _text(figure, MARGIN, y, shown, LABEL, colour, bold=mean == best)
        axes.plot(
            [unit * v for v in runs], [index] * len(runs), linestyle="none", marker="o",
            markersize=9, color=colour, markerfacecolor="white", markeredgewidth=1.8, zorder=3,
        )  # fmt: skip
        axes.plot([unit * mean] * 2, [index - 0.32, index + 0.32], color=colour, linewidth=3)
        number = _percent(mean, digits=1) if is_accuracy else f"{mean:.3g}"
        x = MARGIN + names_width + width + 14
        _text(figure, x, y, number, LABEL, colour, bold=mean == best)
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
    _text(figure, MARGIN, foot + 28, key, CAPTION, MUTED)
    for index, line in enumerate(lines):
        shown = _fitted(line, WIDTH - 2 * MARGIN, CAPTION)
        _text(figure, MARGIN, foot - 24 * index, shown, CAPTION, INK)
    return figure


def _sweep_curves_figure(
    curves: Mapping[tuple[str, int], Points], metric: str, title: str, is_accuracy: bool
) -> Figure:
    require(len(curves) > 0, "there is no curve to draw")
    for name, curve in curves.items():
        _require_points(f"curves[{name!r}]", curve)
        for _, value in curve:
            _require_figure(f"curves[{name!r}]", value, is_accuracy)
    unit = 100 if is_accuracy else 1
    labels = list(dict.fromkeys(label for label, _ in curves))
    # Beyond the palette the key would tell two lines apart by nothing: the best keep a colour.
    ends = {name: [max(c)[1] for (n, _), c in curves.items() if n == name] for name in labels}
    best = sorted(labels, key=lambda name: -max(ends[name]))[: len(PALETTE)]
    colours = {name: PALETTE[i] for i, name in enumerate(n for n in labels if n in best)}
    keyed = [name for name in labels if name in colours]
    shown = {name: _fitted(name, 300, LABEL) for name in keyed}
    key_width = _KEY_MARK + math.ceil(max(map(_font(LABEL).getlength, shown.values()))) + 8
    top, height = 132, max(360, len(keyed) * _KEY_STEP)
    left = MARGIN + _TICKS + 12
    width = WIDTH - MARGIN - key_width - _KEY_GAP - left
    figure = _figure(top + height + 92, title)
    axes = _axes(figure, left, top, width, height, _metric_title(metric, is_accuracy))
    _x_label(axes, "images seen")
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
    full = figure.get_size_inches()[1] * _DPI
    for index, name in enumerate(keyed):
        x, y = WIDTH - MARGIN - key_width, full - top - (index + 0.5) * _KEY_STEP
        _dot(figure, x + 6, y, colours[name], colours[name])
        _text(figure, x + _KEY_MARK, y, shown[name], LABEL, colours[name])
    rest = len(labels) - len(keyed)
    key = "a line for each run, to where it ended; seeds share a colour"
    _text(figure, MARGIN, 30, key + (f"; gray: {rest} more" if rest else ""), CAPTION, MUTED)
    return figure


def _metric_title(metric: str, is_accuracy: bool) -> str:
    return f"{metric} accuracy on test images" if is_accuracy else f"{metric}, told without labels"


def _limits(drawn: Sequence[float], is_accuracy: bool) -> tuple[float, float]:
    """An axis's ends around some values; an accuracy's stay within 0 and 100 percent."""
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
        _require_accuracy(name, value)
    require(math.isfinite(value), f"{name} holds {value}")


def _comparison_key(figure: Figure, has_baselines: bool) -> None:
    """What the marks mean, in one line at the foot."""
    y = 34
    entries = [("white", "untrained encoder"), (INK, "pretrained"), (None, "raw pixels")]
    x = float(MARGIN)
    for face, text in entries[: 3 if has_baselines else 2]:
        if face is None:
            _mark(figure, [x, x + 26], [y, y], MUTED, dashes=(5, 4), linewidth=1.3)
        else:
            _dot(figure, x + 12, y, INK, face)
        _text(figure, x + 34, y, text, CAPTION, MUTED)
        x += 34 + _font(CAPTION).getlength(text) + 30
    _text(figure, x, y, "in full colour: the probe that judges the method", CAPTION, MUTED)


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
        _require_labels("labels", labels, (len(points),), label_names)

    found, counts = np.unique(labels[labels >= 0], return_counts=True)
    shown = np.sort(found[np.argsort(-counts, kind="stable")[:_COLOURED_LABELS]])
    colours = {int(label): _label_colour(i) for i, label in enumerate(shown)}
    key = [(colour, _name(label, label_names)) for label, colour in colours.items()]
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
    places = _key_places([_font(LABEL).getlength(_fitted(text, 200, LABEL)) for _, text in key])
    lines = places[-1][1] + 1
    figure = _figure(bottom + 40 + 30 * lines, title)
    colour_of = np.array([to_rgb(colours.get(int(label), UNKNOWN)) for label in labels])
    # In a fixed random order, so that no class lies on top of another.
    order = np.random.default_rng(0).permutation(len(labels))
    dots = float(np.clip(38000 / len(labels) * (side / WIDTH), 8, 70))
    for index, (name, points) in enumerate(maps.items()):
        axes = _axes(
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
    height = figure.get_size_inches()[1] * _DPI
    for (colour, text), (x, line) in zip(key, places, strict=True):
        y = height - bottom - 32 - line * 30
        _dot(figure, x, y, colour, colour)
        _text(figure, x + 16, y, _fitted(text, 200, LABEL), LABEL, INK)
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
    """The palette's colours, then the same ones half way to white."""
    colour = PALETTE[index % len(PALETTE)]
    return colour if index < len(PALETTE) else _paler(colour, 0.5)


def _paler(colour: Colour, share: float = 0.65) -> Colour:
    """A share of the way to white; opaque, so that nothing shines through it."""
    red, green, blue = (share + (1 - share) * value for value in to_rgb(colour))
    return red, green, blue


def _figure(height: int, title: str) -> Figure:
    """A white figure of WIDTH x height pixels with its title."""
    figure = Figure(figsize=(WIDTH / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    _text(figure, MARGIN, height - MARGIN - TITLE / 2, title, TITLE, INK, bold=True)
    return figure


def _axes(figure: Figure, left: int, top: int, width: int, height: int, title: str) -> Axes:
    """Axes at a place in pixels from the top left, in the house style."""
    full_width, full_height = figure.get_size_inches() * _DPI
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
        title, loc="left", pad=9, color=INK, fontproperties=_type(LABEL), parse_math=False
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


def _x_label(axes: Axes, text: str) -> None:
    axes.set_xlabel(text, color=MUTED, labelpad=6, fontproperties=_type(CAPTION))


def _text(
    figure: Figure, x: float, y: float, text: str, pixels: int, colour: str, bold: bool = False
) -> None:
    """Text that starts at x and is centred on y, in pixels from the bottom left."""
    full_width, full_height = figure.get_size_inches() * _DPI
    figure.text(
        x / full_width, y / full_height, text, color=colour, va="center_baseline",
        fontproperties=_type(pixels, bold), parse_math=False,
    )  # fmt: skip


def _dot(figure: Figure, x: float, y: float, colour: Colour, face: Colour) -> None:
    _mark(figure, [x], [y], colour, marker="o", markersize=7, markerfacecolor=face)


def _mark(figure: Figure, x: list[float], y: list[float], colour: Colour, **style: Any) -> None:
    """A line or marker at places in pixels from the bottom left."""
    full_width, full_height = figure.get_size_inches() * _DPI
    x, y = [value / full_width for value in x], [value / full_height for value in y]
    figure.add_artist(Line2D(x, y, color=colour, **style))


def _type(pixels: int, bold: bool = False) -> FontProperties:
    return FontProperties(fname=_BOLD if bold else _REGULAR, size=_points(pixels))


def _points(pixels: float) -> float:
    return pixels * 72 / _DPI


def _render(figure: Figure) -> Image.Image:
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _count(value: float) -> str:
    """A number of images as people say it: 800, 20k, 1.5M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# What is refused


def _name(label: int, label_names: Sequence[str] | None) -> str:
    if label < 0:
        return "?"
    return str(label) if label_names is None else label_names[label]


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


def _require_labels(
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


def _require_points(name: str, curve: Points) -> None:
    require(
        len(curve) > 0 and all(len(point) == 2 for point in curve),
        f"{name} must be (images seen, value) pairs, at least one",
    )


def _require_accuracy(name: str, value: float) -> None:
    require(0 <= value <= 1, f"{name} is an accuracy and must lie in [0, 1], got {value}")
