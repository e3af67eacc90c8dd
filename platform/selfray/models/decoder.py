"""Patches of pixels, and the small transformer that predicts them (MAE, tokenizers)."""

import torch
from torch import Tensor, nn

from selfray.models.vit import sincos_positions


class PatchDecoder(nn.Module):
    """Transformer blocks over all patches, then a linear layer that predicts each patch's
    pixels."""

    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int,
        heads: int,
        grid: int,
        patch: int,
        channels: int = 3,
    ) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block  # seconds

        self.embed = nn.Linear(inputs, width)
        blocks = [Block(width, heads, qkv_bias=True) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, channels * patch**2)
        self.register_buffer("positions", sincos_positions(width, grid), persistent=False)  # [N, W]
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6  # as the encoder's
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, cls: Tensor | None = None) -> Tensor:
        """Pixels [B, N, C * patch^2] from embedded tokens [B, N, W] of all patches in row-major
        order and, optionally, an embedded class token [B, W]."""
        tokens = tokens + self.get_buffer("positions")
        if cls is not None:
            tokens = torch.cat([cls.unsqueeze(1), tokens], dim=1)
        tokens = self.norm(self.blocks(tokens))
        return self.pixels(tokens if cls is None else tokens[:, 1:])


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, patch * patch * C]: patches in row-major order."""
    b, c, height, width = images.shape
    rows, columns = height // patch, width // patch
    cells = images.reshape(b, c, rows, patch, columns, patch)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(b, rows * columns, patch * patch * c)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """The inverse of patchify, for square images: [B, N, patch * patch * C] -> [B, C, H, W]."""
    b, n, _ = patches.shape
    side = int(n**0.5)
    cells = patches.reshape(b, side, side, patch, patch, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, side * patch, side * patch)
