"""Measures how well a ViT locates objects: compares attention and patch tokens with masks.

Attention is judged as in DINO (arXiv:2104.14294, section 4.2.2): for each head of the last block,
the patches that hold 60 % of the class token's attention are compared with the mask by the Jaccard
index. Patch tokens are judged by the mIoU of a linear classifier (DINOv2, arXiv:2304.07193, section
7.4; here at a single scale).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from selfray.check import require
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.pixels.augment import evaluation_view
from selfray.pixels.codecs import BrokenImage, decode
from selfray.probes.protocol import Protocol
from selfray.storage import Location

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MOST_CLASSES = 256
VOID = 255
"""Value, in masks of several classes, of pixels that belong to no class and are not judged."""


@dataclass(frozen=True)
class Attention(Protocol):
    """The Jaccard index of each image's best head, as a mean over images."""

    name: ClassVar[str] = "attention"
    version: ClassVar[int] = 1

    mass: float = 0.6
    """Share of a head's attention that the selected patches hold."""


@dataclass(frozen=True)
class Patches(Protocol):
    """Logistic regression on patch tokens; the images' keys split them into train and test
    halves."""

    name: ClassVar[str] = "patches"
    version: ClassVar[int] = 1

    train_share: float = 0.5
    seed: int = 0


# Images and masks --------------------------------------------------------------------------------


def pairs_of(images: Location, masks: Location) -> list[tuple[str, str]]:
    """(URI of an image, URI of its mask), sorted by name. A mask has its image's name, apart from
    the suffix. ValueError if there are no images or masks, or an image has no mask."""
    sides = (("--data", images), ("--masks", masks))
    found = {side: _by_stem(side, place) for side, place in sides}
    ours, theirs = found["--data"], found["--masks"]
    require(len(ours) > 0, f"--data {images} holds no images: give a folder of image files")
    require(len(theirs) > 0, f"--masks {masks} holds no masks: give a folder of PNG files")
    lacking = sorted(set(ours) - set(theirs))
    require(
        not lacking,
        f"{len(lacking)} of {len(ours)} images have no mask in {masks}, such as "
        f"{lacking[0] if lacking else ''}: a mask has its image's name, as PNG",
    )
    return [(ours[stem], theirs[stem]) for stem in sorted(ours)]


def _by_stem(flag: str, place: Location) -> dict[str, str]:
    if not place.exists():
        raise FileNotFoundError(f"{flag} {place} does not exist: give a folder")
    files = [info for info in place.list() if info.base_name.lower().endswith(IMAGES)]
    return {info.base_name.rpartition(".")[0]: (place / info.base_name).uri for info in files}


def views_of(data: bytes, mask: bytes, size: int, names: tuple[str, str]) -> tuple[Any, Any]:
    """The central view uint8 [3, size, size] of an image and of its mask, int64 [size, size].

    ValueError names a file that cannot be read, or a mask whose size is not that of its image.
    """
    try:
        image = decode(data)
    except BrokenImage as error:
        raise ValueError(f"{names[0]}: {error}") from None
    try:
        labels = decode(mask, channels=1)
    except BrokenImage as error:
        raise ValueError(f"{names[1]}: {error}") from None
    require(
        labels.shape[:2] == image.shape[:2],
        f"{names[1]} has {labels.shape[1]} x {labels.shape[0]} pixels, but its image has "
        f"{image.shape[1]} x {image.shape[0]}: give masks of their images' size",
    )
    view = evaluation_view(image, size).transpose(2, 0, 1)
    height, width = labels.shape[:2]
    # Transform the pixels' coordinates like the image, and look labels up: they are never averaged.
    ruler = np.zeros((height, width, 2), np.float32)
    ruler[..., 0] = np.arange(height, dtype=np.float32)[:, None]
    ruler[..., 1] = np.arange(width, dtype=np.float32)
    source = np.rint(evaluation_view(ruler, size)).astype(int)
    rows = source[..., 0].clip(0, height - 1)
    columns = source[..., 1].clip(0, width - 1)
    return view, labels[rows, columns, 0].astype(np.int64)


def classes_of(values: Sequence[int]) -> dict[int, int]:
    """Value in masks -> class, from 0. If the only values are 0 and 255, 255 is the object;
    otherwise 255 means no class. ValueError if there is only one class."""
    known = sorted(set(values))
    if known != [0, VOID]:
        known = [value for value in known if value != VOID]
    require(
        len(known) > 1,
        f"the masks hold only one class ({known[0] if known else VOID}): mark an object by 255, "
        "or classes by 0, 1, 2, ...",
    )
    return {value: place for place, value in enumerate(known)}


