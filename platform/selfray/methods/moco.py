"""MoCo v1 and v2: match a query to its momentum-encoded key, against a queue of earlier keys.

He et al., "Momentum Contrast", arXiv:1911.05722; Chen et al., "Improved Baselines with Momentum
Contrastive Learning" (v2: MLP head, stronger augmentation, cosine schedule), arXiv:2003.04297.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray import distributed
from selfray.check import require, require_one_of
from selfray.config import added
from selfray.health import below_chance
from selfray.losses import queue_contrast
from selfray.method import Batch, Method, MethodConfig, fitted, follow, teacher_of
from selfray.models import initial
from selfray.models.batchnorm import with_grouped_batchnorm
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.schedules import Constant, Progress, Schedule
from selfray.views import ColorJitter, View, Views


@dataclass(frozen=True)
class MoCoConfig(MethodConfig):
    why_not_accumulate: ClassVar[str | None] = (
        "the queue moves once per step, and batch norm would see micro-batches"
    )

    temperature: float = 0.2
    """Softmax temperature of the loss: 0.07 in v1, 0.2 in v2."""
    queue_size: int = 65_536
    """Number of earlier keys that serve as negatives."""
    momentum: Schedule = field(default_factory=lambda: Constant(0.999))
    """Momentum of the key encoder: the share that is kept in each step."""
    head: Literal["linear", "mlp"] = "mlp"
    """One linear layer (linear, v1), or two with ReLU between (mlp, v2)."""
    projector_width: int = 128
    """Dimension of queries and keys."""
    batchnorm_groups: int = added(1)
    """Number of groups into which each worker splits its batch for the encoders' batch norms; keys
    are shuffled first. On one worker, 8 groups do what the paper's 8 GPUs do. With a single group,
    queries and their keys share batch statistics and the queue's keys do not, which reveals the
    positive (section 3.3)."""
    view: View = field(
        default_factory=lambda: View(
            crop_scale=(0.2, 1.0),
            color_jitter=ColorJitter(0.4, 0.4, 0.4, 0.1),
            grayscale=0.2,
            blur=0.5,
        )
    )
    """Query and key are drawn from this view, v2's. v1 always jitters (probability 1, hue 0.4) and
    does not blur. Two differences from the authors' code keep one order and one resizer for all
    methods: v1 drops the colour before it jitters, here after, so the hue shift changes the luma of
    gray views; and both versions crop bilinearly, here bicubically."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")
        require_one_of("head", self.head, ("linear", "mlp"))
        for name in ("queue_size", "projector_width", "batchnorm_groups"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be positive, got {value}")

    def check_batch_size(self, batch_size: int) -> None:
        require(
            batch_size <= self.queue_size,
            f"batch_size {batch_size} is larger than the queue: give --method.queue-size "
            f"{batch_size} or more",
        )
        require(
            batch_size % self.batchnorm_groups == 0,
            f"batch_size {batch_size} does not divide into --method.batchnorm-groups "
            f"{self.batchnorm_groups}",
        )

    def views(self, encoder: EncoderConfig) -> Views:
        require(
            self.batchnorm_groups == 1 or not encoder.is_vit,
            f"method.batchnorm_groups {self.batchnorm_groups} is for encoders with batch norm, not "
            f"for {encoder.name}: leave it out",
        )
        view = fitted(self.view, encoder)
        return {"global": (view, view)}

    def build(self, encoder: Encoder) -> "MoCo":
        return MoCo(self, encoder)


class MoCo(Method):
    def __init__(self, config: MoCoConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        if encoder.config.is_resnet:
            initial.fill_residual_branches(encoder.backbone)  # as torchvision and the authors do
        if config.batchnorm_groups > 1:
            with_grouped_batchnorm(encoder, config.batchnorm_groups)
        hidden = [nn.Linear(encoder.width, encoder.width), nn.ReLU(inplace=True)]
        final = nn.Linear(encoder.width, config.projector_width)
        self.head = nn.Sequential(*(hidden if config.head == "mlp" else []), final)
        self.key_encoder, self.key_head = teacher_of(self.encoder), teacher_of(self.head)
        queue = F.normalize(torch.randn(config.queue_size, config.projector_width), dim=-1)
        self.register_buffer("queue", queue)  # [K, P]
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self._new_keys: Tensor | None = None

    def forward(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = batch["global"].unbind(1)  # [b, 3, H, W] each
        queries = self.head(self.encoder(first).cls)  # [b, P]
        keys = self._keys(second, progress.step)  # [b, P]
        self._new_keys = F.normalize(keys.float(), dim=-1)
        queue = self.get_buffer("queue")
        loss = queue_contrast(queries, keys, queue, self.config.temperature)
        return loss, {"below_chance": below_chance(loss, 1 + len(queue))}

    @torch.no_grad()
    def _keys(self, images: Tensor, step: int) -> Tensor:
        if self.config.batchnorm_groups > 1 and not distributed.is_distributed():
            generator = torch.Generator().manual_seed(step)
            order = torch.randperm(len(images), generator=generator).to(images.device)
            return self.key_head(self.key_encoder(images[order]).cls)[order.argsort()]
        mine, order = distributed.shuffled(images, step)
        return distributed.unshuffled(self.key_head(self.key_encoder(mine).cls), order)

    def is_decayed(self, name: str, parameter: Tensor) -> bool:
        """All parameters are decayed, as in the authors' code."""
        return True

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        momentum = self.config.momentum(progress)
        follow(self.key_encoder, self.encoder, momentum)
        follow(self.key_head, self.head, momentum)
        assert self._new_keys is not None
        keys = distributed.gather(self._new_keys)  # [B, P]
        queue, pointer = self.get_buffer("queue"), self.get_buffer("pointer")
        places = (pointer + torch.arange(len(keys), device=keys.device)) % len(queue)
        queue[places] = keys
        pointer.copy_((pointer + len(keys)) % len(queue))
        self._new_keys = None
