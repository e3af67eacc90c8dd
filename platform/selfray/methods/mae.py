"""MAE: hide three quarters of the patches, encode the rest, rebuild the hidden pixels.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv:2111.06377.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from selfray.losses import masked_pixel_error
from selfray.method import Batch, Method, MethodConfig, fitted
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.models.vit import sincos_positions
from selfray.schedules import Progress
from selfray.views import RandomMask, View, Views, require


@dataclass(frozen=True)
class MAEConfig(MethodConfig):
    judged_by: ClassVar[Literal["knn", "linear"]] = "linear"

    mask_ratio: float = 0.75
    """Share of the patches that is hidden."""
    normalize_pixels: bool = True
    """Rebuild each patch's pixels normalised by their own mean and deviation."""
    decoder_width: int = 512
    """The decoder's embedding dimension."""
    decoder_depth: int = 8
    """The decoder's number of blocks."""
    decoder_heads: int = 16
    """The decoder's number of attention heads."""
    view: View = field(default_factory=lambda: View(crop_scale=(0.2, 1.0)))
    """Crop and flip alone: MAE needs no colour augmentation."""

    def __post_init__(self) -> None:
        RandomMask(self.mask_ratio)
        require(
            self.decoder_width % self.decoder_heads == 0,
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
            "--encoder.name vit_small_patch16_224, for one",
        )
        return {"global": (fitted(self.view, encoder, mask=RandomMask(self.mask_ratio)),)}

    def build(self, encoder: Encoder) -> "MAE":
        return MAE(self, encoder)


class MAE(Method):
    def __init__(self, config: MAEConfig, encoder: Encoder) -> None:
        super().__init__()
        assert encoder.config.grid is not None
        self.config = config
        self.encoder = encoder
        self.patch = encoder.config.patch
        width = config.decoder_width
        self.decoder_embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = sincos_positions(width, encoder.config.grid)
        self.register_buffer("decoder_positions", positions, persistent=False)  # [N, width]
        self.decoder_blocks = nn.Sequential(
            *(
                Block(width, config.decoder_heads, qkv_bias=True)
                for _ in range(config.decoder_depth)
            )
        )
        self.decoder_norm = nn.LayerNorm(width)
        self.decoder_pixels = nn.Linear(width, 3 * self.patch**2)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in [self.decoder_embed, self.decoder_pixels, *self.decoder_blocks.modules()]:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        images, mask = batch["global"][:, 0], batch["global_mask"][:, 0]  # [B, 3, H, W], [B, N]
        predicted = self.reconstruct(images, mask)  # [B, N, P]
        target = patchify(images, self.patch)  # [B, N, P]
        return masked_pixel_error(predicted, target, mask, self.config.normalize_pixels), {}

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """The decoder's pixels [B, N, 3 * patch^2] for all patches, hidden ones in `mask` [B, N].

        Every image hides the same number of patches.
        """
        # A stable sort of False before True: the visible patches' indices in their order.
        order = mask.int().argsort(dim=1, stable=True)
        visible = order[:, : int((~mask[0]).sum())]  # [B, Nv]
        features = self.encoder(images, visible)
        seen = self.decoder_embed(features.patches)  # [B, Nv, W]
        tokens = self.mask_token.to(seen.dtype).repeat(*mask.shape, 1)  # [B, N, W]
        tokens = tokens.scatter(1, visible.unsqueeze(-1).expand_as(seen), seen)
        tokens = tokens + self.get_buffer("decoder_positions")
        cls = self.decoder_embed(features.cls).unsqueeze(1)  # [B, 1, W]
        tokens = self.decoder_blocks(torch.cat([cls, tokens], dim=1))
        return self.decoder_pixels(self.decoder_norm(tokens[:, 1:]))


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, 3, H, W] -> [B, N, patch * patch * 3]: patches in row-major order."""
    b, c, height, width = images.shape
    rows, columns = height // patch, width // patch
    cells = images.reshape(b, c, rows, patch, columns, patch)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(b, rows * columns, patch * patch * c)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """The inverse of patchify, for square images."""
    b, n, _ = patches.shape
    side = int(n**0.5)
    cells = patches.reshape(b, side, side, patch, patch, 3)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, side * patch, side * patch)
