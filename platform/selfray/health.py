"""Is the representation alive? Label-free figures that show a collapse while it happens, and a
guard that judges by them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from selfray.check import require
from selfray.config import added
from selfray.models.encoder import Encoder


@torch.no_grad()
def feature_health(encoder: Encoder, images: Tensor) -> dict[str, float]:
    """Two figures of the features of a batch, [b, 3, H, W] normalised, at most 256 of them used.

    feature_std: the deviation of each L2-normalised feature dimension over the batch, the mean
        over dimensions, times sqrt(D): about 1 where features fill the sphere, 0 at collapse.
    effective_rank: exp of the entropy of the normalised singular values (Roy and Vetterli 2007;
        RankMe, arXiv:2210.02885, on a batch): at most min(b, D).
    """
    was_training = encoder.training
    encoder.eval()
    # As it is: a compiled encoder would be compiled again for this number of images.
    with torch.compiler.set_stance("force_eager"):
        features = encoder(images[:256]).cls.float()  # [b, D]
    encoder.train(was_training)
    return {
        "feature_std": float(deviation(features)),
        "effective_rank": float(effective_rank(features)),
    }


def deviation(features: Tensor) -> Tensor:
    """How far [n, D] spread over the sphere, 0 to about 1: a scalar, nan for a single row."""
    unit = torch.nn.functional.normalize(features.detach().float(), dim=-1)
    return unit.std(0).mean() * features.shape[1] ** 0.5


def below_chance(loss: Tensor, candidates: int) -> Tensor:
    """How many nats a contrastive loss lies below log(candidates), that of a guess: a scalar, near
    0 where positives are as far away as negatives."""
    return math.log(candidates) - loss.detach()


def below_uniform(entropy: Tensor, prototypes: int) -> Tensor:
    """How many nats a teacher's entropy lies below log(prototypes): a scalar, near 0 where it gives
    every image the uniform distribution."""
    return math.log(prototypes) - entropy.detach()


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the singular values of [n, D], each divided by their sum: a scalar, nan
    where a feature is not finite."""
    if not features.isfinite().all():
        return features.new_full((), torch.nan)  # the decomposition itself would raise
    singular = torch.linalg.svdvals(features.double())
    shares = singular / singular.sum().clamp_min(1e-12)
    return torch.exp(-(shares * (shares + 1e-12).log()).sum())


@dataclass(frozen=True)
class GuardConfig:
    """When a run ends whose features, or BYOL's projections, no longer tell images apart."""

    # Measured with digits (a point every 10 steps). The lowest feature_std of a run: 0.29 to 0.31
    # in the recipes of SimCLR, MoCo, BYOL and DINO, but 0.012 to 0.022 in MAE's (3 seeds; 0.007 at
    # 25 times its learning rate), which then rises and learns; untrained at 224 pixels: 0.027
    # (ResNet-50), 0.062 (ViT). Dead: 0.00000 to 0.00097 for ten points on end (MAE at 2,500 times
    # its rate). SimCLR at 10,000 times its rate touched 0 at step 3 and came back, hence the
    # patience. The effective rank is no better judge: 1.3 in healthy MAE, 1.5 in a dead DINO.
    # projection_std: 0.67 to 0.86 in BYOL, on a ResNet and a ViT; 0.01 to 0.03 after 100 steps
    # without predictor or with the student as its target, while features stay at 0.06 or more.
    # below_uniform, at a tenth of the run: 0.34 to 0.39 nats of 5.5 in DINO and DINOv2, the lowest
    # of their runs; 0.002 and falling in DINO with the paper's teacher temperature, which learns
    # nothing there. below_chance, also there: 0.6 in MoCo v2, 2.1 in SimCLR; before, 0.01 (MoCo)
    # and -1.4, so a run is judged from there on alone.
    feature_floor: float = 0.001
    """A health/feature_std below this is a collapse."""
    projection_floor: float = 0.05
    """A projection_std below this is a collapse."""
    chance_floor: float = added(0.01)
    """A below_chance under this is a contrastive loss that learns nothing, in nats."""
    uniform_floor: float = added(0.01)
    """A below_uniform under this is a teacher that tells nothing, in nats (DINO, DINOv2)."""
    learning_by: float = added(0.1)
    """The share of the run from which the last two are judged: a loss starts at chance."""
    patience: int = 10
    """So many successive points of the metrics lie below a floor before the run ends; 0 for never,
    which switches the guard off."""
    worse_than_start: int = added(0)
    """So many successive probes are surely worse than that of the weights that the run started from
    (95 % bootstrap interval) before it ends, its best checkpoint kept; 0 for never."""

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
        """Of figures that show that nothing is left to learn from, by the name of the metric."""
        return {
            "health/feature_std": self.feature_floor,
            "projection_std": self.projection_floor,
        }

    @property
    def learning_floors(self) -> dict[str, float]:
        """Of figures that show that nothing is learned."""
        return {"below_chance": self.chance_floor, "below_uniform": self.uniform_floor}


class CollapsedError(ArithmeticError):
    """A run's features have collapsed; the message is the cause in one line."""


@dataclass
class CollapseGuard:
    """Judges the successive points of a run's metrics."""

    config: GuardConfig
    points: int = 0
    """How many in a row lay below a floor."""
    idle_points: int = 0
    """How many in a row lay below a floor of learning."""
    cause: str = ""
    """What the last one of them showed."""

    def see(self, values: Mapping[str, float], fraction: float = 1.0) -> None:
        """Take in one point, at a share of the run. NaN, as of a single image, is never below a
        floor."""
        dead = _below(values, self.config.floors)
        is_due = fraction >= self.config.learning_by
        idle = _below(values, self.config.learning_floors) if is_due else ""
        self.points = self.points + 1 if dead and self.config.patience else 0
        self.idle_points = self.idle_points + 1 if idle and self.config.patience else 0
        self.cause = dead or idle

    @property
    def suspects(self) -> bool:
        """Whether the last point lay below a floor: no time to save anything. A run that has
        learned nothing yet loses nothing by being saved."""
        return self.points > 0

    @property
    def collapsed(self) -> bool:
        return max(self.points, self.idle_points) >= max(self.config.patience, 1)

    @property
    def verdict(self) -> str:
        """Why a collapsed run ends."""
        what = "the features have collapsed" if self.points else "nothing is learned"
        return f"{what}: {self.cause}"


def _below(values: Mapping[str, float], floors: Mapping[str, float]) -> str:
    return " and ".join(
        f"{name} is {values[name]:.2g}, below {floor:g}"
        for name, floor in floors.items()
        if values.get(name, torch.inf) < floor
    )
