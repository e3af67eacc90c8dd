"""MAE: hide three quarters of the patches, encode the rest, and reconstruct the hidden pixels.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv:2111.06377.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from selfray.check import require
from selfray.losses import masked_pixel_error
from selfray.method import Batch, Method, MethodConfig, Normalization, whole
from selfray.models import initial
from selfray.models.decoder import PatchDecoder, patchify
from selfray.models.encoder import Encoder, EncoderConfig, normalize
from selfray.schedules import Progress
from selfray.views import RandomMask, View, Views

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class MAEConfig(MethodConfig):
    judged_by: ClassVar[Literal["knn", "linear"]] = "linear"

    mask_ratio: float = 0.75
    """Share of the patches that is hidden."""
    normalize_pixels: bool = True
    """Reconstruct each patch's pixels normalised by the patch's mean and deviation."""
    decoder_width: int = 512
    """The decoder's embedding dimension."""
    decoder_depth: int = 8
    """The decoder's number of blocks."""
    decoder_heads: int = 16
    """The decoder's number of attention heads."""
    view: View = field(default_factory=lambda: View(crop_scale=(0.2, 1.0)))
    """Crop and flip only: MAE needs no colour augmentation."""

    def __post_init__(self) -> None:
        RandomMask(self.mask_ratio)
        require(
            self.decoder_heads > 0 and self.decoder_width % self.decoder_heads == 0,
            f"decoder_heads {self.decoder_heads} does not divide decoder_width "
            f"{self.decoder_width}",
        )
        require(
            self.decoder_width % 4 == 0,
            f"decoder_width must be a multiple of 4, got {self.decoder_width}",
        )

    def views(self, encoder: EncoderConfig) -> Views:
        require(
            encoder.is_vit,
            f"MAE leaves patches out, so it needs a ViT, not encoder.name {encoder.name}: give "
            "--encoder.name vit_small_patch16_224, for example",
        )
        require(
            not encoder.is_beit,
            f"the relative positions of {encoder.name} need all patches, but MAE leaves some "
            "out: give --encoder.name vit_small_patch16_224, for example",
        )
        return {"global": (whole(self.view, encoder, mask=RandomMask(self.mask_ratio)),)}

    def build(self, encoder: Encoder) -> "MAE":
        return MAE(self, encoder)


class MAE(Method):
    def __init__(self, config: MAEConfig, encoder: Encoder) -> None:
        super().__init__()
        assert encoder.config.grid is not None
        self.config = config
        self.encoder = encoder
        initial.as_mae(encoder.backbone)
        self.patch = encoder.config.patch
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_width))
        self.decoder = PatchDecoder(
            encoder.width,
            config.decoder_width,
            config.decoder_depth,
            config.decoder_heads,
            encoder.config.grid,
            self.patch,
            encoder.config.in_channels,
        )
        nn.init.normal_(self.mask_token, std=0.02)

    def is_decayed(self, name: str, parameter: Tensor) -> bool:
        """All but biases and norms, as in the authors' code. Class and mask token are decayed."""
        return parameter.ndim > 1

    def forward(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        images, mask = batch["global"][:, 0], batch["global_mask"][:, 0]  # [B, 3, H, W], [B, N]
        predicted = self.reconstruct(images, mask)  # [B, N, P]
        target = patchify(images, self.patch)  # [B, N, P]
        return masked_pixel_error(predicted, target, mask, self.config.normalize_pixels), {}

    def pictures(
        self, images: np.ndarray, views: Views, normalization: Normalization
    ) -> Mapping[str, "Image"]:
        """A sheet of test images: originals, masked inputs and reconstructions."""
        from selfray.report.sheets import rebuild, reconstructions

        (view,) = views["global"]
        assert view.mask is not None
        assert view.grid is not None
        rng = np.random.default_rng(0)
        mask = np.stack([view.mask.draw(rng, view.grid) for _ in images])  # [n, N]
        with torch.no_grad():
            normalized = normalize(torch.from_numpy(images), *normalization)
            predicted = self.reconstruct(normalized, torch.from_numpy(mask))  # [n, N, P]
        settings = (self.patch, self.config.normalize_pixels, *normalization)
        rebuilt = rebuild(predicted, images, mask, *settings)
        return {"reconstructions": reconstructions(images, mask, rebuilt)}

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predict the pixels of all patches.

        Args:
            images: float [B, C, H, W], normalised.
            mask: bool [B, N], True for hidden patches; `mask_ratio` sets their number, the same in
                every image.

        Returns:
            Pixels [B, N, C * patch^2].
        """
        # A stable sort puts False before True: the visible patches' indices in their order.
        order = mask.int().argsort(dim=1, stable=True)
        hides = RandomMask(self.config.mask_ratio)
        visible = order[:, : hides.visible(mask.shape[1])]  # [B, Nv]
        features = self.encoder(images, visible)
        seen = self.decoder.embed(features.patches)  # [B, Nv, W]
        tokens = self.mask_token.to(seen.dtype).repeat(*mask.shape, 1)  # [B, N, W]
        tokens = tokens.scatter(1, visible.unsqueeze(-1).expand_as(seen), seen)
        return self.decoder(tokens, self.decoder.embed(features.cls))
