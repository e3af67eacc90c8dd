"""Augmentation: (image bytes, views, seed) -> arrays.

`draw` chooses the parameters of a view, `apply` computes it; the two are apart so that another
backend can apply the very same parameters. The operations are those of
torchvision.transforms.v2.functional on uint8, in the order of SimCLR and BYOL: crop, flip, colour
jitter, grayscale, blur, solarize.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import cv2
import numpy as np

from selfray.images import BrokenImage, decode
from selfray.views import BLUR_SIGMA, CROP_ASPECT, View, Views, blur_kernel_size, require

BACKEND = f"selfray-cv2/{cv2.__version__}"
"""Tags a run: another backend, or another OpenCV, may round pixels differently."""

BROKEN = "broken"
MASK_SUFFIX = "_mask"
CROP_ATTEMPTS = 10
EVALUATION_CROP = 0.875

JITTER_ORDERS = tuple(permutations(("brightness", "contrast", "saturation", "hue")))
LOG_ASPECT = (math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1]))
# A view takes the same number of draws whatever comes of them: crop attempts, the crop's corner,
# flip, jitter (whether, order, four strengths), grayscale, blur (whether, sigma), solarize.
CROP_DRAWS = 2 * CROP_ATTEMPTS + 2
DRAWS = CROP_DRAWS + 11
# ITU-R 601, with the digits that torchvision has.
LUMA = (0.2989, 0.587, 0.114)
_LUMA_ROW = np.array(LUMA, np.float32)
# Where cv2.split beats NumPy's strided copy: 7 against 42 us at 224 px, 3.3 against 1.9 at 32.
_SPLIT_FROM_SIZE = 64


@dataclass(frozen=True, slots=True)
class Jitter:
    """Colour jitter: the order of the four operations, their factors, and the shift of the hue."""

    order: tuple[str, ...]
    brightness: float
    contrast: float
    saturation: float
    hue: float
    """In full turns, within [-0.5, 0.5]."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What was drawn for one view; the crop box is in pixels of the source image."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False
    jitter: Jitter | None = None
    grayscale: bool = False
    blur_sigma: float | None = None
    solarize: bool = False


@dataclass(frozen=True)
class Augmented:
    """A batch of views: arrays by name, and why an image could not be read, by its row."""

    arrays: dict[str, np.ndarray]
    """`g` uint8 [B, V, 3, size, size] and `g_mask` bool [B, V, N] by group; `broken` bool [B]."""
    reasons: dict[int, str]


# What is drawn


def image_key(data: bytes) -> int:
    """64 bits that name an image by its bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def generator(seed: int, epoch: int, key: int) -> np.random.Generator:
    """The generator of one image's views in one epoch; each argument lies in [0, 2**64)."""
    # Philox counts up from the lowest word: the epoch in the highest word keeps streams apart.
    words = np.array((key, seed), np.uint64)
    counter = np.array((0, 0, 0, epoch), np.uint64)
    return np.random.Generator(np.random.Philox(key=words, counter=counter))


def draw(view: View, rng: np.random.Generator, height: int, width: int) -> Parameters:
    """One view's parameters for an image of this height and width. Always DRAWS numbers of rng."""
    return parameters_from(view, rng.random(DRAWS).tolist(), height, width)


def parameters_from(view: View, uniform: list[float], height: int, width: int) -> Parameters:
    """What DRAWS uniform numbers in [0, 1) mean for a view: the distribution of all parameters."""
    top, left, crop_height, crop_width = _draw_crop(view.crop_scale, uniform, height, width)
    (flip, jitters, order, brightness, contrast, saturation, hue, gray, blurs, sigma, solarizes) = (
        uniform[CROP_DRAWS:]
    )
    jitter = None
    strengths = view.color_jitter
    if strengths is not None and jitters < strengths.probability:
        jitter = Jitter(
            JITTER_ORDERS[int(order * len(JITTER_ORDERS))],
            _factor(strengths.brightness, brightness),
            _factor(strengths.contrast, contrast),
            _factor(strengths.saturation, saturation),
            strengths.hue * (2 * hue - 1),
        )
    return Parameters(
        top,
        left,
        crop_height,
        crop_width,
        flip < view.flip,
        jitter,
        gray < view.grayscale,
        BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * sigma if blurs < view.blur else None,
        solarizes < view.solarize,
    )


def _factor(strength: float, uniform: float) -> float:
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * uniform


