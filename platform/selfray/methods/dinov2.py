"""DINOv2: DINO on the image, iBOT on hidden patches, and KoLeo to spread the features.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", arXiv:2304.07193.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from selfray import distributed
from selfray.check import require, require_one_of
from selfray.config import added
from selfray.health import below_uniform
from selfray.losses import koleo, masked_distillation, self_distillation, sinkhorn
from selfray.method import (
    Batch,
    ComparingMethod,
    Embedded,
    MethodConfig,
    fitted,
    follow,
    hidden_places,
    teacher_of,
)
from selfray.models import initial
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.models.heads import Centering, PrototypeHead
from selfray.schedules import Cosine, Progress, Ramp, Schedule
from selfray.views import ASYMMETRIC_JITTER, BlockMask, View, Views, asymmetric_views

FIRST, SECOND = asymmetric_views((0.32, 1.0))


@dataclass(frozen=True)
class DINOv2Config(MethodConfig):
    compares: ClassVar[bool] = True

    prototypes: int = 65_536
    """Number of prototypes K, the dimension of the image head's output."""
    hidden: int = 2048
    """Width of the heads' hidden layers."""
    bottleneck: int = 256
    """Dimension in which embeddings and prototypes are compared."""
    free_norms: bool = added(True, before=False)
    """Also train the prototypes' norms, in all heads, as the authors' code does."""
    separate_heads: bool = False
    """Use a separate head for patches, as in the long recipe."""
    patch_prototypes: int = 65_536
    """Number of prototypes of the separate patch head."""
    centering: Literal["softmax", "sinkhorn"] = "softmax"
    """How the teacher's outputs are kept from collapsing: by a running centre (softmax, the short
    recipe) or by balancing them over the batch (sinkhorn, the long recipe)."""
    student_temperature: float = 0.1
    teacher_temperature: Schedule = field(default_factory=lambda: Ramp(0.04, 0.07, 0.3))
    """Softmax temperature of the teacher, lower than the student's."""
    center_momentum: float = 0.9
    """Momentum of the running mean of the teacher's logits: the share kept in each step."""
    momentum: Schedule = field(default_factory=lambda: Cosine(0.992, 1.0))
    """Momentum of the teacher: the share that is kept in each step."""
    freeze_prototypes: float = 0.01
    """Share of the run, at its start, in which the prototypes are frozen."""
    patch_weight: float = 1.0
    """Weight of iBOT's loss."""
    koleo_weight: float = 0.1
    """Weight of the KoLeo loss, which is summed over the two global crops."""
    masked_share: float = 0.5
    """Share of the global crops in which patches are hidden."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of a crop's patches that is hidden; spread evenly over a batch."""
    smallest_block: int = 4
    """Smallest area, in patches, of a hidden rectangle."""
    local_crops: int = 8
    """Number of small crops of each image, which only the student sees; 0 for none."""
    first_view: View = FIRST
    """The first of the two global crops."""
    second_view: View = SECOND
    """The second global crop."""
    local_view: View = field(
        default_factory=lambda: View(
            size=96,
            crop_scale=(0.05, 0.32),
            color_jitter=ASYMMETRIC_JITTER,
            grayscale=0.2,
            blur=0.5,
        )
    )
    """The local crops."""

    def __post_init__(self) -> None:
        names = ("prototypes", "patch_prototypes", "hidden", "bottleneck", "student_temperature")
        for name in names:
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("patch_weight", "koleo_weight", "local_crops"):
            value = getattr(self, name)
            require(value >= 0, f"{name} must be at least 0, got {value}")
        for name in ("center_momentum", "freeze_prototypes"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must lie in [0, 1), got {value}")
        require_one_of("centering", self.centering, ("softmax", "sinkhorn"))
        self.mask  # noqa: B018 - checks the share, the ratios and the smallest block

    @property
    def mask(self) -> BlockMask:
        return BlockMask(self.mask_ratio, self.masked_share, self.smallest_block)

    def views(self, encoder: EncoderConfig) -> Views:
        require(
            encoder.is_vit,
            f"DINOv2 hides patches, so it needs a ViT, not encoder.name {encoder.name}: give "
            "--encoder.name vit_small_patch16_224, for example",
        )
        views: Views = {
            "global": (
                fitted(self.first_view, encoder, mask=self.mask),
                fitted(self.second_view, encoder, mask=self.mask),
            )
        }
        if self.local_crops:
            local = fitted(self.local_view, encoder, "method.local_view.size")
            views["local"] = (local,) * self.local_crops
        return views

    def build(self, encoder: Encoder) -> "DINOv2":
        return DINOv2(self, encoder)


class DINOv2(ComparingMethod):
    def __init__(self, config: DINOv2Config, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.student = encoder
        initial.as_dino(encoder.backbone, class_deviation=1e-6)
        self.mask_token = nn.Parameter(torch.zeros(encoder.width))
        self.student_head = self._new_head(config.prototypes)
        # A head shared by images and patches is registered once, as student_head.
        self.student_patch_head = (
            self._new_head(config.patch_prototypes) if config.separate_heads else None
        )
        self.encoder = teacher_of(encoder)
        self.teacher_head = teacher_of(self.student_head)
        self.teacher_patch_head = (
            teacher_of(self.student_patch_head) if self.student_patch_head is not None else None
        )
        patch_prototypes = config.patch_prototypes if config.separate_heads else config.prototypes
        self.centering = Centering(config.prototypes, config.center_momentum)
        self.patch_centering = Centering(patch_prototypes, config.center_momentum)

    def _new_head(self, prototypes: int) -> PrototypeHead:
        config = self.config
        return PrototypeHead(
            self.student.width, config.hidden, config.bottleneck, prototypes, config.free_norms
        )

    def embed(self, batch: Batch, progress: Progress) -> Embedded:
        images, mask = batch["global"], batch["global_mask"].flatten(0, 1)  # [b, 2, ...], [2b, N]
        seen = self.student(images.flatten(0, 1), mask=mask, mask_token=self.mask_token)
        embedded = {
            "global": seen.cls.unflatten(0, images.shape[:2]),  # [b, 2, D]
            "patches": seen.patches.flatten(0, 1)[hidden_places(batch, "global")],  # [M, D]
        }
        if "local" in batch:
            crops = batch["local"]  # [b, L, 3, h, w]
            local = self.student(crops.flatten(0, 1)).cls
            embedded["local"] = local.unflatten(0, crops.shape[:2])  # [b, L, D]
        return embedded

    def targets(self, batch: Batch, progress: Progress) -> Embedded:
        images, mask = batch["global"], batch["global_mask"].flatten(0, 1)
        hidden = hidden_places(batch, "global")  # [M], hidden patches among all
        seen = self.encoder(images.flatten(0, 1))
        weights = 1 / mask.sum(1).clamp_min(1)  # [2b]
        return {
            "global": seen.cls.unflatten(0, images.shape[:2]),  # [b, 2, D]
            "patches": seen.patches.flatten(0, 1)[hidden],  # [M, D]
            "weights": weights.repeat_interleave(mask.shape[1])[hidden],  # [M]
        }

    def compare(
        self, embedded: Embedded, targets: Embedded, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        teacher, teacher_patches = self._teacher_targets(targets, progress)  # [b, 2, K], [M, K']
        crops = [embedded[name] for name in ("global", "local") if name in embedded]
        logits = torch.cat([_each(self.student_head, cls) for cls in crops], dim=1)  # [b, S, K]
        temperature = self.config.student_temperature
        image_loss = self_distillation(logits, teacher, temperature)

        head = self.student_patch_head or self.student_head
        patch_logits = head(embedded["patches"])  # [M, K']
        views = embedded["global"].flatten(0, 1).shape[0]
        patch_loss = masked_distillation(
            patch_logits, teacher_patches, targets["weights"], views, temperature
        )
        spread_loss = torch.stack([self._spread(cls) for cls in embedded["global"].unbind(1)]).sum()

        loss = (
            image_loss
            + self.config.patch_weight * patch_loss
            + self.config.koleo_weight * spread_loss
        )
        entropy = torch.special.entr(teacher).sum(-1).mean()
        return loss, {
            "image_loss": image_loss.detach(),
            "patch_loss": patch_loss.detach(),
            "koleo": spread_loss.detach(),
            "teacher_entropy": entropy,
            "below_uniform": below_uniform(entropy, self.config.prototypes),
            "divergence": image_loss.detach() - entropy,
        }

    @torch.no_grad()
    def _teacher_targets(self, targets: Embedded, progress: Progress) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities for the crops [b, 2, K] and for the patches that are hidden
        from the student [M, K']."""
        logits = _each(self.teacher_head, targets["global"])  # [b, 2, K]
        head = self.teacher_patch_head or self.teacher_head
        patch_logits = head(targets["patches"])
        temperature = self.config.teacher_temperature(progress)
        if self.config.centering == "softmax":
            return (
                self.centering(logits, temperature),
                self.patch_centering(patch_logits, temperature),
            )
        balanced = sinkhorn(logits.flatten(0, 1), temperature).view_as(logits)
        return balanced, sinkhorn(patch_logits, temperature)

    @staticmethod
    def _spread(features: Tensor) -> Tensor:
        """KoLeo of one global crop of each image, over all ranks."""
        everyone = distributed.gather(features)
        return koleo(features, everyone, distributed.rank() * len(features))

    def is_decayed(self, name: str, parameter: Tensor) -> bool:
        """All but biases, norms and layer scales, as in the authors' code. Tokens and the
        prototypes' norms are decayed."""
        return parameter.ndim > 1 or name == "mask_token" or name.endswith("head.norms")

    def before_step(self, progress: Progress) -> None:
        if progress.fraction < self.config.freeze_prototypes:
            for head in (self.student_head, self.student_patch_head):
                if head is not None:
                    head.freeze_prototypes()

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        momentum = self.config.momentum(progress)
        follow(self.encoder, self.student, momentum)
        follow(self.teacher_head, self.student_head, momentum)
        if self.teacher_patch_head is not None and self.student_patch_head is not None:
            follow(self.teacher_patch_head, self.student_patch_head, momentum)
        if self.config.centering == "softmax":
            self.centering.follow()
            self.patch_centering.follow()


def _each(head: PrototypeHead, features: Tensor) -> Tensor:
    """[b, V, D] -> [b, V, K]."""
    return head(features.flatten(0, 1)).unflatten(0, features.shape[:2])
