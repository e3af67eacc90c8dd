"""Figures of an encoder's features that need no labels."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfray.health import effective_rank
from selfray.pixels.augment import apply, generator
from selfray.pixels.parameters import draw
from selfray.probes.protocol import Protocol
from selfray.views import View


@dataclass(frozen=True)
class LabelFree(Protocol):
    """RankMe (Garrido et al., arXiv:2210.02885), and alignment and uniformity (Wang and Isola,
    arXiv:2005.10242), of at most `limit` images' class tokens."""

    name: ClassVar[str] = "labelfree"
    version: ClassVar[int] = 2

    limit: int = 2_000
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Area range of the crop that alignment compares with the whole central view."""

    def figures(self, features: Tensor, of_crops: Tensor | None = None) -> dict[str, float]:
        """Name -> value of all label-free figures.

        Args:
            features: class tokens of the images, float32 [n, D].
            of_crops: class tokens of their crops, float32 [n, D]; without them, alignment is left
                out.
        """
        found = {"rankme": self.rankme(features), "uniformity": self.uniformity(features)}
        if of_crops is not None:
            found["alignment"] = self.alignment(features, of_crops)
        return found

    @torch.no_grad()
    def rankme(self, features: Tensor) -> float:
        """exp of the entropy of the normalised singular values of [n, D]: 1 to min(n, D), higher is
        richer. Unreliable for methods that put most information into patches (MAE, BEiT)."""
        return float(effective_rank(features[: self.limit].float()))

    @torch.no_grad()
    def uniformity(self, features: Tensor) -> float:
        """log of the mean of exp(-2 |x - y|^2) over pairs of normalised features [n, D]: 0 at
        collapse, about -4 if they fill the sphere; lower is better."""
        unit = F.normalize(features[: self.limit].float(), dim=-1)
        return float(torch.pdist(unit).square().mul(-2).exp().mean().log())

    @torch.no_grad()
    def alignment(self, features: Tensor, of_crops: Tensor) -> float:
        """Mean of |x - y|^2 between the normalised features [n, D] of images and of their crops: 0
        to 4, lower is better."""
        unit, other = (F.normalize(f[: self.limit].float(), dim=-1) for f in (features, of_crops))
        return float((unit - other).square().sum(-1).mean())

    def crops(self, views: np.ndarray) -> np.ndarray:
        """A fixed random crop of each view, resized to its size: uint8 [n, C, H, W] -> the same."""
        size = views.shape[-1]
        view = View(size=size, crop_scale=self.crop_scale, flip=0.0)
        crops = np.empty_like(views)
        for index, image in enumerate(views):
            rng = generator(0, 0, index)
            pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
            crop = apply(pixels, draw(view, rng, size, size), size)
            crops[index] = crop.transpose(2, 0, 1)
        return crops
