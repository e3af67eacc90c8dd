"""Fine-tuning as a method: a pretrained encoder and a new linear layer learn classes together.

As a Method it is trained by the same loop, streams, checkpoints and tracking as pretraining. It
lies outside `selfray.methods`, because it reads labels.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from selfray.check import require, require_number, require_one_of
from selfray.method import Batch, Method, MethodConfig, fitted
from selfray.models.encoder import Encoder, EncoderConfig, Features
from selfray.pixels.rand_augment import seeded
from selfray.schedules import Progress
from selfray.views import View, Views

LABEL = "label"


def require_classes(labels: tuple[int, ...]) -> None:
    """ValueError unless these are the labels of at least two classes, in ascending order."""
    require(
        len(labels) > 1 and list(labels) == sorted(set(labels)),
        f"method.labels must be at least two labels in ascending order, got {labels}",
    )


def targets_of(labels: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """(class of each image, int64 [B], arbitrary without label; whether it has a label, bool [B]).

    Args:
        labels: int64 [B]; -1 for none.
        known: the label of each class, int64 [C], in ascending order.
    """
    return torch.searchsorted(known, labels).clamp(max=len(known) - 1), labels >= 0


@dataclass(frozen=True)
class FineTuneConfig(MethodConfig):
    """Cross entropy over the classes of labelled images, with the regularisation of the papers."""

    labels: tuple[int, ...] = ()
    """The label of each class in the data, in ascending order."""
    pool: Literal["cls", "mean"] = "cls"
    """Input of the linear layer: the class token (of a ResNet, the pooled map), or the layer norm
    of the mean of a ViT's patch tokens (MAE, BEiT)."""
    smoothing: float = 0.1
    """Share of the target that is spread over all classes: label smoothing (arXiv:1512.00567)."""
    mixup: float = 0.0
    """Mixup's alpha (arXiv:1710.09412); 0 for none."""
    cutmix: float = 0.0
    """CutMix's alpha (arXiv:1905.04899); if both are given, each batch uses one of them."""
    erase: float = 0.0
    """Probability that a rectangle of an image becomes noise: random erasing (arXiv:1708.04896)."""
    head_std: float = 0.01
    """Standard deviation of the linear layer's initial weights."""
    view: View = field(default_factory=lambda: View(crop_scale=(0.08, 1.0)))

    def __post_init__(self) -> None:
        require_classes(self.labels)
        require_one_of("method.pool", self.pool, ("cls", "mean"))
        require_number("method.smoothing", self.smoothing, least=0, below=1)
        for name in ("mixup", "cutmix"):
            require_number(f"method.{name}", getattr(self, name), least=0)
        require_number("method.head_std", self.head_std, above=0)
        require_number("method.erase", self.erase, least=0, most=1)

    def views(self, encoder: EncoderConfig) -> Views:
        require(
            self.pool == "cls" or encoder.is_vit,
            f"method.pool mean is for ViTs, not for encoder.name {encoder.name}: give cls",
        )
        return {"global": (fitted(self.view, encoder),)}

    def build(self, encoder: Encoder) -> "FineTune":
        return FineTune(self, encoder)


class FineTune(Method):
    """The encoder and a linear layer on its features."""

    def __init__(self, config: FineTuneConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head = Head(encoder.width, len(config.labels), config.pool, config.head_std)
        self.register_buffer("known", torch.tensor(config.labels), persistent=False)  # [C]

    def forward(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        places, has_label = targets_of(batch[LABEL], self.get_buffer("known"))
        images, targets, counts = self._augmented(batch["global"][:, 0], places, has_label)
        logits = self.head(self.encoder(images)).float()  # [B, C]
        losses = -(targets * logits.log_softmax(-1)).sum(-1)  # [B]
        return (losses * counts).sum() / counts.sum().clamp(min=1), {}

    def _augmented(
        self, images: Tensor, places: Tensor, has_label: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(images float [B, 3, H, W], targets float [B, C], whether each counts in the loss, bool
        [B]) after mixing and erasing. The batch itself is not changed."""
        config, classes, count = self.config, len(self.config.labels), len(images)
        # Every step seeds torch's generator, so that a resumed run draws the same.
        with seeded(int(torch.randint(2**31, (1,)))):
            if config.erase:
                eraser = RandomErasing(config.erase, mode="pixel", device=str(images.device))
                images = eraser(images.clone())
            if not (config.mixup or config.cutmix):
                return images, mixup_target(places, classes, 1.0, config.smoothing), has_label
            # timm needs an even number of images: it mixes the first with the last, and so on.
            kept = torch.arange(count + count % 2, device=images.device).clamp(max=count - 1)
            mix = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes
            )
            images, targets = mix(images[kept], places[kept])
        # A mixture counts only if both of its images have a label.
        counts = has_label[kept] & has_label[kept].flip(0)
        return images[:count], targets[:count], counts[:count]

    def is_decayed(self, name: str, parameter: Tensor) -> bool:
        """True for all parameters except biases, norms, tokens and positions (MAE, BEiT)."""
        is_vector = max(parameter.shape, default=1) == parameter.numel()
        return not (is_vector or name.endswith(("pos_embed", "cls_token", "reg_token")))


class Head(nn.Module):
    """A linear layer on an encoder's features."""

    def __init__(self, width: int, classes: int, pool: str, std: float = 0.01) -> None:
        super().__init__()
        self.pool = pool
        self.norm = nn.LayerNorm(width, eps=1e-6) if pool == "mean" else nn.Identity()
        self.linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=std)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Features) -> Tensor:
        """Logits [B, C] of an encoder's features."""
        return self.of_pooled(features.cls if self.pool == "cls" else features.patches.mean(1))

    def of_pooled(self, pooled: Tensor) -> Tensor:
        """Logits [B, C] of class tokens or means of patch tokens, [B, D]."""
        return self.linear(self.norm(pooled))
