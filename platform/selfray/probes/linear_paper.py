"""The linear evaluation of the papers: trains many linear layers at once on augmented views.

DINOv2's grid (arXiv:2304.07193, appendix B.3) varies the learning rate and the input: the class
token of the last block or of the last four, with or without the mean patch token. MAE's version
(arXiv:2111.06377, appendix A.1) uses LARS and a batch norm without affine before the layer.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from selfray.check import require, require_number, require_one_of
from selfray.distributed import GlobalBatchNorm
from selfray.experiment import DataConfig, Experiment
from selfray.method import Batch, Method, MethodConfig, fitted
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.optim import OptimizerConfig
from selfray.probes.embedding import LAYERS, last_layers
from selfray.probes.finetune import LABEL, require_classes, targets_of
from selfray.probes.finetuning import SMALL_DATA, Placing
from selfray.probes.protocol import Protocol
from selfray.schedules import Constant, Progress, WarmupCosine
from selfray.views import View, Views

DINOV2_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1)
"""At a batch of 256 images (DINOv2's evaluation)."""
LARS_RATES = (0.64, 2.0, 6.4, 20.0, 64.0)
"""Around MAE's 6.4, which is 0.1 * 16,384 / 256. They do not scale with the batch size, because a
step of LARS is relative to the weights."""


class Choice(NamedTuple):
    """One linear layer of the grid."""

    layers: int
    """Number of last blocks whose class tokens are its input."""
    patch_mean: bool
    """Whether the mean of the last block's patch tokens is part of its input."""
    rate: float
    """Its learning rate; for SGD, at a batch of 256 images."""


@dataclass(frozen=True)
class LinearPaperConfig(MethodConfig):
    """Linear layers on a frozen encoder, each with its own learning rate and input."""

    labels: tuple[int, ...] = ()
    """The label of each class in the data, in ascending order."""
    rates: tuple[float, ...] = DINOV2_RATES
    """Learning rates, as factors on that of the optimizer."""
    normalize: bool = False
    """Whether a batch norm without affine precedes the linear layers (MAE)."""
    flip: float = 0.5
    smallest_crop: float = 0.08

    def __post_init__(self) -> None:
        require_classes(self.labels)
        require(len(self.rates) > 0, "method.rates must name at least one learning rate")
        for rate in self.rates:
            require_number("method.rates", rate, above=0)

    def views(self, encoder: EncoderConfig) -> Views:
        view = View(crop_scale=(self.smallest_crop, 1.0), flip=self.flip)
        return {"global": (fitted(view, encoder),)}

    def build(self, encoder: Encoder) -> "LinearPaper":
        return LinearPaper(self, encoder)

    def grid(self, encoder: EncoderConfig) -> list[Choice]:
        inputs = [(1, False)]
        if encoder.is_vit:
            inputs = list(itertools.product((1, LAYERS), (False, True)))
        return [Choice(*given, rate) for given in inputs for rate in self.rates]


class LinearPaper(Method):
    """A frozen encoder and the grid's linear layers, which all learn from the same features."""

    def __init__(self, config: LinearPaperConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder.requires_grad_(False)
        self.heads = Grid(encoder.width, len(config.labels), config.grid(encoder.config), config)
        self.register_buffer("known", torch.tensor(config.labels), persistent=False)  # [C]

    def forward(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        targets, has_label = targets_of(batch[LABEL], self.get_buffer("known"))
        self.encoder.eval()
        with torch.no_grad():
            features = tokens(self.encoder, batch["global"][:, 0]).float()  # [B, 5 D] or [B, D]
        logits = self.heads(features)  # [R, B, C]
        each = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.repeat(len(logits)), reduction="none"
        ).view(len(logits), -1)  # [R, B]
        losses = (each * has_label).sum(1) / has_label.sum().clamp(min=1)  # [R]
        # The sum gives each layer the gradient of its own loss, as if it were trained alone.
        return losses.sum(), {"best_loss": losses.min().detach()}

    def rate_of(self, name: str) -> float:
        return self.heads.choices[int(name.split(".")[2])].rate if ".layers." in name else 1.0


class Grid(nn.Module):
    """R linear layers, one for each choice, whose inputs are parts of the features of `tokens`."""

    def __init__(
        self, width: int, classes: int, choices: Sequence[Choice], config: LinearPaperConfig
    ) -> None:
        super().__init__()
        self.choices, self.width = tuple(choices), width
        total = width * (LAYERS + 1 if any(c.patch_mean for c in choices) else 1)
        self.norm: nn.Module = nn.Identity()
        if config.normalize:
            self.norm = GlobalBatchNorm(total, eps=1e-6, affine=False)
        layers = [nn.Linear(width * (c.layers + c.patch_mean), classes) for c in choices]
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [R, n, C] of features [n, 5 D] (of a ResNet [n, D])."""
        features = self.norm(features)
        return torch.stack(
            [
                layer(self._seen(features, choice))
                for layer, choice in zip(self.layers, self.choices, strict=True)
            ]
        )

    def _seen(self, features: Tensor, choice: Choice) -> Tensor:
        if features.shape[1] == self.width:
            return features
        first = (LAYERS - choice.layers) * self.width
        last = (LAYERS + choice.patch_mean) * self.width
        return features[:, first:last]


def tokens(encoder: Encoder, images: Tensor) -> Tensor:
    """Features of normalised images [B, C, H, W]. For a ViT [B, 5 D]: the class tokens of the last
    four blocks, in order, then the mean of the last block's patch tokens, all after the final norm.
    For a ResNet [B, D]: the pooled map."""
    if not encoder.config.is_vit:
        return encoder(images).cls
    require(
        len(encoder.backbone.blocks) >= LAYERS,  # type: ignore[arg-type]
        f"linear-paper needs {LAYERS} blocks, but {encoder.config.name} has "
        f"{len(encoder.backbone.blocks)} here: give --by linear",  # type: ignore[arg-type]
    )
    found = last_layers(encoder, images)
    mean = found[-1][0].mean(1)
    return torch.cat([*(prefix[:, 0] for _, prefix in found), mean], dim=1)


@dataclass(frozen=True)
class LinearOnViews(Protocol):
    """Trains the whole grid at once. The reported layer is chosen on held-out train images, which
    no layer has seen."""

    name: ClassVar[str] = "linear-paper"
    version: ClassVar[int] = 1

    optimizer: Literal["sgd", "lars"] = "sgd"
    """sgd: as in DINOv2. lars: as in MAE."""
    normalize: bool = False
    """Whether a batch norm without affine comes before the layers (MAE)."""
    epochs: int = 10
    batch_size: int = 1024
    least_steps: int = 500
    """Least number of steps; on small data, the number of epochs is raised to reach it."""
    held_out: float = 0.1
    """Share of each class's train images that are held out to choose the layer."""
    flip: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        require_one_of("--linear-paper.optimizer", self.optimizer, ("sgd", "lars"))
        require(self.epochs > 0, f"--linear-paper.epochs must be positive, got {self.epochs}")
        require(
            self.batch_size > 0,
            f"--linear-paper.batch-size must be positive, got {self.batch_size}",
        )

    @property
    def rates(self) -> tuple[float, ...]:
        return DINOV2_RATES if self.optimizer == "sgd" else LARS_RATES

    @classmethod
    def of(cls, method: str | None, images: int) -> "LinearOnViews":
        """As the paper of the method that trained an encoder has it; on small data SGD, since LARS
        is for many steps of large batches: of 500 steps on 1,080 digits it made 56 %."""
        if method not in ("mae", "beit"):
            return cls()
        return cls.lars() if images >= SMALL_DATA else cls(normalize=True)

    @classmethod
    def lars(cls) -> "LinearOnViews":
        """MAE's."""
        return cls("lars", True, epochs=90, batch_size=16_384)

    def experiment(
        self,
        encoder: EncoderConfig,
        data: DataConfig,
        labels: tuple[int, ...],
        images: int,
        run: Placing,
        init_from: str,
    ) -> Experiment:
        """The experiment that trains the grid; `images` is the number of labelled images without
        the held-out ones. The other arguments are those of `FineTuning.experiment`."""
        most = min(self.batch_size, max(1, images // 4)) // run.workers * run.workers
        require(most > 0, f"{images} images are too few for --linear-paper.workers {run.workers}")
        epochs = max(self.epochs, -(-self.least_steps // (images // most)))
        is_lars = self.optimizer == "lars"
        return Experiment(
            name=self.name,
            method=LinearPaperConfig(labels, self.rates, self.normalize, self.flip),
            encoder=replace(encoder, drop_path=0.0, drop_path_uniform=False),
            data=data,
            # 1, since the grid's rates are factors on the optimizer's.
            optimizer=OptimizerConfig(
                self.optimizer,
                1.0,
                "none" if is_lars else "linear",
                schedule=WarmupCosine(10 / 90 if is_lars else 0.0),
                weight_decay=Constant(0.0),
            ),
            epochs=epochs,
            batch_size=most,
            seed=self.seed,
            init_from=init_from,
            **run.fields,
        )
