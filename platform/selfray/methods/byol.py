"""BYOL: predict a target network's projection of another view of the image; no negatives.

Grill et al., "Bootstrap Your Own Latent", arXiv:2006.07733.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from selfray import distributed
from selfray.check import require
from selfray.config import added
from selfray.health import deviation
from selfray.losses import regression_to_target
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
from selfray.schedules import Cosine, Progress, Schedule
from selfray.views import View, Views, asymmetric_views

FIRST, SECOND = asymmetric_views((0.08, 1.0))


@dataclass(frozen=True)
class BYOLConfig(MethodConfig):
    compares: ClassVar[bool] = True

    momentum: Schedule = field(default_factory=lambda: Cosine(0.996, 1.0))
    """Momentum of the target network: the share that is kept in each step."""
    projector_hidden: int = 4096
    """Width of the hidden layers of projector and predictor."""
    projector_width: int = 256
    """Dimension of the projections that are predicted."""
    global_batchnorm: bool = True
    """Batch norm over the global batch, not over each rank's share (the paper's)."""
    last_bias: bool = added(False, before=True)
    """The last linear layers of projector and predictor have a bias; those of the authors' code
    have none."""
    first_view: View = FIRST
    """The first of the two views of an image."""
    second_view: View = SECOND
    """The second view."""

    def __post_init__(self) -> None:
        for name in ("projector_hidden", "projector_width"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be positive, got {value}")

    def views(self, encoder: EncoderConfig) -> Views:
        return {"global": (fitted(self.first_view, encoder), fitted(self.second_view, encoder))}

    def build(self, encoder: Encoder) -> "BYOL":
        method = BYOL(self, encoder)
        return distributed.with_global_batchnorm(method) if self.global_batchnorm else method


class BYOL(ComparingMethod):
    def __init__(self, config: BYOLConfig, encoder: Encoder) -> None:
        super().__init__()
        hidden, width = config.projector_hidden, config.projector_width
        self.config = config
        self.encoder = encoder
        if encoder.config.is_resnet:
            # As in the authors' code: a gain of 0 only in bottleneck blocks.
            initial.fill_residual_branches(encoder.backbone, bottlenecks=False)
        self.projector = projector(encoder.width, hidden, width, 2, "none", config.last_bias)
        self.predictor = projector(width, hidden, width, 2, "none", config.last_bias)
        # The target stays in train mode, as in the paper: it uses the statistics of the batch.
        self.target_encoder = teacher_of(self.encoder)
        self.target_projector = teacher_of(self.projector)

    def embed(self, batch: Batch, progress: Progress) -> Embedded:
        return of_both_views(self.encoder, batch, ("first", "second"))

    def targets(self, batch: Batch, progress: Progress) -> Embedded:
        return of_both_views(self.target_encoder, batch, ("second", "first"))

    def compare(
        self, embedded: Embedded, targets: Embedded, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        aim = self._target(targets["second"])  # [b, P]
        loss = regression_to_target(self._predict(embedded["first"]), aim)
        other = self._target(targets["first"])
        loss = loss + regression_to_target(self._predict(embedded["second"]), other)
        # Collapse shows only in projections: batch norms keep the encoder's features apart.
        return loss, {"projection_std": deviation(aim)}

    def _predict(self, features: Tensor) -> Tensor:
        return self.predictor(self.projector(features))  # [b, D] -> [b, P]

    @torch.no_grad()
    def _target(self, features: Tensor) -> Tensor:
        return self.target_projector(features)  # [b, D] -> [b, P]

    def after_step(self, progress: Progress) -> None:
        momentum = self.config.momentum(progress)
        follow(self.target_encoder, self.encoder, momentum)
        follow(self.target_projector, self.projector, momentum)
