"""Augmentation: (image bytes, views, seed) -> arrays.

The parameters of all views are drawn first, from the size in the image's header, so that only the
part of the image that they need is decoded; compose.py computes the views. Operations are those of
torchvision.transforms.v2.functional on uint8, in the order of SimCLR and BYOL: crop, flip, colour
jitter, grayscale, blur, solarize.
"""

import hashlib
import math
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from selfray.check import require
from selfray.pixels import compose, random
from selfray.pixels.codecs import BrokenImage, Planes, encode_jpeg, encode_png, open_image
from selfray.pixels.colour import blurred_length
from selfray.pixels.draw import PARAMETERS, extend_cover
from selfray.pixels.parameters import (
    DRAWS,
    ORDERS,
    Parameters,
    draw_rows,
    draws_of,
    gains_of,
    specs_of,
)
from selfray.pixels.rand_augment import rand_augment
from selfray.pixels.resize import padded_length
from selfray.pixels.workspace import Workspace
from selfray.views import (
    RGB,
    ColorJitter,
    Photometric,
    View,
    Views,
    blur_kernel_size,
    check_channels,
)

BACKEND = f"selfray-5/opencv-{cv2.__version__}"
"""Recorded with a run: another version, or another OpenCV's JPEG decoder, may round differently."""

BROKEN = "broken"
MASK_SUFFIX = "_mask"
PARAMETERS_SUFFIX = "_parameters"
EVALUATION_CROP = 0.875


@dataclass(frozen=True)
class Augmented:
    """A batch of views, and for each row whose image could not be read, the reason."""

    arrays: dict[str, np.ndarray]
    """`g` uint8 [B, V, C, size, size] and `g_mask` bool [B, V, N] by group; `broken` bool [B].
    With photometric "device" also `g_parameters` float64 [B, V, 15], in draw.py's columns (and C
    more for multispectral images)."""
    reasons: dict[int, str]


# Keys and generators


