"""Settings of fine-tuning: presets of the papers, one for small data, and the experiment of
each."""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

from selfray.check import require, require_number, require_one_of
from selfray.experiment import (
    CheckpointConfig,
    DataConfig,
    Experiment,
    ProbeConfig,
)
from selfray.health import GuardConfig
from selfray.models.encoder import EncoderConfig
from selfray.optim import OptimizerConfig
from selfray.probes.finetune import FineTuneConfig
from selfray.probes.protocol import Protocol
from selfray.schedules import Constant, WarmupCosine
from selfray.views import RGB, View

Preset = Literal["auto", "finetune-mae-vit", "finetune-beit-vit", "finetune-resnet", "small"]
SMALL_DATA = 20_000
"""With fewer train images, `auto` takes the preset for small data."""
NARROW = 192
"""Up to this width of a ViT, the preset for small data has its highest learning rate."""
POLICY = "rand-m9-mstd0.5-inc1"
"""RandAugment of MAE and BEiT, as timm writes it."""


@dataclass(frozen=True)
class FineTuning(Protocol):
    """All weights are trained on labels. The last step is judged, so no image chooses anything."""

    name: ClassVar[str] = "finetune"
    version: ClassVar[int] = 1

    preset: str = "small"
    epochs: int = 50
    batch_size: int = 64
    least_steps: int = 300
    """Least number of steps; with few labels, the number of epochs is raised to reach it."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    base_learning_rate: float = 4e-3
    """Learning rate at a batch of 256; proportional to the batch size."""
    layer_decay: float = 0.75
    """Ratio of a ViT block's learning rate to that of the next block; 1 for training from
    scratch."""
    weight_decay: float = 0.05
    warmup: float = 0.1
    """Share of the run during which the learning rate rises."""
    clip_norm: float | None = None
    drop_path: float = 0.1
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    rand_augment: str = ""
    erase: float = 0.0
    pool: Literal["cls", "mean"] = "mean"
    head_std: float = 0.01
    smallest_crop: float = 0.35
    """Smallest share of an image's area in a crop."""
    flip: float = 0.5
    from_scratch: bool = False
    """Whether it starts from random weights, as the baseline for pretraining."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.epochs > 0, f"--finetune.epochs must be positive, got {self.epochs}")
        require(
            self.batch_size > 1, f"--finetune.batch-size must be at least 2, got {self.batch_size}"
        )
        require_number("--finetune.learning-rate", self.base_learning_rate, above=0)

    def __str__(self) -> str:
        defaults = FineTuning()
        always = ("preset", "epochs", "batch_size", "base_learning_rate", "layer_decay")
        shown = [
            f"{f.name} {getattr(self, f.name)}"
            for f in fields(self)
            if f.name in always or getattr(self, f.name) != getattr(defaults, f.name)
        ]
        return f"{self.id} ({', '.join(shown)})"

    @classmethod
    def of(cls, preset: Preset, encoder: EncoderConfig, images: int) -> "FineTuning":
        """The settings of a preset for an encoder. ValueError if it is for other architectures."""
        require_one_of("--finetune.preset", preset, get_args(Preset))
        if preset == "auto":
            preset = _preset_for(encoder, images)
        wants_vit = preset in ("finetune-mae-vit", "finetune-beit-vit")
        require(
            encoder.is_vit or not wants_vit,
            f"--finetune.preset {preset} is for ViTs, not for {encoder.name}: give finetune-resnet "
            "or small",
        )
        found = _published(preset, encoder)
        if not encoder.is_vit:
            found = replace(found, layer_decay=1.0, pool="cls", drop_path=0.0)
        if encoder.in_channels != RGB:
            found = replace(found, rand_augment="")
        return found

    def as_baseline(self) -> "FineTuning":
        """The settings for the same network and number of steps from random weights."""
        return replace(self, from_scratch=True, layer_decay=1.0)

    def experiment(
        self,
        encoder: EncoderConfig,
        data: DataConfig,
        labels: tuple[int, ...],
        images: int,
        run: "Placing",
        init_from: str | None,
    ) -> Experiment:
        """The experiment that fine-tunes `encoder`.

        Args:
            encoder: its architecture.
            data: the labelled images.
            labels: the label of each class, in ascending order.
            images: the number of labelled images.
            run: output folder, workers and precision.
            init_from: file with the encoder's weights; None for random weights.

        Raises:
            ValueError: there are too few images for the workers.
        """
        batch_size = self._batch_size(images, run.workers)
        steps = images // batch_size
        epochs = max(self.epochs, -(-self.least_steps // steps))
        decay = self.layer_decay if encoder.is_vit else 1.0
        return Experiment(
            name="from-scratch" if self.from_scratch else self.name,
            method=FineTuneConfig(
                labels,
                self.pool,
                self.smoothing,
                self.mixup,
                self.cutmix,
                self.erase,
                self.head_std,
                View(
                    crop_scale=(self.smallest_crop, 1.0),
                    flip=self.flip,
                    rand_augment=self.rand_augment,
                ),
            ),
            encoder=replace(encoder, drop_path=self.drop_path, drop_path_uniform=False),
            data=data,
            optimizer=OptimizerConfig(
                self.optimizer,
                self.base_learning_rate,
                schedule=WarmupCosine(self.warmup),
                weight_decay=Constant(self.weight_decay),
                clip_norm=self.clip_norm,
                layer_decay=decay,
            ),
            epochs=epochs,
            batch_size=batch_size,
            seed=self.seed,
            init_from=init_from,
            **run.fields,
        )

    def _batch_size(self, images: int, workers: int) -> int:
        """The preset's batch size, or less for few images, rounded to a multiple of the workers."""
        most = min(self.batch_size, images) // workers * workers
        require(
            most > 0,
            f"{images} labelled images are too few for --finetune.workers {workers}: give fewer",
        )
        return most


