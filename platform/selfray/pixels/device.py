"""Augmentation on the device: uint8 images in its memory -> a batch's views, in torch.

The same uniform numbers give the same parameters as in augment.py. The operations are the same
too, cut to whole levels after each, but for all images of a batch at once, which keeps a GPU busy.
`recolour` applies only the operations after crop and flip, with parameters that augment.py drew.
Masks are drawn on the host: `augment` refuses views that have one.

It is meant for GPUs. On one busy CPU core, two SimCLR views of CIFAR-10 at 32 pixels: 3,300
images/s, where augment.py makes 5,900 with decoding; medians of 11 runs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from selfray.check import require
from selfray.pixels.colour import LUMA
from selfray.pixels.device_parameters import (
    BatchParameters,
    parameters_from,
    parameters_of,
    uniforms,
)
from selfray.pixels.parameters import JITTER_ORDERS, draws_of
from selfray.views import (
    RGB,
    View,
    Views,
    blur_kernel_size,
    check_channels,
)

BACKEND = f"selfray-torch-2/{torch.__version__}"
"""Recorded with a run, like augment.BACKEND."""

_BLENDS = ("brightness", "contrast", "saturation")
_CONTRAST, _SATURATION = _BLENDS.index("contrast"), _BLENDS.index("saturation")
_BLEND_ORDERS = torch.tensor(
    [[_BLENDS.index(name) for name in order if name != "hue"] for order in JITTER_ORDERS]
)
_BLENDS_BEFORE_HUE = torch.tensor([order.index("hue") for order in JITTER_ORDERS])


DrawView = Callable[[Tensor, Tensor, View], Tensor]


def draw_view(images: Tensor, uniform: Tensor, view: View) -> Tensor:
    """One view of each image: uint8 [n, C, H, W] and uniform [n, DRAWS] -> uint8 [n, C, s, s].

    Views that are flipped vertically or turned take two more columns of uniform numbers, and those
    of multispectral images one more for each channel.

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
        images: uint8 [B, C, H, W] on any device.
        keys: int64 [B] on that device, such as the images' numbers in the data set.
        draw_view: this module's function, or torch.compile of it.

    Returns:
        Each group of views as uint8 [B, V, C, size, size].
    """
    channels = images.shape[1]
    check_channels(views, channels)
    count = sum(map(len, views.values()))
    draws, more = draws_of(views, channels)
    uniform = uniforms(seed, epoch, keys, count)  # [B, all views, DRAWS]
    if more:
        further = uniforms(seed, epoch, keys, count, more, after=count * draws)
        uniform = torch.cat([uniform, further], dim=2)
    batch, first = {}, 0
    for name, group in views.items():
        size = _size_of(name, group)
        out = images.new_empty((len(images), len(group), channels, size, size))
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
        f"views.{name} has masks, which are drawn on the host: use selfray.pixels.augment for it",
    )
    return size


# Operations


def apply(images: Tensor, parameters: BatchParameters, view: View) -> Tensor:
    """The views of images uint8 [n, C, H, W]: uint8 [n, C, size, size].

    `view` says which operations can occur; the others are not computed.
    """
    assert view.size is not None
    cropped = crop_and_resize(images, parameters, view.size).round()
    if view.vertical_flip:
        cropped = _where(parameters.vertical_flip, cropped.flip(2), cropped)
    if view.rotate90:
        for turns in (1, 2, 3):
            turned = torch.rot90(cropped, turns, (2, 3))
            cropped = _where(parameters.quarter_turns == turns, turned, cropped)
    return _recoloured(cropped, parameters, view).to(torch.uint8)


@torch.no_grad()
def recolour(crops: Tensor, rows: Tensor, group: tuple[View, ...]) -> Tensor:
    """Apply the operations after crop and flips to a group of views: uint8 [B, V, C, s, s] -> same.

    rows float64 [B, V, 15] are the parameters that augment.augment_batch drew.
    """
    views = [
        _recoloured(crops[:, place].float(), parameters_of(rows[:, place]), view)
        for place, view in enumerate(group)
    ]
    return torch.stack(views, dim=1).to(torch.uint8)


def _recoloured(pixels: Tensor, parameters: BatchParameters, view: View) -> Tensor:
    """The operations after crop and flips, on whole levels: float32 [n, C, s, s] -> the same."""
    assert view.size is not None
    is_colour = pixels.shape[1] == RGB
    if view.color_jitter is not None and not is_colour:
        pixels = jitter_without_colour(pixels, parameters)
    elif view.color_jitter is not None:
        pixels = color_jitter(pixels, parameters, view.color_jitter.hue > 0)
    if view.grayscale and is_colour:
        pixels = _where(parameters.grayscale, _luma(pixels).floor(), pixels)
    if view.blur:
        blurred = gaussian_blur(pixels, blur_kernel_size(view.size), parameters.blur_sigma)
        pixels = _where(parameters.blur, blurred.round(), pixels)
    if view.solarize:
        pixels = _where(parameters.solarize, torch.minimum(pixels, 255 - pixels), pixels)
    return pixels


def crop_and_resize(images: Tensor, parameters: BatchParameters, size: int) -> Tensor:
    """Each image's box as float32 [n, C, size, size] in 0..255, mirrored where `flip` says so."""
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


_BRIGHTNESS_FIRST = torch.tensor(
    [order.index("brightness") < order.index("contrast") for order in JITTER_ORDERS]
)


def jitter_without_colour(pixels: Tensor, parameters: BatchParameters) -> Tensor:
    """Brightness and contrast of gray or multispectral float [n, C, h, w], in each image's order.

    Multispectral channels have brightness factors of their own, and contrast is about each
    channel's own mean.
    """
    gains = parameters.brightness[:, None] if parameters.gains is None else parameters.gains
    gains = gains.float()[:, :, None, None]  # [n, 1 or C, 1, 1]
    contrast = _column(parameters.contrast.float())
    first = _BRIGHTNESS_FIRST.to(pixels.device, non_blocking=True)[parameters.order]

    def brightened(pixels: Tensor) -> Tensor:
        return (pixels * gains).clamp(0, 255).floor()

    def contrasted(pixels: Tensor) -> Tensor:
        other = pixels.mean((2, 3), keepdim=True) * (1 - contrast)
        return (pixels * contrast + other).clamp(0, 255).floor()

    return _where(first, contrasted(brightened(pixels)), brightened(contrasted(pixels)))


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
    """Blur float [n, C, h, w], each image by its own sigma [n]; edges are mirrored."""
    reach = kernel_size // 2
    height, width = pixels.shape[-2:]
    offsets = torch.arange(-reach, reach + 1, device=pixels.device)
    exponent = -0.5 * (offsets / sigma.float()[:, None]).square()
    # As in colour.gaussian_blur, the kernel ends at three sigma.
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