def image_key(data: bytes) -> int:
    """64 bits that name an image by its bytes.

    blake2b alone takes 100 us for a photograph of 100 kB, a twentieth of the time that SimCLR's
    views take. So a kernel reduces the bytes to 32 and a tail, and blake2b mixes these.
    """
    whole = len(data) // 32 * 32
    lanes = np.zeros(4, np.uint64)
    random.digest(np.frombuffer(data, np.uint64, whole // 8), lanes)
    rest = data[whole:] + len(data).to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(lanes.tobytes() + rest, digest_size=8).digest(), "little")


def generator(seed: int, epoch: int, key: int) -> np.random.Generator:
    """The generator of one image's views in one epoch; each argument lies in [0, 2**64)."""
    # Philox counts up from the lowest word, so the epoch in the highest keeps streams apart.
    words = np.array((key, seed), np.uint64)
    counter = np.array((0, 0, 0, epoch), np.uint64)
    return np.random.Generator(np.random.Philox(key=words, counter=counter))


# Views of one image


_workspace = Workspace()


def _room(size: int, length: int, channels: int) -> tuple[np.ndarray, ...]:
    """The arrays that compose.draw_views works in: lines, columns, turned, padded, blurred.

    `size` is the side of a view in pixels, and `length` the bytes of one row of all planes.
    """
    get = _workspace.get
    reach = blur_kernel_size(size) // 2
    line = blurred_length(size, reach, channels)
    return (
        get("lines", padded_length(length) * size, np.int16),
        get("columns", length * size, np.int16),
        get("turned", channels * size * size, np.uint8),
        get("padded", line + 2 * reach, np.int16),
        get("blurred", size * line, np.int16),
    )


def apply(image: np.ndarray, parameters: Parameters, size: int) -> np.ndarray:
    """The view of an image uint8 [H, W, C], which is not changed: uint8 [size, size, C]."""
    channels = image.shape[2]
    views = np.empty((1, channels, size, size), np.uint8)
    row = np.concatenate([parameters.row, np.ones(gains_of(channels))])
    draw_views(Planes.of_interleaved(image), row[None], views)
    return np.ascontiguousarray(views[0].transpose(1, 2, 0))


def draw_views(planes: Planes, rows: np.ndarray, views: np.ndarray, recolours: bool = True) -> None:
    """Fill views uint8 [V, C, size, size] of one image from its parameters float64 [V, 15].

    Crop boxes are in pixels of the upright image. Without `recolours`, only crop and flip are done.
    """
    size = views.shape[2]
    compose.draw_views(
        planes.pixels,
        planes.layout,
        planes.turns,
        planes.stored,
        rows,
        ORDERS,
        blur_kernel_size(size) // 2,
        _room(size, int(planes.layout[:, compose.STRIDE].sum()), views.shape[1]),
        views,
        recolours,
    )


def evaluation_view(image: np.ndarray, size: int) -> np.ndarray:
    """The view of an image uint8 [H, W, C] for evaluation: uint8 [size, size, C], nothing random.

    The usual protocol: resize the shorter side to size / 0.875, then cut out the central square of
    `size` (256 and 224). If the shorter side is at most `size`, nothing of it is cut off. Both
    steps are one resize of a box of the source.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    if side > size:
        side = max(1, round(side * size / int(size / EVALUATION_CROP)))
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side], size)


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 [H, W, C] to [size, size, C], as version 1 of the probes' protocols does.

    At each factor it takes the interpolation of OpenCV's that comes nearest to antialiased bicubic.
    Mean difference from torchvision on photographs: 1.0 of 255 when enlarging (cubic), 1.7 at a
    factor of 1.2 (linear), 1.5 to 2.4 from there to 4 (area).
    """
    height, width = pixels.shape[:2]
    if height == size and width == size:
        return pixels
    factor = max(height, width) / size
    if factor <= 1.15:
        interpolation = cv2.INTER_CUBIC
    elif factor <= 1.3:
        interpolation = cv2.INTER_LINEAR
    else:
        interpolation = cv2.INTER_AREA
    resized = cv2.resize(pixels, (size, size), interpolation=interpolation)
    return resized.reshape(size, size, pixels.shape[2])  # OpenCV drops a single channel


# Images and batches


def allocate(
    views: Views, images: int, photometric: Photometric = "cpu", channels: int = RGB
) -> dict[str, np.ndarray]:
    """The arrays of a batch as Augmented describes them, not yet filled."""
    require(len(views) > 0, "views are empty: name a group of them")
    check_channels(views, channels)
    arrays = {}
    for name, group in views.items():
        require(len(group) > 0, f"views.{name} is empty")
        require(
            name != BROKEN and not name.endswith((MASK_SUFFIX, PARAMETERS_SUFFIX)),
            f"a group of views cannot be called {name!r}: the batch uses that name itself",
        )
        size, grid = group[0].size, group[0].grid
        require(size is not None, f"views.{name} has no size; fill in the encoder's image size")
        assert size is not None
        require(
            all((view.size, view.grid) == (size, grid) for view in group),
            f"the views of views.{name} must be of one size and grid; use another group",
        )
        arrays[name] = _recycled((images, len(group), channels, size, size))  # [B, V, C, H, W]
        masked = sum(view.mask is not None for view in group)
        require(masked in (0, len(group)), f"either all views of views.{name} have a mask or none")
        if masked:
            require(grid is not None, f"views.{name} has masks but no grid of patches")
            assert grid is not None
            arrays[name + MASK_SUFFIX] = np.empty((images, len(group), grid**2), bool)  # [B, V, N]
        if photometric == "device":
            shape = (images, len(group), PARAMETERS + gains_of(channels))
            arrays[name + PARAMETERS_SUFFIX] = np.empty(shape)
    return arrays


class _Recent(threading.local):
    """The arrays of a thread's last batches; per thread, so that two never take the same free
    one."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []

    def is_free(self, place: int) -> bool:
        """Whether an array has no other references, such as slices or tensors of its memory."""
        return sys.getrefcount(self.arrays[place]) == _UNHELD


_recent = _Recent()
_sample = [np.empty(0)]
_UNHELD = sys.getrefcount(_sample[0])


def _recycled(shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialised uint8 array, in the memory of an earlier one that is no longer referenced.

    For a plane of 224 x 224 pixels, fresh memory costs 64 us, a page fault for each 4 kB; memory
    used before costs 3 us (measured on a virtual machine). That is a fifth of the time that
    SimCLR's views take.
    """
    arrays = _recent.arrays
    for place in range(len(arrays)):
        if arrays[place].shape == shape and _recent.is_free(place):
            return arrays[place][:]
    # Drop free arrays before allocating: never hold more than was needed at one time.
    arrays[:] = [arrays[place] for place in range(len(arrays)) if not _recent.is_free(place)]
    arrays.append(np.empty(shape, np.uint8))
    return arrays[-1][:]


def augment_image(
    data: bytes,
    views: Views,
    rng: np.random.Generator,
    quantiles: Mapping[str, np.ndarray] | None = None,
    channels: int = RGB,
) -> dict[str, np.ndarray]:
    """All views of one image: `g` uint8 [V, C, size, size] and `g_mask` bool [V, N], by group g.

    `quantiles` are the masks', float [V] by group; see Mask.draw. Raises BrokenImage.
    """
    arrays = {name: a[0] for name, a in allocate(views, 1, channels=channels).items()}
    uniform = rng.random((sum(map(len, views.values())), DRAWS))
    _, count = draws_of(views, channels)
    more = rng.random((len(uniform), count)) if count else None
    _draw_image(data, views, uniform, more, arrays)
    _draw_masks(views, rng, arrays, quantiles)
    return arrays


def augment_batch(
    images: Sequence[bytes],
    views: Views,
    seed: int,
    epoch: int,
    quantiles: Mapping[str, np.ndarray] | None = None,
    photometric: Photometric = "cpu",
    out: Mapping[str, np.ndarray] | None = None,
    channels: int = RGB,
) -> Augmented:
    """The views of a batch of images, each a pure function of (seed, epoch, the image's bytes).

    Each image is computed by itself, so the rest of the batch does not change a bit of it. Only a
    mask whose ratio is spread over the batch also depends on the image's place in it.

    Args:
        images: encoded images, B of them.
        views: groups of views with their `size` and, with a mask, their `grid` filled in.
        seed, epoch: each in [0, 2**64).
        quantiles: the rank of each mask within the batch, float [B, V] in [0, 1) by group; see
            Mask.draw.
        photometric: "device" leaves out the operations after crop and flip, and returns their
            parameters.
        out: arrays of `allocate` to fill; None to make them.
        channels: those of the views: 1 for gray, 3 for RGB, others for multispectral images.

    A broken image's row is a copy of the nearest earlier readable row, or of the next later one,
    and is marked in `broken`. Raises BrokenImage if no image can be read.

    Sets OpenCV to one thread for the whole process: the workers that call this run in parallel, and
    OpenCV's threads would contend with them.
    """
    require(len(images) > 0, "a batch of no images has no views")
    require(0 <= seed < 2**64, f"seed must lie in [0, 2**64), got {seed}")
    require(0 <= epoch < 2**64, f"epoch must lie in [0, 2**64), got {epoch}")
    cv2.setNumThreads(0)
    arrays = dict(out or allocate(views, len(images), photometric, channels))
    count = sum(map(len, views.values()))
    first, further = (count * draws for draws in draws_of(views, channels))
    keys = [image_key(data) for data in images]
    uniform = np.empty((len(images), first + further))
    random.fill_uniforms(np.array(keys, np.uint64), np.uint64(seed), np.uint64(epoch), uniform)
    has_masks = any(view.mask is not None for group in views.values() for view in group)
    broken = np.zeros(len(images), bool)
    reasons: dict[int, str] = {}
    for row, data in enumerate(images):
        try:
            rows = {name: array[row] for name, array in arrays.items()}
            drawn, more = uniform[row, :first].reshape(count, DRAWS), uniform[row, first:]
            more = more.reshape(count, -1) if further else None
            _draw_image(data, views, drawn, more, rows, photometric)
            rand_augment(rows, views, seed, epoch, keys[row])
        except BrokenImage as error:
            broken[row] = True
            reasons[row] = str(error)
            continue
        if has_masks:
            rng = generator(seed, epoch, keys[row])
            rng.random(first + further)  # as in augment_image: masks are drawn after all views
            places = quantiles and {name: values[row] for name, values in quantiles.items()}
            _draw_masks(views, rng, rows, places)
    if broken.all():
        raise BrokenImage(
            "no readable image", f"all {len(images)} of the batch; row 0: {reasons[0]}"
        )
    readable = np.flatnonzero(~broken)
    for row in reasons:
        source = readable[max(0, np.searchsorted(readable, row) - 1)]
        for array in arrays.values():
            array[row] = array[source]
    arrays[BROKEN] = broken
    return Augmented(arrays, reasons)


def _draw_image(
    data: bytes,
    views: Views,
    uniform: np.ndarray,
    more: np.ndarray | None,
    out: dict[str, np.ndarray],
    photometric: Photometric = "cpu",
) -> None:
    """Fill out's arrays with one image's views, from uniform float64 [all views, DRAWS].

    And from more float64 [all views, 2 + gains], if the views need it.

    Raises BrokenImage.
    """
    channels = next(out[name].shape[1] for name in views)
    image = open_image(data, channels=channels)
    gains = gains_of(channels)
    rows, first, cover = {}, 0, np.array((math.inf, math.inf, 0, 0, math.inf))
    for name, group in views.items():
        part = slice(first, first + len(group))
        first += len(group)
        further = None if more is None else more[part]
        size = (image.height, image.width)
        drawn = rows[name] = draw_rows(specs_of(group), uniform[part], *size, further, gains)
        extend_cover(drawn, out[name].shape[2], cover)
    *box, least = cover.tolist()
    top, left, bottom, right = map(int, box)
    planes = image.planes((top, left, bottom, right), least)
    for name, drawn in rows.items():
        draw_views(planes, drawn, out[name], photometric == "cpu")
        if photometric == "device":
            out[name + PARAMETERS_SUFFIX][:] = drawn


def _draw_masks(
    views: Views,
    rng: np.random.Generator,
    out: dict[str, np.ndarray],
    quantiles: Mapping[str, np.ndarray] | None,
) -> None:
    for name, group in views.items():
        for index, view in enumerate(group):
            if view.mask is not None:
                assert view.grid is not None
                quantile = float(quantiles[name][index]) if quantiles else None
                out[name + MASK_SUFFIX][index] = view.mask.draw(rng, view.grid, quantile)


def compile_kernels() -> None:
    """Compile every kernel that a first batch needs; later processes find them in the cache."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    view = View(
        size=32,
        crop_scale=(0.2, 1.0),
        flip=1.0,
        color_jitter=ColorJitter(probability=1.0),
        grayscale=0.5,
        blur=1.0,
        solarize=1.0,
    )
    views = {"global": (view, replace(view, vertical_flip=0.5, rotate90=0.75))}
    for data in (encode_png(noise), encode_jpeg(noise)):
        augment_batch([data] * 4, views, seed=0, epoch=0)
