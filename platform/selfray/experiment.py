"""Experiment: every choice of a run in one frozen dataclass."""

import hashlib
import json
import math
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal

from selfray import config
from selfray.check import named_amounts, require, require_number, require_one_of
from selfray.data.plan import Share
from selfray.health import GuardConfig
from selfray.limits import require_possible
from selfray.method import MethodConfig, Normalization
from selfray.models.encoder import EncoderConfig
from selfray.optim import OptimizerConfig
from selfray.views import MOST_CHANNELS, RGB, Photometric, Views, check_channels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


AFTER_OPENING = frozenset(
    ("mean", "std", "window_rows", "photometric", "max_broken_fraction", "statistics", "measured")
)
"""Fields of DataConfig that matter only when a data set is open: to its stream and views."""


@dataclass(frozen=True)
class DataConfig:
    path: str = ""
    """Images: a folder of them, a folder of Parquet shards, Hugging Face Parquet files or a
    pattern of them; local, s3:// or gs://. Files or folders named test, validation and the like are
    kept for the probes (docs/layouts.md)."""
    test_path: str | None = None
    """Labelled test images for the probes, if `path` holds no test split."""
    image_column: str | None = None
    """The Parquet column of the images; None finds it."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Channel means of the data, in 0..1: used as a flag, or where no `selfray shards build` has
    measured them, or by a run that starts from other weights, which keep their own."""
    std: tuple[float, ...] = IMAGENET_STD
    """Channel standard deviations of the data, in 0..1, as `mean`."""
    window_rows: int = 65_536
    """Shuffle window: in each epoch this many rows are mixed with one another. With 10^6 rows
    sorted by 1,000 classes, 6 % of the order leaks into batches at 65,536 rows and 23 % at
    16,384."""
    photometric: Photometric = "cpu"
    """Where colours, blur and solarizing are computed: in the data tasks (cpu), or for a whole
    batch at once on the trainer's device, so that data tasks only decode and crop. Both draw the
    same parameters."""
    max_broken_fraction: float = 0.01
    """The run stops when more than this share of the images cannot be read."""
    label_column: str | None = config.added(None)
    """The column of the labels, in Parquet files or in a table beside images; None finds it."""
    channels: int = config.added(3)
    """Channels of the images: 1 for gray, 3 for RGB, up to 16 for multispectral images. With 1,
    colour images are read as gray."""
    statistics: Literal["measured", "given"] = config.added("measured")
    """measured: mean and std as the build of the shards has measured them, where it has. given:
    data.mean and data.std; a flag that sets one of them asks for it."""
    measured: tuple[tuple[float, ...], tuple[float, ...]] | None = config.added(None)
    """What a run has found measured when it started; never given."""
    group_by: str | None = config.added(None)
    """Keep all images of a patient, slide or scene on one side of the held-out split: a Parquet
    column that names it, or a regular expression with a group in parentheses that finds it in the
    images' paths, such as (patient[0-9]+)."""

    def __post_init__(self) -> None:
        require(
            1 <= self.channels <= MOST_CHANNELS,
            f"data.channels must lie in [1, {MOST_CHANNELS}], got {self.channels}",
        )
        for name in ("mean", "std"):
            count = len(getattr(self, name))
            # Those of a recipe are of RGB, and what was measured takes their place.
            require(
                count == self.channels or (count == RGB and self.statistics == "measured"),
                f"data.{name} has {count} values and data.channels is {self.channels}: give "
                f"--data.{name} and as many values, in 0..1",
            )
        require_one_of("data.statistics", self.statistics, ("measured", "given"))
        require(all(s > 0 for s in self.std), f"data.std must be positive, got {self.std}")
        require_one_of("data.photometric", self.photometric, ("cpu", "device"))
        require(self.window_rows > 0, f"data.window_rows must be positive, got {self.window_rows}")
        require(
            0 <= self.max_broken_fraction <= 1,
            f"data.max_broken_fraction must lie in [0, 1], got {self.max_broken_fraction}",
        )

    def opens_as(self, other: "DataConfig") -> bool:
        """Whether both name the same data, read in the same way."""
        return all(
            getattr(self, field.name) == getattr(other, field.name)
            for field in fields(self)
            if field.name not in AFTER_OPENING
        )

    @property
    def normalization(self) -> Normalization:
        """(mean, std) of each channel in 0..1, as a run uses them. ValueError where there are none
        for these channels."""
        if self.measured is not None:
            return self.measured
        require(
            len(self.mean) == len(self.std) == self.channels,
            f"data.mean and data.std are of {len(self.mean)} channels, data.channels is "
            f"{self.channels}, and nothing was measured: make shards with `selfray shards build`, "
            f"or give --data.mean and --data.std with {self.channels} values in 0..1",
        )
        return self.mean, self.std


