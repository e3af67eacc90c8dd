"""Views, the augmented crops and masks that a method needs, declared as data.

A method's config declares views, the data path draws them (pixels/augment.py), and the batch
mirrors the declaration: `{"global": (View(...), View(...))}` becomes `batch["global"]`, uint8 [B,
V, 3, H, W], and, if the views have a mask, `batch["global_mask"]`, bool [B, V, N].
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from selfray.check import require
from selfray.config import added


def _require_probability(name: str, value: float) -> None:
    require(0.0 <= value <= 1.0, f"{name} is a probability and must lie in [0, 1], got {value}")


@dataclass(frozen=True)
class ColorJitter:
    """Random brightness, contrast, saturation (factors drawn in 1 ± strength) and hue shift.

    The four are applied in random order (SimCLR, arXiv:2002.05709, appendix A).
    """

    brightness: float = 0.8
    """The factor on all values is drawn in 1 ± this."""
    contrast: float = 0.8
    """The factor on the distance from the mean gray is drawn in 1 ± this."""
    saturation: float = 0.8
    """The factor on the distance from the gray image is drawn in 1 ± this."""
    hue: float = 0.2
    """Largest shift of the hue, as a fraction of a full turn of the colour circle; at most 0.5."""
    probability: float = 0.8
    """Probability that a view is jittered at all."""

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(value >= 0, f"color_jitter.{name} must be at least 0, got {value}")
        require(0 <= self.hue <= 0.5, f"color_jitter.hue must lie in [0, 0.5], got {self.hue}")
        _require_probability("color_jitter.probability", self.probability)


class Mask(Protocol):
    """A random pattern of hidden patches, drawn together with the views."""

    def draw(
        self, rng: np.random.Generator, grid: int, quantile: float | None = None
    ) -> np.ndarray:
        """A bool array [grid * grid] in row-major order; True is a hidden patch.

        `quantile` in [0, 1) is the view's rank within its batch, for masks whose ratios are spread
        evenly over a batch; None draws one at random.
        """
        ...


@dataclass(frozen=True)
class RandomMask:
    """Uniform random masking of a fixed share of the patches (MAE, arXiv:2111.06377)."""

    ratio: float = 0.75
    """Share of the patches that is hidden."""

    def __post_init__(self) -> None:
        require(0 < self.ratio < 1, f"mask_ratio must lie in (0, 1), got {self.ratio}")

    def visible(self, patches: int) -> int:
        """How many of the patches stay visible: the same number in every image, at least one."""
        return min(patches - 1, max(1, int(patches * (1 - self.ratio))))

    def draw(
        self, rng: np.random.Generator, grid: int, quantile: float | None = None
    ) -> np.ndarray:
        patches = grid * grid
        mask = np.ones(patches, dtype=bool)
        mask[rng.permutation(patches)[: self.visible(patches)]] = False
        return mask


@dataclass(frozen=True)
class BlockMask:
    """Block-wise masking: hides rectangles of patches until the ratio is reached (BEiT,
    arXiv:2106.08254, algorithm 1), in a share of the views (iBOT, arXiv:2111.07832)."""

    ratio: tuple[float, float] = (0.4, 0.4)
    """Smallest and largest share of a view's patches that is hidden; ratios are spread evenly
    between the two over a batch (DINOv2)."""
    share: float = 1.0
    """Share of a batch's views in which patches are hidden."""
    smallest: int = 16
    """Smallest area of a rectangle in patches; if fewer are left to hide, it overlaps hidden
    ones."""

    def __post_init__(self) -> None:
        low, high = self.ratio
        require(
            0 < low <= high < 1,
            f"mask_ratio must be shares with 0 < low <= high < 1, got {self.ratio}",
        )
        require(0 < self.share <= 1, f"masked_share must lie in (0, 1], got {self.share}")
        require(self.smallest > 0, f"smallest_block must be positive, got {self.smallest}")

    def draw(
        self, rng: np.random.Generator, grid: int, quantile: float | None = None
    ) -> np.ndarray:
        quantile = rng.random() if quantile is None else quantile
        mask = np.zeros((grid, grid), dtype=bool)
        if quantile < self.share:
            low, high = self.ratio
            ratio = low + (high - low) * quantile / self.share
            self._hide(rng, mask, min(grid * grid - 1, max(1, round(ratio * grid * grid))))
        return mask.ravel()

    def _hide(self, rng: np.random.Generator, mask: np.ndarray, wanted: int) -> None:
        grid, misses = len(mask), 0
        while (left := wanted - int(mask.sum())) > 0 and misses < BLOCK_TRIES:
            # If fewer than `smallest` patches are left to hide, rectangles of up to that size
            # mostly overlap hidden patches: hidden regions grow, and no small one appears on its
            # own.
            area = rng.uniform(*sorted((self.smallest, left)))
            aspect = math.exp(rng.uniform(-1, 1) * math.log(BLOCK_ASPECT))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            misses += 1
            if not (0 < height < grid and 0 < width < grid):
                continue
            top, start = rng.integers(grid - height + 1), rng.integers(grid - width + 1)
            block = mask[top : top + height, start : start + width]
            if 0 < block.size - int(block.sum()) <= left:
                block[:] = True
                misses = 0
        # No block fits: hide single patches at the border of hidden ones until the number is
        # exact. With exact numbers, the mean over a batch equals the mean of its parts' means.
        for _ in range(wanted - int(mask.sum())):
            rim = np.flatnonzero(_neighbours(mask) & ~mask)
            free = rim if len(rim) else np.flatnonzero(~mask)
            mask.flat[rng.choice(free)] = True


