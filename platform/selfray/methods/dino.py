"""DINO: the student's output for any crop matches the centred and sharpened output of a teacher
that sees large crops.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", arXiv:2104.14294.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from selfray import distributed
from selfray.check import require
from selfray.health import below_uniform
from selfray.losses import self_distillation
from selfray.method import Batch, Method, MethodConfig, fitted, follow, teacher_of
from selfray.models import initial
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.models.heads import Centering, PrototypeHead
from selfray.schedules import Cosine, Progress, Ramp, Schedule
from selfray.views import ASYMMETRIC_JITTER, View, Views, asymmetric_views

FIRST, SECOND = asymmetric_views((0.4, 1.0))


@dataclass(frozen=True)
class DINOConfig(MethodConfig):
    prototypes: int = 65_536
    """Number of prototypes K, the dimension of the head's output."""
    hidden: int = 2048
    """Width of the head's hidden layers."""
    bottleneck: int = 256
    """Dimension in which embeddings and prototypes are compared."""
    free_norms: bool = False
    """Also train the prototypes' norms, as the paper does for ViT-S; unit norms are more stable."""
    student_temperature: float = 0.1
    teacher_temperature: Schedule = field(default_factory=lambda: Ramp(0.04, 0.07, 0.3))
    """Softmax temperature of the teacher, lower than the student's; it rises over the first 30 of
    100 epochs."""
    center_momentum: float = 0.9
    """Momentum of the running mean of the teacher's logits: the share kept in each step."""
    momentum: Schedule = field(default_factory=lambda: Cosine(0.996, 1.0))
    """Momentum of the teacher: the share that is kept in each step."""
    freeze_prototypes: float = 0.01
    """Share of the run, at its start, in which the prototypes are frozen: 1 epoch of 100."""
    local_crops: int = 8
    """Number of small crops of each image, which only the student sees; 0 for none."""
    global_batchnorm: bool = True
    """Use the statistics of the global batch in batch norms, if the encoder has any."""
    first_view: View = FIRST
    """The first of the two global crops."""
    second_view: View = SECOND
    """The second global crop."""
    local_view: View = field(
        default_factory=lambda: View(
            size=96, crop_scale=(0.05, 0.4), color_jitter=ASYMMETRIC_JITTER, grayscale=0.2, blur=0.5
        )
    )
    """The local crops."""

    def __post_init__(self) -> None:
        for name in ("prototypes", "hidden", "bottleneck", "student_temperature"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be positive, got {value}")
        require(
            0 <= self.center_momentum < 1,
            f"center_momentum must lie in [0, 1), got {self.center_momentum}",
        )
        require(self.local_crops >= 0, f"local_crops must be at least 0, got {self.local_crops}")
        require(
            0 <= self.freeze_prototypes < 1,
            f"freeze_prototypes is a share of the run in [0, 1), got {self.freeze_prototypes}",
        )

    def views(self, encoder: EncoderConfig) -> Views:
        views: Views = {
            "global": (fitted(self.first_view, encoder), fitted(self.second_view, encoder))
        }
        if self.local_crops:
            local = fitted(self.local_view, encoder, "method.local_view.size")
            views["local"] = (local,) * self.local_crops
        return views

    def build(self, encoder: Encoder) -> "DINO":
        method = DINO(self, encoder)
        return distributed.with_global_batchnorm(method) if self.global_batchnorm else method


class DINO(Method):
    def __init__(self, config: DINOConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.student = encoder
        if encoder.config.is_vit:
            initial.as_dino(encoder.backbone, class_deviation=0.02)
        elif encoder.config.is_resnet:
            initial.fill_residual_branches(encoder.backbone)  # as torchvision and the authors do
        self.student_head = PrototypeHead(
            encoder.width, config.hidden, config.bottleneck, config.prototypes, config.free_norms
        )
        self.encoder = teacher_of(encoder)
        self.teacher_head = teacher_of(self.student_head)
        self.centering = Centering(config.prototypes, config.center_momentum)

    def forward(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        crops = [batch[name] for name in ("global", "local") if name in batch]
        # All crops of one size go through the student in one batch.
        student = torch.cat(
            [self._logits(self.student, self.student_head, images) for images in crops], dim=1
        )  # [b, S, K]
        with torch.no_grad():
            logits = self._logits(self.encoder, self.teacher_head, batch["global"])  # [b, 2, K]
            teacher = self.centering(logits, self.config.teacher_temperature(progress))
        loss = self_distillation(student, teacher, self.config.student_temperature)
        # Cross entropy = the teacher's entropy + the divergence. Collapse shows in the entropy (0
        # or log K), learning in the divergence.
        entropy = torch.special.entr(teacher).sum(-1).mean()
        return loss, {
            "teacher_entropy": entropy,
            "below_uniform": below_uniform(entropy, self.config.prototypes),
            "divergence": loss.detach() - entropy,
        }

    @staticmethod
    def _logits(encoder: Encoder, head: PrototypeHead, images: Tensor) -> Tensor:
        """[b, V, 3, H, W] -> [b, V, K]."""
        return head(encoder(images.flatten(0, 1)).cls).unflatten(0, images.shape[:2])

    def is_decayed(self, name: str, parameter: Tensor) -> bool:
        """All but biases and norms, as in the authors' code. The class token and the prototypes'
        norms are decayed."""
        return parameter.ndim > 1 or name == "student_head.norms"

    def before_step(self, progress: Progress) -> None:
        if progress.fraction < self.config.freeze_prototypes:
            self.student_head.freeze_prototypes()

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        momentum = self.config.momentum(progress)
        follow(self.encoder, self.student, momentum)
        follow(self.teacher_head, self.student_head, momentum)
        self.centering.follow()
