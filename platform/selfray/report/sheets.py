"""Sheets of images: arrays -> a PIL image, laid out in whole pixels, so that each pixel of a 16 x
16 digit is an exact square."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from PIL import Image
from torch import Tensor

from selfray.check import require
from selfray.models.decoder import patchify, unpatchify
from selfray.models.encoder import normalize
from selfray.report.style import (
    AGREES,
    DIFFERS,
    INK,
    MUTED,
    UNKNOWN,
    label_name,
    percent,
    plural,
    require_labels,
)
from selfray.report.tiles import Tile, as_rgb, sheet

HIDDEN = (146, 153, 165)
"""The slate grey of a hidden patch: not a neutral grey, so digits and scans cannot contain it."""


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
    return sheet(
        f"Augmented views that {method} sees",
        f"{plural(count, 'view')} of each image{share}",
        ["original", *(f"view {view + 1}" for view in range(count))],
        [[Tile(image), *map(Tile, drawn)] for image, drawn in zip(images, views, strict=True)],
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
    return sheet(
        f"What {method} reconstructs",
        f"{percent(mask.mean())} of the patches are hidden from the encoder",
        ["original", "masked", "rebuilt"],
        [[Tile(image) for image in row] for row in zip(originals, masked, rebuilt, strict=True)],
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
    return sheet(
        "What the tokenizer keeps",
        f"each patch is one of {codes:,} codes, {used:,} of which occur here",
        ["original", "tokens", "rebuilt"],
        [
            [Tile(image), Tile(codes_map.transpose(2, 0, 1)), Tile(again)]
            for image, codes_map, again in zip(originals, maps, rebuilt, strict=True)
        ],
        size=originals.shape[-1],
    )


def segmentation(
    originals: np.ndarray, attention: np.ndarray, colours: np.ndarray, title: str
) -> Image.Image:
    """A row for each image: the image, the attention of the class token, the patch tokens' colours.

    Args:
        originals: uint8 [n, 3, H, W].
        attention: float [n, H, W] in 0..1.
        colours: uint8 [n, 3, H, W], principal components.

    Raises ValueError for other shapes or types.
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
    return sheet(
        title,
        "attention of the class token in the best head; patch tokens coloured by their first three "
        "principal components",
        ["original", "attention", "patches"],
        [[Tile(image) for image in row] for row in rows],
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
        block = [Tile(query, caption=caption(label), colour=INK)]
        for image, other in zip(near, near_labels, strict=True):
            known = label >= 0 and other >= 0
            frame = UNKNOWN if not known else AGREES if other == label else DIFFERS
            colour = DIFFERS if frame == DIFFERS else MUTED
            block.append(Tile(image, frame, caption(other), colour))
        blocks.append(block)
    known = (query_labels[:, None] >= 0) & (neighbour_labels >= 0)  # [m, k]
    agree = int(((query_labels[:, None] == neighbour_labels) & known).sum())
    key = [(AGREES, f"same class ({agree})"), (DIFFERS, f"other class ({known.sum() - agree})")]
    if not known.all():
        key.append((UNKNOWN, f"no label ({(~known).sum()})"))
    header = ["test image", "nearest train image" if k == 1 else "nearest train images"]
    return sheet(title, key, header + [""] * (k - 1), blocks, size=neighbours.shape[-1])


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
