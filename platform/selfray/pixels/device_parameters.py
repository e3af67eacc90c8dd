"""The parameters of views as tensors: drawn on the device, or taken from augment.py's arrays."""

from dataclasses import dataclass

import torch
from torch import Tensor

from selfray.pixels.draw import BLUR_SIGMA as BLUR_SIGMA_COLUMN
from selfray.pixels.draw import (
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAYSCALE,
    HUE,
    ORDER,
    PARAMETERS,
    QUARTER_TURNS,
    SATURATION,
    SOLARIZE,
    VERTICAL_FLIP,
)
from selfray.pixels.parameters import (
    CROP_ATTEMPTS,
    CROP_DRAWS,
    DRAWS,
    JITTER_ORDERS,
    LOG_ASPECT,
)
from selfray.views import BLUR_SIGMA, CROP_ASPECT, View


@dataclass(frozen=True)
class BatchParameters:
    """The parameters of one view of each of n images: parameters.Parameters as tensors [n]."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    """The crop box, int64, in pixels of the source image."""
    flip: Tensor
    order: Tensor
    """int64: the index in parameters.JITTER_ORDERS."""
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
    vertical_flip: Tensor
    quarter_turns: Tensor
    """int64, counter-clockwise, after the flips."""
    gains: Tensor | None = None
    """float64 [n, C]: brightness factors of a multispectral image's channels."""


def uniforms(
    seed: int, epoch: int, keys: Tensor, views: int, draws: int = DRAWS, after: int = 0
) -> Tensor:
    """Uniform numbers float64 [B, views, draws] in [0, 1), the same on every device.

    They are those of the stream that follow its first `after` numbers.

    SplitMix64, with a stream for each (seed, epoch, key). torch's own generators depend on the
    device and on the batch in which a number is drawn, so a resumed run would see other views.
    """
    device = keys.device
    # torch.full, not torch.tensor: a copy from the host would wait for the GPU's queue.
    stream = _mixed(torch.full((), seed, dtype=torch.int64, device=device))
    stream = _mixed(stream + epoch)
    stream = _mixed(stream + keys)  # [B]
    counter = torch.arange(after + 1, after + views * draws + 1, device=device)
    words = _mixed(stream[:, None] + counter * _GOLDEN)  # [B, views * draws]
    return (_shifted(words, 11).double() * 2.0**-53).unflatten(1, (views, draws))


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

    Each row gives what parameters.parameters_from gives.
    """
    top, left, crop_height, crop_width = _draw_crop(view.crop_scale, uniform, height, width)
    (flip, jitters, order, brightness, contrast, saturation, hue, gray, blurs, sigma, solarizes) = (
        uniform[:, CROP_DRAWS:DRAWS].unbind(1)
    )
    zero = torch.zeros_like(flip)
    vertical, turn, *gains = (
        uniform[:, DRAWS:].unbind(1) if uniform.shape[1] > DRAWS else (zero + 1, zero + 1)
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
        vertical < view.vertical_flip,
        torch.where(turn < view.rotate90, 1 + (3 * turn / (view.rotate90 or 1.0)).long(), 0),
        torch.stack(
            [factor(strengths.brightness if strengths else 0.0, gain) for gain in gains], dim=1
        )
        if gains
        else None,
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


def parameters_of(rows: Tensor) -> BatchParameters:
    """Parameters float64 [n, 15 or more], in draw.py's columns, as BatchParameters."""
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
        columns[VERTICAL_FLIP] > 0,
        columns[QUARTER_TURNS].long(),
        rows[:, PARAMETERS:] if rows.shape[1] > PARAMETERS else None,
    )
