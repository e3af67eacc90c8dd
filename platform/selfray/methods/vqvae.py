"""VQ-VAE: train a tokenizer to reconstruct images from one discrete code per patch.

van den Oord et al., "Neural Discrete Representation Learning", arXiv:1711.00937. Encoder and
decoder are ViTs as in BEiT v2's tokenizer (Peng et al., arXiv:2208.06366), but the targets are
pixels, not a teacher's features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfray.check import require
from selfray.method import Batch, Method, Normalization, whole
from selfray.models.decoder import PatchDecoder, patchify
from selfray.models.encoder import Encoder, EncoderConfig, normalize
from selfray.models.quantizer import Quantizer
from selfray.schedules import Progress
from selfray.tokenizer import TokenizerConfig
from selfray.views import View, Views

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class VQVAEConfig(TokenizerConfig):
    judged_by: ClassVar[Literal["knn", "linear"]] = "linear"

    code_momentum: float = 0.99
    """Momentum of the codes: the share of each code that is kept in each step."""
    commitment: float = 0.25
    """Weight of the distance between the features and their codes."""
    decoder_width: int = 512
    """The decoder's embedding dimension."""
    decoder_depth: int = 4
    """The decoder's number of blocks."""
    decoder_heads: int = 8
    """The decoder's number of attention heads."""
    view: View = field(default_factory=lambda: View(crop_scale=(0.2, 1.0)))
    """Crop and flip only: the tokens must encode the colours too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.code_momentum < 1,
            f"code_momentum must lie in [0, 1), got {self.code_momentum}",
        )
        require(self.commitment >= 0, f"commitment must be at least 0, got {self.commitment}")
        require(
            self.decoder_heads > 0
            and self.decoder_width % self.decoder_heads == 0
            and self.decoder_width % 4 == 0,
            f"decoder_width {self.decoder_width} must be a multiple of 4 and of decoder_heads "
            f"{self.decoder_heads}",
        )

    def views(self, encoder: EncoderConfig) -> Views:
        require(
            encoder.is_vit,
            f"a tokenizer has a token for each patch, so it needs a ViT, not encoder.name "
            f"{encoder.name}: give --encoder.name vit_small_patch16_224, for example",
        )
        return {"global": (whole(self.view, encoder),)}

    def build(self, encoder: Encoder) -> "VQVAE":
        return VQVAE(self, encoder)


class VQVAE(Method):
    def __init__(self, config: VQVAEConfig, encoder: Encoder) -> None:
        super().__init__()
        assert encoder.config.grid is not None
        self.config = config
        self.encoder = encoder
        self.patch = encoder.config.patch
        self.quantizer = Quantizer(encoder.width, config.codes, config.code_width)
        self.decoder = PatchDecoder(
            config.code_width,
            config.decoder_width,
            config.decoder_depth,
            config.decoder_heads,
            encoder.config.grid,
            self.patch,
            encoder.config.in_channels,
        )
        self._embedded: list[Tensor] = []

    def forward(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["global"][:, 0]  # [B, 3, H, W]
        features = self.encoder(images)
        embedded = self.quantizer.embed(features.patches)  # [B, N, C]
        self._embedded.append(embedded.detach().flatten(0, 1))
        codes = self.quantizer.lookup(self.quantizer.tokens(embedded))  # [B, N, C]
        # Straight-through: the choice of a code has no gradient, so features get that of the code.
        rebuilt = self._decode(embedded + (codes - embedded).detach())
        error = F.mse_loss(rebuilt, patchify(images, self.patch))
        distance = (embedded - codes).square().sum(-1).mean()
        # DDP needs a gradient for every parameter: those of the class token get zero.
        loss = error + self.config.commitment * distance + 0 * features.cls.sum()
        return loss, {"pixel_error": error.detach(), **self.quantizer.health()}

    def _decode(self, codes: Tensor) -> Tensor:
        """Codes [B, N, C] -> float32 pixels [B, N, 3 * patch^2]."""
        return self.decoder(self.decoder.embed(codes)).float()

    def pictures(
        self, images: np.ndarray, views: Views, normalization: Normalization
    ) -> Mapping[str, "Image"]:
        """A sheet of test images: originals, tokens, and reconstructions from the tokens."""
        from selfray.report import sheets

        with torch.no_grad():
            tokens, predicted = self.reconstruct(
                normalize(torch.from_numpy(images), *normalization)
            )
        everything = np.ones(tokens.shape, dtype=bool)
        rebuilt = sheets.rebuild(predicted, images, everything, self.patch, False, *normalization)
        return {"tokens": sheets.tokens(images, tokens.numpy(), rebuilt, self.config.codes)}

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, H, W] -> (tokens int64 [B, N], pixels [B, N, 3 * patch^2])."""
        tokens = self.quantizer.tokens(self.quantizer.embed(self.encoder(images).patches))
        return tokens, self._decode(self.quantizer.lookup(tokens))

    def after_step(self, progress: Progress) -> None:
        embedded = torch.cat(self._embedded)  # [n, C]
        self._embedded.clear()
        self.quantizer.follow(embedded, self.config.code_momentum, progress.step)
