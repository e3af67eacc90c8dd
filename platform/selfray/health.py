"""Label-free figures that show a collapse of the features during training, and a guard that stops
the run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from selfray import imports
from selfray.check import require
from selfray.config import added
from selfray.models.encoder import Encoder


@torch.no_grad()
def feature_health(encoder: Encoder, images: Tensor) -> dict[str, float]:
    """Two figures of an encoder's features of normalised images, float [b, 3, H, W].

    At most 256 images are used.

    Returns:
        feature_std: the standard deviation over the batch of each L2-normalised feature dimension,
            averaged over dimensions, times sqrt(D): about 1 if features fill the sphere, 0 at
            collapse.
        effective_rank: exp of the entropy of the normalised singular values (Roy and Vetterli 2007;
            RankMe, arXiv:2210.02885, on a batch): at most min(b, D).
    """
    was_training = encoder.training
    encoder.eval()
    # Eager: a compiled encoder would be compiled again for this batch size.
    with imports.uncompiled():
        features = encoder(images[:256]).cls.float()  # [b, D]
    encoder.train(was_training)
    return {
        "feature_std": float(deviation(features)),
        "effective_rank": float(effective_rank(features)),
    }


def deviation(features: Tensor) -> Tensor:
    """The spread of features [n, D] over the sphere, 0 to about 1: a scalar, nan for one row."""
    unit = torch.nn.functional.normalize(features.detach().float(), dim=-1)
    return unit.std(0).mean() * features.shape[1] ** 0.5


def below_chance(loss: Tensor, candidates: int) -> Tensor:
    """By how many nats a contrastive loss lies below chance, log(candidates): a scalar, near 0 if
    positives are as far away as negatives."""
    return math.log(candidates) - loss.detach()


def below_uniform(entropy: Tensor, prototypes: int) -> Tensor:
    """By how many nats a teacher's entropy lies below log(prototypes): a scalar, near 0 if it gives
    every image the uniform distribution."""
    return math.log(prototypes) - entropy.detach()


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the singular values of [n, D], normalised to sum 1: a scalar, nan if a
    feature is not finite."""
    if not features.isfinite().all():
        return features.new_full((), torch.nan)  # svdvals would raise
    singular = torch.linalg.svdvals(features.double())
    shares = singular / singular.sum().clamp_min(1e-12)
    return torch.exp(-(shares * (shares + 1e-12).log()).sum())


@dataclass(frozen=True)
class GuardConfig:
    """When a run is stopped because its features or projections no longer tell images apart."""

    # The floors were measured on digits, with a point every 10 steps.
    # feature_std, lowest of a run: 0.29 to 0.31 in the recipes of SimCLR, MoCo, BYOL and DINO;
    # 0.012 to 0.022 in MAE's (3 seeds; 0.007 at 25 times its learning rate), which then rises and
    # learns; untrained at 224 pixels 0.027 (ResNet-50) and 0.062 (ViT). Collapsed: 0.00000 to
    # 0.00097 for ten successive points (MAE at 2,500 times its rate). SimCLR at 10,000 times its
    # rate touched 0 at step 3 and recovered, hence the patience. The effective rank does not
    # separate them: 1.3 in a healthy MAE, 1.5 in a collapsed DINO.
    # projection_std: 0.67 to 0.86 in BYOL, on a ResNet and a ViT; 0.01 to 0.03 after 100 steps
    # without predictor or with the student as its target, while features stay at 0.06 or more.
    # below_uniform at a tenth of the run: 0.34 to 0.39 nats of 5.5 in DINO and DINOv2, the lowest
    # of their runs; 0.002 and falling in DINO with the paper's teacher temperature, which learns
    # nothing on digits. below_chance at a tenth of the run: 0.6 in MoCo v2, 2.1 in SimCLR; earlier
    # 0.01 (MoCo) and -1.4 (SimCLR), so a run is judged only from that point on.
    feature_floor: float = 0.001
    """A health/feature_std below this counts as collapsed."""
    projection_floor: float = 0.05
    """A projection_std below this counts as collapsed."""
    chance_floor: float = added(0.01)
    """A below_chance under this, in nats, means that a contrastive loss learns nothing."""
    uniform_floor: float = added(0.01)
    """A below_uniform under this, in nats, means that the teacher's output is uniform (DINO,
    DINOv2)."""
    learning_by: float = added(0.1)
    """Share of the run from which chance_floor and uniform_floor apply: a loss starts at chance."""
    patience: int = 10
    """The run ends after this many successive points of the metrics below a floor; 0 switches the
    guard off."""
    worse_than_start: int = added(0)
    """The run ends, and keeps its best checkpoint, after this many successive probes significantly
    worse than that of the weights it started from (95 % bootstrap interval); 0 for never."""

    def __post_init__(self) -> None:
        for name in ("feature_floor", "projection_floor", "chance_floor", "uniform_floor"):
            floor = getattr(self, name)
            require(0 <= floor < 1, f"guard.{name} must lie in [0, 1), got {floor}")
        require(
            0 <= self.learning_by <= 1,
            f"guard.learning_by must lie in [0, 1], got {self.learning_by}",
        )
        require(self.patience >= 0, f"guard.patience must be at least 0, got {self.patience}")
        require(
            self.worse_than_start >= 0,
            f"guard.worse_than_start must be at least 0, got {self.worse_than_start}",
        )

    @property
    def floors(self) -> dict[str, float]:
        """Floors of the metrics that show collapsed features, by metric name."""
        return {
            "health/feature_std": self.feature_floor,
            "projection_std": self.projection_floor,
        }

    @property
    def learning_floors(self) -> dict[str, float]:
        """Floors of the metrics that show that nothing is learned, by metric name."""
        return {"below_chance": self.chance_floor, "below_uniform": self.uniform_floor}


class CollapsedError(ArithmeticError):
    """Raised when a run's features have collapsed; the message is the cause in one line."""


@dataclass
class CollapseGuard:
    """Judges the successive points of a run's metrics."""

    config: GuardConfig
    points: int = 0
    """Number of successive points below one of `config.floors`."""
    idle_points: int = 0
    """Number of successive points below one of `config.learning_floors`."""
    cause: str = ""
    """Which metrics of the last point lay below their floors; empty if none did."""

    def see(self, values: Mapping[str, float], fraction: float = 1.0) -> None:
        """Judge one point of the metrics, at `fraction` of the run. NaN, such as the deviation of a
        single image, never counts as below a floor."""
        dead = _below(values, self.config.floors)
        is_due = fraction >= self.config.learning_by
        idle = _below(values, self.config.learning_floors) if is_due else ""
        self.points = self.points + 1 if dead and self.config.patience else 0
        self.idle_points = self.idle_points + 1 if idle and self.config.patience else 0
        self.cause = dead or idle

    @property
    def suspects(self) -> bool:
        """Whether the features of the last point had collapsed: no checkpoint is saved then. A run
        that merely has not learned yet may be saved."""
        return self.points > 0

    @property
    def collapsed(self) -> bool:
        return max(self.points, self.idle_points) >= max(self.config.patience, 1)

    @property
    def verdict(self) -> str:
        """The reason why a collapsed run ends, in one line."""
        what = "the features have collapsed" if self.points else "nothing is learned"
        return f"{what}: {self.cause}"


def _below(values: Mapping[str, float], floors: Mapping[str, float]) -> str:
    return " and ".join(
        f"{name} is {values[name]:.2g}, below {floor:g}"
        for name, floor in floors.items()
        if values.get(name, torch.inf) < floor
    )