BLOCK_ASPECT = 1 / 0.3
"""Largest ratio of a rectangle's sides."""
BLOCK_TRIES = 10
"""After this many rectangles in a row that do not fit, single patches are hidden instead."""


def _neighbours(mask: np.ndarray) -> np.ndarray:
    """bool [grid, grid]: cells with a True cell above, below, left or right."""
    beside = np.zeros_like(mask)
    beside[1:] |= mask[:-1]
    beside[:-1] |= mask[1:]
    beside[:, 1:] |= mask[:, :-1]
    beside[:, :-1] |= mask[:, 1:]
    return beside


@dataclass(frozen=True)
class View:
    """One augmented crop. Defaults are an unaugmented random crop of the encoder's size."""

    size: int | None = None
    """Side of the square crop in pixels; None means the encoder's image size."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Range of the crop's area, as a fraction of the image's area; its aspect is 3/4 to 4/3."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: ColorJitter | None = None
    grayscale: float = 0.0
    """Probability of dropping the colour."""
    blur: float = 0.0
    """Probability of a Gaussian blur with sigma in [0.1, 2.0] pixels."""
    solarize: float = 0.0
    """Probability of inverting all values from 128 up."""
    mask: Mask | None = None
    grid: int | None = None
    """Patches along a side, for the mask; None means the encoder's."""
    vertical_flip: float = added(0.0)
    """Probability of a vertical flip, for images without a fixed orientation (satellite,
    microscopy)."""
    rotate90: float = added(0.0)
    """Probability of a rotation by 90, 180 or 270 degrees, equally likely; 0.75 makes all four
    orientations equally likely."""
    rand_augment: str = added("")
    """RandAugment (arXiv:1909.13719) after all else, in timm's words, such as
    rand-m9-mstd0.5-inc1; for RGB images, and for fine-tuning. Empty for none."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1,
            f"crop_scale must be two fractions with 0 < low <= high <= 1, got {self.crop_scale}",
        )
        for name in ("flip", "vertical_flip", "rotate90", "grayscale", "blur", "solarize"):
            _require_probability(name, getattr(self, name))
        require(self.size is None or self.size > 0, f"view size must be positive, got {self.size}")
        require(
            not self.rand_augment or _RAND_AUGMENT.fullmatch(self.rand_augment) is not None,
            f"rand_augment {self.rand_augment!r} is no policy: give one such as "
            "rand-m9-mstd0.5-inc1, or leave it out",
        )


_RAND_AUGMENT = re.compile(r"rand(-(m\d+|n\d+|inc[01]|(p|mstd|mmax)\d+(\.\d+)?))*")


ASYMMETRIC_JITTER = ColorJitter(0.4, 0.4, 0.2, 0.1)


def asymmetric_views(crop_scale: tuple[float, float]) -> tuple[View, View]:
    """BYOL's two views (arXiv:2006.07733, appendix B), also used by MoCo v3 and DINO: the first is
    always blurred; the second is blurred with probability 0.1 and solarized with 0.2."""
    first = View(crop_scale=crop_scale, color_jitter=ASYMMETRIC_JITTER, grayscale=0.2, blur=1.0)
    return first, replace(first, blur=0.1, solarize=0.2)


Photometric = Literal["cpu", "device"]
"""Where the operations after crop and flip are computed: in the data tasks, or on the trainer's
device."""

Views = dict[str, tuple[View, ...]]
"""Groups of views; the views of a group have one size. Such as {"global": 2 views, "local": 8}."""

MOST_CHANNELS = 16
"""Largest number of channels of an image."""
RGB = 3
"""Channels of a colour image; 1 is gray, any other number multispectral."""


def check_channels(views: Views, channels: int) -> None:
    """Raise ValueError for a colour operation of the views that images of these channels cannot
    have.

    On gray images hue, saturation and grayscale change nothing, so any recipe can be used. On
    multispectral images brightness is a gain on each channel and contrast is taken about each
    channel's mean; hue, saturation and grayscale are not defined.
    """
    for name, group in views.items():
        require(
            channels == RGB or not any(view.rand_augment for view in group),
            f"rand_augment of the {name} views is for RGB images, not for data.channels {channels}",
        )
    if channels in (1, RGB):
        return
    for name, group in views.items():
        for view in group:
            jitter = view.color_jitter
            undefined = {
                "color_jitter.saturation": jitter.saturation if jitter else 0,
                "color_jitter.hue": jitter.hue if jitter else 0,
                "grayscale": view.grayscale,
            }
            for field, value in undefined.items():
                require(
                    value == 0,
                    f"{field} {value} of the {name} views is not defined for data.channels "
                    f"{channels}: set it to 0, or give --data.channels 3 or 1",
                )


CROP_ASPECT = (3 / 4, 4 / 3)
BLUR_SIGMA = (0.1, 2.0)


def blur_kernel_size(view_size: int) -> int:
    """An odd kernel width of a tenth of the view (SimCLR), at least 3 pixels."""
    return max(3, 2 * math.floor(view_size / 20) + 1)
