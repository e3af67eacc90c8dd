"""Does a ViT find objects? The class token's attention and its patch tokens, against masks.

Attention as DINO judges it (arXiv:2104.14294, section 4.2.2): each head of the last block, cut to
the patches that hold 60 % of its mass, and the Jaccard index with the mask. Patch tokens by a
linear classifier: mIoU (DINOv2, arXiv:2304.07193, section 7.4, here on one scale).
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
"""In a mask of several classes: a pixel of none, which is not judged."""


@dataclass(frozen=True)
class Attention(Protocol):
    """The best head's Jaccard index by image, its mean over images."""

    name: ClassVar[str] = "attention"
    version: ClassVar[int] = 1

    mass: float = 0.6
    """Share of a head's attention that its patches hold."""


@dataclass(frozen=True)
class Patches(Protocol):
    """Logistic regression on patch tokens; the images are halved by their keys."""

    name: ClassVar[str] = "patches"
    version: ClassVar[int] = 1

    train_share: float = 0.5
    seed: int = 0


# Images and masks --------------------------------------------------------------------------------


def pairs_of(images: Location, masks: Location) -> list[tuple[str, str]]:
    """(image, mask) by their names without suffix, sorted; ValueError where there are none, or an
    image has no mask."""
    found = {side: _by_stem(place) for side, place in (("--data", images), ("--masks", masks))}
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


def _by_stem(place: Location) -> dict[str, str]:
    if not place.exists():
        raise FileNotFoundError(f"{place} does not exist: give a folder")
    files = [info for info in place.list() if info.base_name.lower().endswith(IMAGES)]
    return {info.base_name.rpartition(".")[0]: (place / info.base_name).uri for info in files}


def views_of(data: bytes, mask: bytes, size: int, names: tuple[str, str]) -> tuple[Any, Any]:
    """The central view uint8 [3, size, size] of an image and of its mask, int64 [size, size].

    ValueError names a file that cannot be read, or a mask that does not lie on its image.
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
        f"{names[1]} is of {labels.shape[1]} x {labels.shape[0]} pixels and its image of "
        f"{image.shape[1]} x {image.shape[0]}: give masks of their images' size",
    )
    view = evaluation_view(image, size).transpose(2, 0, 1)
    height, width = labels.shape[:2]
    # Where each pixel of the view comes from, by the same geometry: labels are never mixed.
    ruler = np.zeros((height, width, 2), np.float32)
    ruler[..., 0] = np.arange(height, dtype=np.float32)[:, None]
    ruler[..., 1] = np.arange(width, dtype=np.float32)
    source = np.rint(evaluation_view(ruler, size)).astype(int)
    rows = source[..., 0].clip(0, height - 1)
    columns = source[..., 1].clip(0, width - 1)
    return view, labels[rows, columns, 0].astype(np.int64)


def classes_of(values: Sequence[int]) -> dict[int, int]:
    """The class of each value that masks hold. With values of 0 and 255 alone, 255 is the object;
    otherwise 255 is void. ValueError where there is one class."""
    known = sorted(set(values))
    if known != [0, VOID]:
        known = [value for value in known if value != VOID]
    require(
        len(known) > 1,
        f"the masks hold one class alone ({known[0] if known else VOID}): mark an object by 255, "
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
    """(the class token's attention to the patches in the last block, float [B, heads, N]; patch
    tokens [B, N, D]) of normalised images [B, C, H, W]."""
    backbone: Any = encoder.backbone
    seen: list[Tensor] = []
    last = backbone.blocks[-1].attn
    with _unfused(last, seen):
        patches = encoder(images).patches
    prefix = int(backbone.num_prefix_tokens)
    return seen[0][:, :, 0, prefix:].float(), patches


@contextmanager
def _unfused(module: Any, seen: list[Tensor]) -> Iterator[None]:
    """The attention matrix [B, heads, T, T] goes through the dropout of timm's attention, unless a
    fused kernel computes the output alone."""
    was_fused, module.fused_attn = module.fused_attn, False
    hook = module.attn_drop.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield
    finally:
        hook.remove()
        module.fused_attn = was_fused


def of_most_mass(attention: np.ndarray, mass: float) -> np.ndarray:
    """bool [..., N]: the fewest patches that hold a share of the attention [..., N]."""
    order = np.argsort(-attention, axis=-1, kind="stable")
    sorted_ = np.take_along_axis(attention, order, -1)
    before = np.cumsum(sorted_, -1) - sorted_
    kept = before < mass * attention.sum(-1, keepdims=True)
    found = np.zeros(attention.shape, bool)
    np.put_along_axis(found, order, kept, -1)
    return found


def enlarged(patches: np.ndarray, size: int) -> np.ndarray:
    """Patches [..., N] as pixels [..., size, size], each its value."""
    grid = round(patches.shape[-1] ** 0.5)
    side = size // grid
    square = patches.reshape(*patches.shape[:-1], grid, grid)
    return square.repeat(side, -2).repeat(side, -1)


def jaccard(found: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[...]: intersection over union of bool [..., H, W] with a mask [H, W]; 1 where both are
    empty."""
    union = (found | mask).sum((-2, -1))
    return np.where(union > 0, (found & mask).sum((-2, -1)) / np.maximum(union, 1), 1.0)


# Patch tokens ------------------------------------------------------------------------------------


def patch_classes(labels: np.ndarray, patch: int, classes: int) -> np.ndarray:
    """int64 [N]: the commonest class of each patch of labels [H, W]; -1 where it has none."""
    grid = labels.shape[0] // patch
    cut = labels.reshape(grid, patch, grid, patch).transpose(0, 2, 1, 3).reshape(grid**2, -1)
    counts = np.stack([(cut == c).sum(1) for c in range(classes)], 1)
    return np.where(counts.sum(1) > 0, counts.argmax(1), -1)


def overlaps(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """float [C, 2]: pixels in the intersection and in the union of predicted and true [H, W]; those
    of no class (-1) do not count."""
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
    # A component's sign is arbitrary: its largest value in size is positive.
    components *= np.sign(components[np.abs(components).argmax(0), range(3)])
    low, high = np.quantile(components, (0.01, 0.99), axis=0)
    scaled = (components - low) / np.maximum(high - low, 1e-12)
    return (scaled.clip(0, 1) * 255).round().astype(np.uint8).reshape(*patches.shape[:2], 3)


def recoded(labels: np.ndarray, classes: Mapping[int, int]) -> np.ndarray:
    """Values of masks as classes; -1 for what is none."""
    table = np.full(MOST_CLASSES, -1, np.int64)
    for value, place in classes.items():
        table[value] = place
    return table[labels]