@dataclass(frozen=True)
class Placing:
    """Output folder, number of workers and precision of a fine-tuning."""

    output: str
    workers: int = 1
    precision: Literal["float32", "tf32", "bf16"] = "float32"

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of an Experiment that learns from labels: placement, no probes, no collapse guard,
        since features of a class may converge. Weights that are not finite still end the run."""
        return {
            "precision": self.precision,
            "probe": ProbeConfig(times=0),
            "checkpoint": CheckpointConfig(times=4, keep=1),
            "guard": GuardConfig(patience=0),
            "workers": self.workers,
            "output": self.output,
        }


def _preset_for(encoder: EncoderConfig, images: int) -> Preset:
    if images < SMALL_DATA:
        return "small"
    if encoder.is_beit:
        return "finetune-beit-vit"
    return "finetune-mae-vit" if encoder.is_vit else "finetune-resnet"


def _published(preset: str, encoder: EncoderConfig) -> FineTuning:
    if preset == "small":
        if not encoder.is_vit:
            return FineTuning()
        # Wider networks need a lower rate: 0.001 at ViT-B, 0.004 up to the width of ViT-Ti.
        rate = FineTuning.base_learning_rate * min(1.0, NARROW / _width(encoder))
        return FineTuning(base_learning_rate=rate)
    if preset == "finetune-resnet":
        # SimCLR (arXiv:2002.05709, appendix B.5): 0.05 * B / 256, no decay, no warm-up, only crops
        # and flips; but momentum without Nesterov's term.
        return FineTuning(
            preset,
            epochs=60,
            batch_size=4096,
            optimizer="sgd",
            base_learning_rate=0.05,
            layer_decay=1.0,
            weight_decay=0.0,
            warmup=0.0,
            drop_path=0.0,
            smoothing=0.0,
            smallest_crop=0.08,
        )
    large, huge = _width(encoder) >= 1024, _width(encoder) >= 1280
    shared = FineTuning(
        preset,
        batch_size=1024,
        mixup=0.8,
        cutmix=1.0,
        rand_augment=POLICY,
        erase=0.25,
        pool="mean",
        head_std=2e-5,
        smallest_crop=0.08,
    )
    if preset == "finetune-beit-vit":  # BEiT (arXiv:2106.08254, appendix H); rates at B 1024
        return replace(
            shared,
            epochs=50 if large else 100,
            base_learning_rate=(1e-3 if large else 4e-3) / 4,
            layer_decay=0.75 if large else 0.65,
            warmup=0.1 if large else 0.2,
            drop_path=0.2 if large else 0.1,
        )
    return replace(  # MAE (arXiv:2111.06377, table 9)
        shared,
        epochs=50 if large else 100,
        base_learning_rate=1e-3 if large else 5e-4,
        layer_decay=0.75 if large else 0.65,
        warmup=0.1 if large else 0.05,
        drop_path=0.3 if huge else 0.2 if large else 0.1,
    )


def _width(encoder: EncoderConfig) -> int:
    import torch

    if encoder.width is not None:
        return encoder.width
    with torch.device("meta"):
        return encoder.build().width
