"""Augmentation on the device: uint8 images in its memory -> a batch's views, in torch.

The same uniform numbers give the same parameters as in augment.py. The operations are the same
too, cut to whole levels after each, but for all images of a batch at once, which keeps a GPU busy.
`recolour` does only what follows crop and flip, with parameters that augment.py drew. Masks are
drawn on the host: `augment` refuses views that have one.

It is meant for GPUs. On one busy CPU core, two SimCLR views of CIFAR-10 at 32 pixels: 3,300
images/s, where augment.py makes 5,900 with decoding; medians of 11 runs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from selfray.check import require
from selfray.pixels.augment import CROP_ATTEMPTS, CROP_DRAWS, DRAWS, JITTER_ORDERS, LOG_ASPECT
from selfray.pixels.colour import LUMA
from selfray.pixels.draw import BLUR_SIGMA as BLUR_SIGMA_COLUMN
from selfray.pixels.draw import (
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAYSCALE,
    HUE,
    ORDER,
    SATURATION,
    SOLARIZE,
)
from selfray.views import BLUR_SIGMA, CROP_ASPECT, View, Views, blur_kernel_size

BACKEND = f"selfray-torch-2/{torch.__version__}"
"""Recorded with a run, like augment.BACKEND."""

_BLENDS = ("brightness", "contrast", "saturation")
_CONTRAST, _SATURATION = _BLENDS.index("contrast"), _BLENDS.index("saturation")
_BLEND_ORDERS = torch.tensor(
    [[_BLENDS.index(name) for name in order if name != "hue"] for order in JITTER_ORDERS]
)
_BLENDS_BEFORE_HUE = torch.tensor([order.index("hue") for order in JITTER_ORDERS])


@dataclass(frozen=True)
class BatchParameters:
    """The parameters of one view of each of n images: augment.Parameters as tensors [n]."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    """The crop box, int64, in pixels of the source image."""
    flip: Tensor
    order: Tensor
    """int64: the index in augment.JITTER_ORDERS."""
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    """Factors, float64; 1 where a view is not jittered."""
    hue: Tensor
    """Shift in full turns, float64; 0 where a view is not jittered."""
    grayscale: Tensor
    blur: Tensor
    blur_sigma: Tensor
    solarize: Tensor


DrawView = Callable[[Tensor, Tensor, View], Tensor]


def draw_view(images: Tensor, uniform: Tensor, view: View) -> Tensor:
    """One view of each image: uint8 [n, 3, H, W] and uniform [n, DRAWS] -> uint8 [n, 3, s, s].

    No branch depends on the values of a tensor, so torch.compile compiles it as one graph.
    """
    height, width = images.shape[-2:]
    return apply(images, parameters_from(view, uniform, height, width), view)


@torch.no_grad()
def augment(
    images: Tensor,
    keys: Tensor,
    views: Views,
    seed: int,
    epoch: int,
    draw_view: DrawView = draw_view,
) -> dict[str, Tensor]:
    """The views of a batch, each a pure function of (seed, epoch, the image's key).

    Args:
        images: uint8 [B, 3, H, W] on any device.
        keys: int64 [B] on that device, such as the images' numbers in the data set.
        draw_view: this module's function, or torch.compile of it.

    Returns:
        Each group of views as uint8 [B, V, 3, size, size].
    """
    count = sum(map(len, views.values()))
    uniform = uniforms(seed, epoch, keys, count)  # [B, all views, DRAWS]
    batch, first = {}, 0
    for name, group in views.items():
        size = _size_of(name, group)
        out = images.new_empty((len(images), len(group), 3, size, size))
        # Equal views are computed together: half the kernel launches for SimCLR's two views, an
        # eighth for DINO's local crops.
        for view in dict.fromkeys(group):
            places = [place for place, other in enumerate(group) if other == view]
            of_view = torch.stack([uniform[:, first + place] for place in places])
            repeated = images.expand(len(places), *images.shape).flatten(0, 1)
            drawn = draw_view(repeated, of_view.flatten(0, 1), view)
            for place, pixels in zip(places, drawn.unflatten(0, (len(places), -1)), strict=True):
                out[:, place] = pixels
        batch[name] = out
        first += len(group)
    return batch


def _size_of(name: str, group: tuple[View, ...]) -> int:
    require(len(group) > 0, f"views.{name} is empty")
    size = group[0].size
    require(size is not None, f"views.{name} has no size; fill in the encoder's image size")
    assert size is not None
    require(
        all(view.size == size for view in group),
        f"the views of views.{name} must be of one size; use another group",
    )
    require(
        all(view.mask is None for view in group),
        f"views.{name} has masks, which are drawn on the host: take selfray.pixels.augment for it",
    )
    return size


# What is drawn


def uniforms(seed: int, epoch: int, keys: Tensor, views: int) -> Tensor:
    """Uniform numbers float64 [B, views, DRAWS] in [0, 1), the same on every device.

    SplitMix64, with a stream for each (seed, epoch, key). torch's own generators depend on the
    device and on the batch in which a number is drawn, so a resumed run would see other views.
    """
    device = keys.device
    # torch.full, not torch.tensor: a copy from the host would wait for the GPU's queue.
    stream = _mixed(torch.full((), seed, dtype=torch.int64, device=device))
    stream = _mixed(stream + epoch)
    stream = _mixed(stream + keys)  # [B]
    counter = torch.arange(1, views * DRAWS + 1, device=device)
    words = _mixed(stream[:, None] + counter * _GOLDEN)  # [B, views * DRAWS]
    return (_shifted(words, 11).double() * 2.0**-53).unflatten(1, (views, DRAWS))


def _signed(word: int) -> int:
    """A uint64 as the int64 of the same bits: sums and products wrap around in the same way."""
    return word - 2**64 if word >= 2**63 else word


# Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014.
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST_FACTOR, _SECOND_FACTOR = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mixed(words: Tensor) -> Tensor:
    """SplitMix64's output function on int64 words."""
    words = (words ^ _shifted(words, 30)) * _FIRST_FACTOR
    words = (words ^ _shifted(words, 27)) * _SECOND_FACTOR
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """A right shift that fills with zeros; torch's fills with the sign."""
    return (words >> bits) & (2 ** (64 - bits) - 1)


def parameters_from(view: View, uniform: Tensor, height: int, width: int) -> BatchParameters:
    """The parameters that uniform numbers float64 [n, DRAWS] give a view, row by row.

    Each row gives what augment.parameters_from gives.
    """
    top, left, crop_height, crop_width = _draw_crop(view.crop_scale, uniform, height, width)
    (flip, jitters, order, brightness, contrast, saturation, hue, gray, blurs, sigma, solarizes) = (
        uniform[:, CROP_DRAWS:].unbind(1)
    )
    strengths = view.color_jitter
    jittered = jitters < (strengths.probability if strengths else 0.0)

    def factor(strength: float, uniform: Tensor) -> Tensor:
        low = max(0.0, 1 - strength)
        return torch.where(jittered, low + (1 + strength - low) * uniform, 1.0)

    return BatchParameters(
        top,
        left,
        crop_height,
        crop_width,
        flip < view.flip,
        (order * len(JITTER_ORDERS)).long(),
        factor(strengths.brightness if strengths else 0.0, brightness),
        factor(strengths.contrast if strengths else 0.0, contrast),
        factor(strengths.saturation if strengths else 0.0, saturation),
        torch.where(jittered, (strengths.hue if strengths else 0.0) * (2 * hue - 1), 0.0),
        gray < view.grayscale,
        blurs < view.blur,
        BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * sigma,
        solarizes < view.solarize,
    )


def _draw_crop(
    scale: tuple[float, float], uniform: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(top, left, height, width), int64 [n] each: see draw.draw_crop."""
    whole_height = min(height, round(width / CROP_ASPECT[0]))
    whole_width = min(width, round(height * CROP_ASPECT[1]))
    centre = ((height - whole_height) // 2, (width - whole_width) // 2, whole_height, whole_width)
    top, left, crop_height, crop_width = (torch.full_like(uniform[:, 0], x) for x in centre)
    if scale != (1.0, 1.0):
        attempts = uniform[:, : 2 * CROP_ATTEMPTS].unflatten(1, (CROP_ATTEMPTS, 2))
        area = height * width * (scale[0] + (scale[1] - scale[0]) * attempts[..., 0])
        aspect = (LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * attempts[..., 1]).exp()
        widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # [n, A]
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        first = fits.int().argmax(1, keepdim=True)  # the first of equals
        found = fits.any(1)
        crop_height = torch.where(found, heights.gather(1, first)[:, 0], crop_height)
        crop_width = torch.where(found, widths.gather(1, first)[:, 0], crop_width)
        corner = uniform[:, 2 * CROP_ATTEMPTS : CROP_DRAWS]  # [n, 2]
        top = torch.where(found, (corner[:, 0] * (height - crop_height + 1)).floor(), top)
        left = torch.where(found, (corner[:, 1] * (width - crop_width + 1)).floor(), left)
    return top.long(), left.long(), crop_height.long(), crop_width.long()


# How it is applied


def apply(images: Tensor, parameters: BatchParameters, view: View) -> Tensor:
    """The views of images uint8 [n, 3, H, W]: uint8 [n, 3, size, size].

    `view` says which operations can occur; the others are not computed.
    """
    assert view.size is not None
    cropped = crop_and_resize(images, parameters, view.size).round()
    return _recoloured(cropped, parameters, view).to(torch.uint8)


@torch.no_grad()
def recolour(crops: Tensor, rows: Tensor, group: tuple[View, ...]) -> Tensor:
    """Do what follows crop and flip for a group of views: uint8 [B, V, 3, s, s] -> the same shape.

    rows float64 [B, V, 13] are the parameters that augment.augment_batch drew.
    """
    views = [
        _recoloured(crops[:, place].float(), parameters_of(rows[:, place]), view)
        for place, view in enumerate(group)
    ]
    return torch.stack(views, dim=1).to(torch.uint8)


def parameters_of(rows: Tensor) -> BatchParameters:
    """Parameters float64 [n, 13], in the columns that draw.py names, as BatchParameters."""
    columns = rows.unbind(1)
    top, left, height, width = (column.long() for column in columns[:4])
    sigma = columns[BLUR_SIGMA_COLUMN]
    return BatchParameters(
        top,
        left,
        height,
        width,
        columns[FLIP] > 0,
        columns[ORDER].clamp(min=0).long(),
        columns[BRIGHTNESS],
        columns[CONTRAST],
        columns[SATURATION],
        columns[HUE],
        columns[GRAYSCALE] > 0,
        sigma > 0,
        torch.where(sigma > 0, sigma, 1.0),
        columns[SOLARIZE] > 0,
    )


def _recoloured(pixels: Tensor, parameters: BatchParameters, view: View) -> Tensor:
    """What follows crop and flip: float32 [n, 3, s, s] of whole levels -> the same."""
    assert view.size is not None
    if view.color_jitter is not None:
        pixels = color_jitter(pixels, parameters, view.color_jitter.hue > 0)
    if view.grayscale:
        pixels = _where(parameters.grayscale, _luma(pixels).floor(), pixels)
    if view.blur:
        blurred = gaussian_blur(pixels, blur_kernel_size(view.size), parameters.blur_sigma)
        pixels = _where(parameters.blur, blurred.round(), pixels)
    if view.solarize:
        pixels = _where(parameters.solarize, torch.minimum(pixels, 255 - pixels), pixels)
    return pixels


def crop_and_resize(images: Tensor, parameters: BatchParameters, size: int) -> Tensor:
    """Each image's box as float32 [n, 3, size, size] in 0..255, mirrored where `flip` says so."""
    height, width = images.shape[-2:]
    rows = _resampling(parameters.top, parameters.height, height, size)
    columns = _resampling(parameters.left, parameters.width, width, size)
    columns = torch.where(parameters.flip[:, None, None], columns.flip(1), columns)
    # Two matrix products resize boxes of different sizes in one batch, and run on tensor cores.
    resized = torch.einsum("nih,nchw,njw->ncij", rows, images.float(), columns)
    return resized.clamp(0, 255)  # cubic weights overshoot


def _resampling(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Weights float32 [n, size, source] that resize pixels [start, start + length) to `size`.

    Antialiased bicubic as in torchvision and Pillow; pixels outside the box have no weight.
    """
    step = length.float()[:, None, None] / size  # source pixels for each pixel of the view
    centre = (torch.arange(size, device=start.device)[:, None] + 0.5) * step  # [n, size, 1]
    place = torch.arange(source, device=start.device) - start[:, None, None]  # [n, 1, source]
    distance = ((place + 0.5 - centre) / step.clamp(min=1)).abs()  # [n, size, source]
    inside = (place >= 0) & (place < length[:, None, None])
    weights = torch.where(inside, _cubic(distance), 0.0)
    return weights / weights.sum(-1, keepdim=True)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5, Pillow's."""
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def color_jitter(pixels: Tensor, parameters: BatchParameters, turns_hue: bool) -> Tensor:
    """Apply each image's four operations in its own order.

    Brightness, contrast and saturation are blends. Those that precede an image's hue are done in a
    first round and the others in a second; in the other round their factor is 1, which changes
    nothing. So the hue, the most expensive of the four, is computed once for the whole batch.
    """
    device = pixels.device
    orders = _BLEND_ORDERS.to(device, non_blocking=True)[parameters.order]  # [n, 3]
    factors = torch.stack([getattr(parameters, name) for name in _BLENDS], dim=1)
    factors = factors.gather(1, orders).float()  # [n, 3], in the order of each image
    if not turns_hue:
        return _blends(pixels, factors, orders)
    before = _BLENDS_BEFORE_HUE.to(device, non_blocking=True)[parameters.order]  # [n]
    first = torch.arange(len(_BLENDS), device=device) < before[:, None]  # [n, 3]
    pixels = _blends(pixels, torch.where(first, factors, 1.0), orders)
    pixels = adjust_hue(pixels, parameters.hue.float())
    return _blends(pixels, torch.where(first, 1.0, factors), orders)


def _blends(pixels: Tensor, factors: Tensor, kinds: Tensor) -> Tensor:
    """Three blends in a row, each with its factors [n] and kinds [n] (columns of [n, 3]).

    Brightness blends with black, contrast with the view's mean luma, saturation with each pixel's
    luma.
    """
    for factor, kind in zip(factors.unbind(1), kinds.unbind(1), strict=True):
        luma = _luma(pixels).floor()  # [n, 1, h, w]
        other = luma * _column(kind == _SATURATION)
        other = other + luma.mean((2, 3), keepdim=True) * _column(kind == _CONTRAST)
        # Not lerp, with which a factor of 1 may not return the same pixel.
        blend = pixels * _column(factor) + other * _column(1 - factor)
        pixels = blend.clamp(0, 255).floor()
    return pixels


def adjust_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of float [n, 3, h, w] by fractions [n] of the circle."""
    red, green, blue = pixels.unbind(1)  # [n, h, w] each
    value, least = pixels.amax(1), pixels.amin(1)
    chroma = value - least
    divisor = torch.where(chroma > 0, chroma, 1.0)
    # In sixths of the circle. A gray pixel has no hue, but with a chroma of 0 any will do.
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    hue = hue + 6 * shift[:, None, None]
    channels = []
    for offset in (5, 3, 1):
        sector = torch.remainder(hue + offset, 6)
        channels.append(value - chroma * torch.minimum(sector, 4 - sector).clamp(0, 1))
    # Times 255.999 and cut: torchvision converts from [0, 1] to whole levels like this.
    return (torch.stack(channels, dim=1) * (255.999 / 255)).floor()


def gaussian_blur(pixels: Tensor, kernel_size: int, sigma: Tensor) -> Tensor:
    """Blur float [n, 3, h, w], each image by its own sigma [n]; edges are mirrored."""
    reach = kernel_size // 2
    height, width = pixels.shape[-2:]
    offsets = torch.arange(-reach, reach + 1, device=pixels.device)
    exponent = -0.5 * (offsets / sigma.float()[:, None]).square()
    # colour.gaussian_blur ends its kernel at three sigma, too.
    within = offsets.abs() <= (3 * sigma.float()).ceil()[:, None]
    weights = torch.where(within, exponent.exp(), 0.0)  # [n, k]
    weights = [_column(weight) for weight in (weights / weights.sum(1, keepdim=True)).unbind(1)]
    padded = F.pad(pixels, (reach,) * 4, mode="reflect")
    rows = sum(
        (weight * padded[:, :, k : k + height] for k, weight in enumerate(weights)),
        start=torch.zeros_like(padded[:, :, :height]),
    )
    return sum(
        (weight * rows[..., k : k + width] for k, weight in enumerate(weights)),
        start=torch.zeros_like(pixels),
    )


def _luma(pixels: Tensor) -> Tensor:
    """The brightness of each pixel: [n, 3, h, w] -> [n, 1, h, w]."""
    red, green, blue = pixels.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _column(values: Tensor) -> Tensor:
    """[n] -> [n, 1, 1, 1]."""
    return values[:, None, None, None]


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Images of `one` where chosen bool [n], images of `other` elsewhere."""
    return torch.where(_column(chosen), one, other)
