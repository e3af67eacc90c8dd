"""MoCo v3: momentum contrast inside the global batch, made stable for vision transformers.

Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers",
arXiv:2104.02057.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from selfray import distributed
from selfray.check import require
from selfray.config import added
from selfray.health import below_chance
from selfray.losses import batch_contrast
from selfray.method import (
    Batch,
    ComparingMethod,
    Embedded,
    MethodConfig,
    fitted,
    follow,
    of_both_views,
    teacher_of,
)
from selfray.models import initial
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.models.heads import projector
from selfray.models.vit import freeze_patch_embedding
from selfray.schedules import Cosine, Progress, Schedule
from selfray.views import View, Views, asymmetric_views

FIRST, SECOND = asymmetric_views((0.08, 1.0))


@dataclass(frozen=True)
class MoCoV3Config(MethodConfig):
    compares: ClassVar[bool] = True

    temperature: float = 0.2
    """Softmax temperature of the loss: 0.2 for ViTs, 1.0 for ResNets."""
    momentum: Schedule = field(default_factory=lambda: Cosine(0.99, 1.0))
    """Momentum of the momentum encoder: the share that is kept in each step."""
    projector_hidden: int = 4096
    """Width of the hidden layers of projector and predictor."""
    projector_width: int = 256
    """Dimension of queries and keys."""
    freeze_patches: bool = True
    """Freeze a ViT's patch embedding at its random initialisation: training it makes runs unstable.
    """
    global_batchnorm: bool = True
    """Batch norm over the global batch, not over each rank's share (the paper's)."""
    last_bias: bool = added(False, before=True)
    """With a ResNet, the predictor's last linear layer has a bias; the authors' code has none."""
    first_view: View = FIRST
    """The first of the two views of an image. Crops are bicubic; the authors' are bilinear."""
    second_view: View = SECOND
    """The second view."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")
        for name in ("projector_hidden", "projector_width"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be positive, got {value}")

    def views(self, encoder: EncoderConfig) -> Views:
        return {"global": (fitted(self.first_view, encoder), fitted(self.second_view, encoder))}

    def build(self, encoder: Encoder) -> "MoCoV3":
        method = MoCoV3(self, encoder)
        return distributed.with_global_batchnorm(method) if self.global_batchnorm else method


class MoCoV3(ComparingMethod):
    def __init__(self, config: MoCoV3Config, encoder: Encoder) -> None:
        super().__init__()
        hidden, width = config.projector_hidden, config.projector_width
        is_vit = encoder.config.is_vit
        if is_vit:
            initial.as_mocov3(encoder.backbone)
        if is_vit and config.freeze_patches:
            freeze_patch_embedding(encoder.backbone)
        self.config = config
        self.encoder = encoder
        self.projector = projector(encoder.width, hidden, width, 3 if is_vit else 2, "plain")
        last = "plain" if is_vit else "none"
        self.predictor = projector(width, hidden, width, 2, last, config.last_bias)
        self.momentum_encoder = teacher_of(self.encoder)
        self.momentum_projector = teacher_of(self.projector)

    def embed(self, batch: Batch, progress: Progress) -> Embedded:
        return of_both_views(self.encoder, batch, ("first", "second"))

    def targets(self, batch: Batch, progress: Progress) -> Embedded:
        return of_both_views(self.momentum_encoder, batch, ("second", "first"))

    def compare(
        self, embedded: Embedded, targets: Embedded, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._contrast(embedded["first"], targets["second"])
        loss = loss + self._contrast(embedded["second"], targets["first"])
        # The loss is a sum of two cross entropies, each multiplied by twice the temperature.
        one = loss.detach() / (4 * self.config.temperature)
        candidates = len(embedded["first"]) * distributed.world_size()
        return loss, {"below_chance": below_chance(one, candidates)}

    def _contrast(self, query_features: Tensor, key_features: Tensor) -> Tensor:
        queries = self.predictor(self.projector(query_features))  # [b, P]
        with torch.no_grad():
            keys = distributed.gather(self.momentum_projector(key_features))  # [B, P]
        first = distributed.rank() * len(queries)
        return batch_contrast(queries, keys, first, self.config.temperature)

    def is_decayed(self, name: str, parameter: Tensor) -> bool:
        """All parameters are decayed, as in the authors' code (AdamW; LARS never decays
        vectors)."""
        return True

    def after_step(self, progress: Progress) -> None:
        momentum = self.config.momentum(progress)
        follow(self.momentum_encoder, self.encoder, momentum)
        follow(self.momentum_projector, self.projector, momentum)