# Attention ---------------------------------------------------------------------------------------


def require_attention(config: EncoderConfig, title: str) -> None:
    require(
        config.is_vit,
        f"{title} is a {config.name}, which has no attention of a class token and no patch tokens: "
        "--by knn, linear and finetune work for it",
    )


@torch.no_grad()
def attention(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """For normalised images [B, C, H, W]: (attention of the class token to the patches in the last
    block, float [B, heads, N]; patch tokens [B, N, D])."""
    backbone: Any = encoder.backbone
    seen: list[Tensor] = []
    last = backbone.blocks[-1].attn
    with _unfused(last, seen):
        patches = encoder(images).patches
    prefix = int(backbone.num_prefix_tokens)
    return seen[0][:, :, 0, prefix:].float(), patches


@contextmanager
def _unfused(module: Any, seen: list[Tensor]) -> Iterator[None]:
    """Inside, timm's attention computes its matrix [B, heads, T, T] without a fused kernel, and
    each forward pass appends it to `seen`, as the input of the attention's dropout."""
    was_fused, module.fused_attn = module.fused_attn, False
    hook = module.attn_drop.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield
    finally:
        hook.remove()
        module.fused_attn = was_fused


def of_most_mass(attention: np.ndarray, mass: float) -> np.ndarray:
    """bool [..., N]: the smallest set of patches that holds the share `mass` of the attention,
    float [..., N]."""
    order = np.argsort(-attention, axis=-1, kind="stable")
    sorted_ = np.take_along_axis(attention, order, -1)
    before = np.cumsum(sorted_, -1) - sorted_
    kept = before < mass * attention.sum(-1, keepdims=True)
    found = np.zeros(attention.shape, bool)
    np.put_along_axis(found, order, kept, -1)
    return found


def enlarged(patches: np.ndarray, size: int) -> np.ndarray:
    """Patch values [..., N] as pixels [..., size, size]: each pixel has its patch's value."""
    grid = round(patches.shape[-1] ** 0.5)
    side = size // grid
    square = patches.reshape(*patches.shape[:-1], grid, grid)
    return square.repeat(side, -2).repeat(side, -1)


def jaccard(found: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """float [...]: intersection over union of bool [..., H, W] with a mask, bool [H, W]; 1 if both
    are empty."""
    union = (found | mask).sum((-2, -1))
    return np.where(union > 0, (found & mask).sum((-2, -1)) / np.maximum(union, 1), 1.0)


# Patch tokens ------------------------------------------------------------------------------------


def patch_classes(labels: np.ndarray, patch: int, classes: int) -> np.ndarray:
    """int64 [N]: the most frequent class in each patch of labels, int64 [H, W]; -1 for a patch
    without any."""
    grid = labels.shape[0] // patch
    cut = labels.reshape(grid, patch, grid, patch).transpose(0, 2, 1, 3).reshape(grid**2, -1)
    counts = np.stack([(cut == c).sum(1) for c in range(classes)], 1)
    return np.where(counts.sum(1) > 0, counts.argmax(1), -1)


def overlaps(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """float [C, 2]: for each class the number of pixels in the intersection and in the union of
    predicted and true classes, int64 [H, W]; pixels without a true class (-1) do not count."""
    judged = labels >= 0
    found = []
    for c in range(classes):
        ours, theirs = (predicted == c) & judged, labels == c
        found.append(((ours & theirs).sum(), (ours | theirs).sum()))
    return np.array(found, np.float64)


def principal_colours(patches: np.ndarray) -> np.ndarray:
    """uint8 [n, N, 3]: the first three principal components of patch tokens [n, N, D] over all
    images, each stretched to 0..255 between its 1 % and 99 % quantiles."""
    flat = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
    centred = flat - flat.mean(0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    components = centred @ vectors[:, ::-1][:, :3]
    # A component's sign is arbitrary: make the value of largest magnitude positive.
    components *= np.sign(components[np.abs(components).argmax(0), range(3)])
    low, high = np.quantile(components, (0.01, 0.99), axis=0)
    scaled = (components - low) / np.maximum(high - low, 1e-12)
    return (scaled.clip(0, 1) * 255).round().astype(np.uint8).reshape(*patches.shape[:2], 3)


def recoded(labels: np.ndarray, classes: Mapping[int, int]) -> np.ndarray:
    """Masks' values, int [...], as classes, int64 [...]; -1 for values that are not a class."""
    table = np.full(MOST_CLASSES, -1, np.int64)
    for value, place in classes.items():
        table[value] = place
    return table[labels]