def _draw_crop(
    scale: tuple[float, float], uniform: list[float], height: int, width: int
) -> tuple[int, int, int, int]:
    """(top, left, height, width) as in RandomResizedCrop: uniform in area, log-uniform in aspect.

    A scale of (1, 1) is no random crop: the whole image, or its centre where it is longer than
    4:3. That is also where the attempts end if none of them fits into the image.
    """
    if scale != (1.0, 1.0):
        log_low, log_range = LOG_ASPECT[0], LOG_ASPECT[1] - LOG_ASPECT[0]
        for attempt in range(0, 2 * CROP_ATTEMPTS, 2):
            area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[attempt])
            aspect = math.exp(log_low + log_range * uniform[attempt + 1])
            crop_width = round(math.sqrt(area * aspect))
            crop_height = round(math.sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(uniform[2 * CROP_ATTEMPTS] * (height - crop_height + 1))
                left = int(uniform[2 * CROP_ATTEMPTS + 1] * (width - crop_width + 1))
                return top, left, crop_height, crop_width
    crop_height = min(height, round(width / CROP_ASPECT[0]))
    crop_width = min(width, round(height * CROP_ASPECT[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


# How it is applied


def apply(image: np.ndarray, parameters: Parameters, size: int) -> np.ndarray:
    """The view of an image uint8 [H, W, 3] RGB: uint8 [size, size, 3]; leaves the image alone."""
    top, left = parameters.top, parameters.left
    crop = image[top : top + parameters.height, left : left + parameters.width]
    pixels = resize(crop, size)
    if parameters.flip:
        pixels = cv2.flip(pixels, 1)
    jitter = parameters.jitter
    if jitter is not None:
        for operation in jitter.order:
            if operation == "brightness":
                pixels = adjust_brightness(pixels, jitter.brightness)
            elif operation == "contrast":
                pixels = adjust_contrast(pixels, jitter.contrast)
            elif operation == "saturation":
                pixels = adjust_saturation(pixels, jitter.saturation)
            else:
                pixels = adjust_hue(pixels, jitter.hue)
    if parameters.grayscale:
        pixels = to_grayscale(pixels)
    if parameters.blur_sigma is not None:
        pixels = gaussian_blur(pixels, blur_kernel_size(size), parameters.blur_sigma)
    if parameters.solarize:
        pixels = solarize(pixels)
    return pixels


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize to uint8 [size, size, 3], close to antialiased bicubic, the papers' interpolation.

    OpenCV has none that is antialiased, so the nearest to it at each factor stands in. Measured on
    photographs, mean difference from torchvision: 1.0 of 255 when enlarging (cubic), 1.7 at a
    factor of 1.2 (linear), 1.5 to 2.4 from there to 4 (area).
    """
    height, width = pixels.shape[:2]
    if height == size and width == size:
        return pixels
    factor = max(height, width) / size
    if factor <= 1.15:
        interpolation = cv2.INTER_CUBIC
    elif factor <= 1.3:
        interpolation = cv2.INTER_LINEAR  # as near as area there, at a fifth of the time
    else:
        interpolation = cv2.INTER_AREA
    return cv2.resize(pixels, (size, size), interpolation=interpolation)


# torchvision truncates to integers where OpenCV rounds: hence the halves below.


def adjust_brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    if factor == 1:
        return pixels
    # Not quite a half: OpenCV rounds halves to even, and whole products must stay as they are.
    return cv2.convertScaleAbs(pixels, alpha=factor, beta=-0.499)


def adjust_contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean luma of the view."""
    if factor == 1:
        return pixels
    red, green, blue, _ = cv2.mean(pixels)
    mean = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue - 0.5
    return cv2.addWeighted(pixels, factor, pixels, 0.0, (1 - factor) * mean - 0.499)


def adjust_saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with each pixel's luma."""
    if factor == 1:
        return pixels
    matrix = np.empty((3, 4), np.float32)
    matrix[:, :3] = (1 - factor) * _LUMA_ROW
    matrix[0, 0] += factor
    matrix[1, 1] += factor
    matrix[2, 2] += factor
    matrix[:, 3] = (1 - factor) * -0.5 - 0.499
    return cv2.transform(pixels, matrix)


def adjust_hue(pixels: np.ndarray, shift: float) -> np.ndarray:
    """Turn the hue by a fraction of the circle."""
    if shift == 0:
        return pixels
    # In float32: 8-bit HSV takes the same time and is off by up to 11 levels.
    hsv = cv2.cvtColor(pixels.astype(np.float32), cv2.COLOR_RGB2HSV)
    hue = hsv[:, :, 0]
    hue += shift % 1 * 360  # OpenCV wraps hues above 360, but not below 0.
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def to_grayscale(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(pixels: np.ndarray, kernel_size: int, sigma: float) -> np.ndarray:
    # Beyond three sigma a kernel moves no pixel by a whole level, and costs as much as within.
    width = min(kernel_size, 2 * math.ceil(3 * sigma) + 1)
    kernel = cv2.getGaussianKernel(width, sigma, cv2.CV_32F)
    # cv2.GaussianBlur's own 8-bit path takes twice the time of this.
    return cv2.sepFilter2D(pixels, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


def solarize(pixels: np.ndarray) -> np.ndarray:
    """Invert the values from 128 up."""
    return cv2.min(pixels, cv2.bitwise_not(pixels))


def evaluation_view(image: np.ndarray, size: int) -> np.ndarray:
    """The view of an image [H, W, 3] that evaluation sees: uint8 [size, size, 3], nothing random.

    The usual protocol: the shorter side is resized to size / 0.875 and the central square of
    `size` is cut out (256 and 224). An image whose shorter side is at most `size` has nothing to
    spare and keeps it whole. One resize of the box in the source does both steps.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    if side > size:
        side = max(1, round(side * size / int(size / EVALUATION_CROP)))
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side], size)


# Images and batches


def allocate(views: Views, images: int) -> dict[str, np.ndarray]:
    """The arrays of a batch, not yet filled: `g` and, where the group has masks, `g_mask`."""
    arrays = {}
    for name, group in views.items():
        require(len(group) > 0, f"views.{name} is empty")
        require(
            name != BROKEN and not name.endswith(MASK_SUFFIX),
            f"a group of views cannot be called {name!r}; the batch needs that name itself",
        )
        size, grid = group[0].size, group[0].grid
        require(size is not None, f"views.{name} has no size; fill in the encoder's image size")
        assert size is not None
        require(
            all((view.size, view.grid) == (size, grid) for view in group),
            f"the views of views.{name} must be of one size and grid; use another group",
        )
        arrays[name] = np.empty((images, len(group), 3, size, size), np.uint8)  # [B, V, 3, H, W]
        masked = sum(view.mask is not None for view in group)
        require(masked in (0, len(group)), f"either all views of views.{name} have a mask or none")
        if masked:
            require(grid is not None, f"views.{name} has masks but no grid of patches")
            assert grid is not None
            arrays[name + MASK_SUFFIX] = np.empty((images, len(group), grid**2), bool)  # [B, V, N]
    return arrays


def augment_image(
    data: bytes,
    views: Views,
    rng: np.random.Generator,
    out: dict[str, np.ndarray] | None = None,
    quantiles: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """All views of one image: `g` uint8 [V, 3, size, size], `g_mask` bool [V, N].

    Writes into the arrays of `out` (same names and shapes) if given. `quantiles` are those of the
    masks, by group, float [V]; see Mask.draw. Raises BrokenImage. Runs on
    as many threads as OpenCV is set to use; see augment_batch.
    """
    image = decode(data)
    height, width = image.shape[:2]
    if out is None:
        out = {name: array[0] for name, array in allocate(views, 1).items()}
    for name, group in views.items():
        pixels = out[name]
        for index, view in enumerate(group):
            assert view.size is not None
            parameters = draw(view, rng, height, width)
            _write_channels_first(apply(image, parameters, view.size), pixels[index])
            if view.mask is not None:
                assert view.grid is not None
                quantile = float(quantiles[name][index]) if quantiles else None
                out[name + MASK_SUFFIX][index] = view.mask.draw(rng, view.grid, quantile)
    return out


def augment_batch(
    images: Sequence[bytes],
    views: Views,
    seed: int,
    epoch: int,
    quantiles: Mapping[str, np.ndarray] | None = None,
) -> Augmented:
    """The views of a batch of images, each a pure function of (seed, epoch, the image's bytes).

    A mask whose ratio is spread over the batch is one of its place there, too: `quantiles`, by
    group, float [B, V].

    A row whose image is broken is a copy of the nearest earlier readable row, else of the next
    later one, and is marked in `broken`. Raises BrokenImage if no image can be read. Views must
    have their `size` and, with a mask, their `grid` filled in.

    Sets OpenCV to one thread, for the whole process: parallelism is in the workers that call this,
    and OpenCV's own threads would only contend with them.
    """
    require(len(images) > 0, "a batch of no images has no views")
    require(0 <= seed < 2**64, f"seed must lie in [0, 2**64), got {seed}")
    require(0 <= epoch < 2**64, f"epoch must lie in [0, 2**64), got {epoch}")
    cv2.setNumThreads(0)
    arrays = allocate(views, len(images))
    broken = np.zeros(len(images), bool)
    reasons: dict[int, str] = {}
    for row, data in enumerate(images):
        rng = generator(seed, epoch, image_key(data))
        try:
            rows = {name: array[row] for name, array in arrays.items()}
            places = quantiles and {name: values[row] for name, values in quantiles.items()}
            augment_image(data, views, rng, rows, places)
        except BrokenImage as error:
            broken[row] = True
            reasons[row] = str(error)
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


def _write_channels_first(pixels: np.ndarray, out: np.ndarray) -> None:
    """Copy [size, size, 3] into [3, size, size], C-contiguous."""
    if len(pixels) >= _SPLIT_FROM_SIZE:
        cv2.split(pixels, (out[0], out[1], out[2]))
    else:
        np.copyto(out, pixels.transpose(2, 0, 1))
