"""SimCLR: match two views of an image, against all other images of the global batch.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations",
arXiv:2002.05709; the deeper projector: arXiv:2006.10029.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from selfray import distributed
from selfray.check import require
from selfray.config import added
from selfray.health import below_chance
from selfray.losses import nt_xent
from selfray.method import Batch, ComparingMethod, Embedded, MethodConfig, fitted
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.models.heads import projector
from selfray.schedules import Progress
from selfray.views import ColorJitter, View, Views


@dataclass(frozen=True)
class SimCLRConfig(MethodConfig):
    compares: ClassVar[bool] = True

    temperature: float = 0.1
    """Softmax temperature of the loss."""
    projector_layers: int = 2
    """Linear layers of the projector: 2 as in SimCLR, 3 as in SimCLR v2."""
    projector_hidden: int | None = None
    """Width of the projector's hidden layers; None means the encoder's width."""
    projector_width: int = 128
    """Dimension of the embeddings that are compared."""
    global_batchnorm: bool = True
    """Batch norm over the global batch, not over each rank's share (the paper's)."""
    last_bias: bool = added(False, before=True)
    """The projector's last batch norm has a bias; that of the authors' code has none."""
    view: View = field(
        default_factory=lambda: View(
            crop_scale=(0.08, 1.0), color_jitter=ColorJitter(), grayscale=0.2, blur=0.5
        )
    )
    """Both views are drawn from this."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")
        require(
            self.projector_layers in (2, 3),
            f"projector_layers must be 2 (v1) or 3 (v2), got {self.projector_layers}",
        )
        require(
            self.projector_width > 0,
            f"projector_width must be positive, got {self.projector_width}",
        )

    def views(self, encoder: EncoderConfig) -> Views:
        view = fitted(self.view, encoder)
        return {"global": (view, view)}

    def build(self, encoder: Encoder) -> "SimCLR":
        method = SimCLR(self, encoder)
        return distributed.with_global_batchnorm(method) if self.global_batchnorm else method


class SimCLR(ComparingMethod):
    def __init__(self, config: SimCLRConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        hidden = config.projector_hidden or encoder.width
        self.projector = projector(
            encoder.width,
            hidden,
            config.projector_width,
            config.projector_layers,
            "affine" if config.last_bias else "scaled",
        )

    def embed(self, batch: Batch, progress: Progress) -> Embedded:
        views = batch["global"]  # [b, 2, 3, H, W]
        return {"cls": self.encoder(views.flatten(0, 1)).cls.unflatten(0, (-1, 2))}  # [b, 2, D]

    def compare(
        self, embedded: Embedded, targets: Embedded, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        features = embedded["cls"]  # [b, 2, D]
        local = self.projector(features.flatten(0, 1)).unflatten(0, (-1, 2))  # [b, 2, P]
        everyone = distributed.gather(local)  # [B, 2, P]
        first = distributed.rank() * local.shape[0]
        loss = nt_xent(local, everyone, first, self.config.temperature)
        return loss, {"below_chance": below_chance(loss, 2 * len(everyone) - 1)}