@dataclass(frozen=True)
class ProbeConfig:
    """When and on how many images the encoder is probed, during training and at its end."""

    times: int = 4
    """Number of probes, evenly spread over the run; the last one is at its end. 0 for none."""
    train_limit: int = 50_000
    """Largest number of labelled train images used."""
    test_limit: int = 10_000
    """Largest number of test images used."""
    every_checkpoint: bool = False
    """Probe every checkpoint that is written, not only `times` of them."""

    def __post_init__(self) -> None:
        require(self.times >= 0, f"probe.times must be at least 0, got {self.times}")


@dataclass(frozen=True)
class CheckpointConfig:
    times: int = 10
    """Number of checkpoints, evenly spread over the run; the last one is at its end."""
    minutes: float = 30.0
    """A checkpoint is also written when the last one is this many minutes old."""
    keep: int = 2
    """The last `keep` checkpoints and the best one are kept; others are removed."""

    def __post_init__(self) -> None:
        require(self.times >= 1, f"checkpoint.times must be at least 1, got {self.times}")
        require(self.minutes > 0, f"checkpoint.minutes must be positive, got {self.minutes}")
        require(self.keep >= 1, f"checkpoint.keep must be at least 1, got {self.keep}")


@dataclass(frozen=True)
class Experiment:
    """All settings of a run: what is trained, on which images, how, and on how many machines.

    The unit of launching, sweeping, logging and loading: every checkpoint and MLflow hold all of
    it. It is never rewritten; values derived from it are properties.
    """

    name: str
    """The recipe's name: the first part of the run's folder."""
    method: MethodConfig
    """The pretraining method: its hyper-parameters and its views of each image."""
    encoder: EncoderConfig
    data: DataConfig
    """The images, and how they are read."""
    optimizer: OptimizerConfig
    """How the weights are updated."""
    epochs: int = 100
    """Passes over the images."""
    batch_size: int = 256
    """Images in one optimizer step, over all workers."""
    accumulate: int = 1
    """Micro-batches into which each worker splits its share of a batch. Loss and gradients are
    those of the whole batch, also for methods that compare images with one another."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """bf16: autocast; weights and losses stay float32. tf32: matrix products with 10 bits of
    mantissa on GPUs that support it; losses stay float32."""
    seed: int = 0
    """Seed of the weights, the views and the order of the images."""
    init_from: str | None = None
    """Weights to start from, with a new optimizer: a checkpoint of the same method and encoder, to
    continue with another data set or image size; or public weights of an encoder, timm:NAME or a
    .safetensors or .pth file (DINO, DINOv2, DINOv3, MAE, MoCo, BEiT, torchvision, timm)."""
    init_share: float = config.added(0.95)
    """Smallest share of the encoder's weights that public weights must provide; 0 accepts any
    share."""
    warm_up_head: float = config.added(0.0)
    """Share of the run, at its start, in which only the method's heads are trained and the encoder
    is frozen: gradients of new heads would damage a pretrained encoder."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written and how many are kept."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """When a run is stopped because its features have collapsed."""

    workers: int | str = 1
    """Train workers: one process each, on one GPU or CPU. A range such as 1:4 is elastic: the run
    uses as many as the cluster has room for, at the same global batch."""
    gpus_per_worker: float | None = None
    """GPUs of each train worker; None takes one if the cluster has GPUs, else none."""
    cpus_per_worker: float | None = None
    """CPUs reserved for each train worker; None takes one, or less on a small machine."""
    worker_resources: str = ""
    """Further Ray resources that each train worker's node must have: trainer=1 for nodes started
    with that resource, accelerator_type:A100=0.001 for a type of GPU."""
    data_cpus: float | None = None
    """CPUs that decode and augment; None takes all that the train workers leave free."""
    output: str = "runs"
    """Folder for everything that is written; local, s3:// or gs://. In a Ray job, a relative path
    lies under ~/selfray of the machine that runs the job."""
    max_failures: int = 3
    """How many times a run is restarted from its last checkpoint after its workers die."""
    log_every: int = 10
    """Steps between two points of the metrics."""
    compile: bool = config.added(False)
    """Compile encoders and heads with torch.compile: steps are faster after about a minute."""
    shard: Literal["none", "fsdp"] = config.added("none")
    """fsdp: each worker holds a shard of weights, gradients and optimizer state (FSDP2), for ViTs
    too large for one GPU. Checkpoints are the same."""

    log_model: bool = config.added(True)
    """At the end of `selfray pretrain`, log the encoder to MLflow as a model with its signature."""

    PLACEMENT: ClassVar[frozenset[str]] = config.PLACEMENT
    """Fields that say where and how a run is carried out, not what it computes. They may change
    when a run is resumed."""

    def __post_init__(self) -> None:
        require(self.epochs > 0, f"epochs must be positive, got {self.epochs}")
        require(
            self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0"),
            f"name must be a folder's name without slashes, got {self.name!r}",
        )
        require(self.batch_size > 0, f"batch_size must be positive, got {self.batch_size}")
        require(self.min_workers > 0, f"workers must be at least 1, got {self.workers}")
        require(self.accumulate > 0, f"accumulate must be at least 1, got {self.accumulate}")
        require(self.log_every > 0, f"log_every must be at least 1, got {self.log_every}")
        require(self.max_failures >= 0, f"max_failures must be at least 0, got {self.max_failures}")
        require(
            self.gpus_per_worker is None or self.gpus_per_worker >= 0,
            f"gpus_per_worker must be at least 0, got {self.gpus_per_worker}",
        )
        require(
            self.cpus_per_worker is None or self.cpus_per_worker > 0,
            f"cpus_per_worker must be positive, got {self.cpus_per_worker}",
        )
        require_number("init_share", self.init_share, least=0, most=1)
        require_number("warm_up_head", self.warm_up_head, least=0, below=1)
        named_amounts("worker_resources", self.worker_resources)
        require_one_of("shard", self.shard, ("none", "fsdp"))
        if self.shard == "fsdp":
            require(
                self.encoder.is_vit,
                f"shard fsdp gathers the blocks of a ViT one by one, so it is not for "
                f"encoder.name {self.encoder.name}: leave --shard out",
            )
            require(
                self.min_workers > 1,
                f"shard fsdp splits the weights among workers, but workers is {self.workers}: "
                "give --workers 2 or more, or leave --shard out",
            )
        require_one_of("precision", self.precision, ("float32", "tf32", "bf16"))
        require(0 <= self.seed < 2**31, f"seed must lie in [0, 2**31), got {self.seed}")
        reason = self.why_not_accumulate
        if self.accumulate > 1 and reason:
            raise ValueError(
                f"accumulate {self.accumulate} would change the loss of {self.method.name}: "
                f"{reason}; give --accumulate 1 and more --workers, or a smaller --batch-size"
            )
        for name in ("layer_decay", "patch_embed_rate"):
            require(
                self.encoder.is_vit or getattr(self.optimizer, name) == 1,
                f"optimizer.{name} is for ViTs, not for encoder.name {self.encoder.name}",
            )
        require_possible(self)
        self.method.check_batch_size(self.batch_size)
        self._check_workers()
        # self.views, below, raises for an encoder that the method cannot use.
        require(
            self.encoder.in_channels == self.data.channels,
            f"encoder.in_channels {self.encoder.in_channels} is not data.channels "
            f"{self.data.channels}: give --encoder.in-channels {self.data.channels}",
        )
        check_channels(self.views, self.data.channels)
        for name, group in self.views.items():
            sizes = sorted({view.size or 0 for view in group})
            require(
                len(sizes) == 1,
                f"the {name} views have {' and '.join(map(str, sizes))} pixels: give them one size",
            )

    def _check_workers(self) -> None:
        least, most = self.min_workers, self.max_workers
        if not self.is_elastic:
            Share(0, most, self.accumulate).micro_batch(self.batch_size)
            return
        require(least <= most, f"workers {self.workers} must be a range such as 1:4")
        parts = [size * self.accumulate for size in (least, most)]
        possible = [n for n in range(1, 2 * most + 1) if self._divides_among(n)]
        require(
            self._divides_among(least) and self._divides_among(most),
            f"workers {self.workers}: batch_size {self.batch_size} does not divide into both "
            f"{parts[0]} and {parts[1]} parts: give bounds from "
            f"{', '.join(map(str, possible)) or 'none'}, or another --batch-size",
        )

    def _divides_among(self, workers: int) -> bool:
        return self.batch_size % (workers * self.accumulate) == 0

    @property
    def why_not_accumulate(self) -> str | None:
        """Why micro-batches would change the loss; None if they do not."""
        encoder = self.encoder
        if self.method.why_not_accumulate is None and encoder.is_resnet and encoder.norm == "batch":
            return (
                f"the batch norms of {encoder.name} would see micro-batches, which --encoder.norm "
                "ghost accepts and --encoder.norm group avoids"
            )
        return self.method.why_not_accumulate

    @property
    def caches_gradients(self) -> bool:
        """Whether a step's micro-batches go through the loss together (selfray.step)."""
        return self.accumulate > 1 and self.method.compares

    @property
    def is_elastic(self) -> bool:
        return ":" in str(self.workers)

    @property
    def min_workers(self) -> int:
        return _bounds(self.workers)[0]

    @property
    def max_workers(self) -> int:
        return _bounds(self.workers)[1]

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """The possible numbers of workers: those that divide the global batch."""
        sizes = range(self.min_workers, self.max_workers + 1)
        return tuple(size for size in sizes if self._divides_among(size))

    def shared_by(self, workers: int) -> "Experiment":
        """The experiment as carried out by this many workers, at the same global batch.

        With fewer workers than an elastic run's maximum, each has more images. If the method allows
        it, they are split into more micro-batches, so that a micro-batch never needs more memory
        than at the maximum.
        """
        accumulate = self.accumulate
        # Ghost norms' statistics would change with the number of workers.
        exact = self.why_not_accumulate is None and self.encoder.norm != "ghost"
        if self.is_elastic and exact:
            accumulate = math.ceil(self.max_workers * self.accumulate / workers)
            while self.batch_size % (workers * accumulate):
                accumulate += 1
        return replace(self, workers=workers, accumulate=accumulate)

    @property
    def views(self) -> Views:
        return self.method.views(self.encoder)

    @property
    def identity(self) -> str:
        """Eight hex characters that differ if two experiments compute different things."""
        written = config.to_json(self)
        computed = {
            f.name: written[f.name]
            for f in fields(self)
            if f.name not in self.PLACEMENT and f.name in written
        }
        # `recompute` changes how the encoder is computed, not its result.
        computed["encoder"] = {k: v for k, v in computed["encoder"].items() if k != "recompute"}
        # It follows from the data.
        computed["data"] = {k: v for k, v in computed["data"].items() if k != "measured"}
        text = json.dumps(computed, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def run_name(self) -> str:
        """The name of the run's folder under `output`; the same command gives the same name."""
        return f"{self.name}-{self.identity}"


def _bounds(workers: int | str) -> tuple[int, int]:
    """(fewest, most) of a number or a range such as 1:4."""
    first, _, last = str(workers).partition(":")
    try:
        return int(first), int(last or first)
    except ValueError:
        raise ValueError(
            f"workers must be a number such as 4, or a range such as 1:4, got {workers}"
        ) from None
