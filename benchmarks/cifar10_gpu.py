"""Trains ResNet-18 on CIFAR-10 on one GPU with the core alone: imports neither ray nor mlflow.

    python benchmarks/cifar10_gpu.py                       # compares four methods with LightlySSL
    python benchmarks/cifar10_gpu.py --methods byol --epochs 800 --batch-size 512
    python benchmarks/cifar10_gpu.py --minutes 9           # repeat this command until it is done
    python benchmarks/cifar10_gpu.py --throughput          # compile x precision x channels-last
    python benchmarks/cifar10_gpu.py --limit 2000 --epochs 1 --encoder small         # on a CPU

The images are decoded once into the device's memory and augmented there by selfray.pixels.device;
the loop, the checkpoints and the probes are the platform's own. A call resumes from the checkpoints
of the previous one. Tables go to the console, results.json and throughput.json to the output
folder, and result.json to the folder of each run's checkpoints.

LightlySSL's table has ResNet-18, batch 128 and 200 epochs, judged by kNN with k = 200 and
temperature 0.1 at the best epoch. We train the recipes of selfray.recipes.cifar10, with learning
rates scaled to the batch. They differ from LightlySSL's in the optimizer (theirs is SGD at 0.06,
weight decay 5e-4, no warm-up, for all four), the crop's interpolation (bicubic), the strengths of
the colour jitter, and the heads; our MoCo has a longer queue, a higher temperature and an
asymmetric loss; our DINO has 4096 prototypes. We judge the last epoch, by their protocol and by
ours.

No GPU has run the four methods yet, so there are no figures to compare. The last command takes 164
s on two busy CPU cores (89 s on one core); there a killed run ends with bit-identical weights.
"""

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from selfray import config
from selfray.check import require
from selfray.data.files import parquet_files, split_files
from selfray.data.plan import ReadPlan, even_steps
from selfray.data.reader import read_rows, sample_rows
from selfray.data.shard_set import open_shards
from selfray.data.source import evaluation_views
from selfray.experiment import Experiment, ProbeConfig
from selfray.method import Batch, Method
from selfray.pixels.device import BACKEND, DrawView, augment, draw_view
from selfray.probes.features import embed
from selfray.probes.knn import KNN
from selfray.runs import checkpoint
from selfray.schedules import Constant
from selfray.storage import Location
from selfray.train import Step, TrainState, train

LIGHTLY = {"simclr": 84.7, "mocov2": 83.8, "byol": 86.9, "dino": 84.0}
"""kNN in %, batch 128, 200 epochs: docs/source/getting_started/benchmarks.rst of LightlySSL."""
PROTOCOLS = {"ours": KNN(), "theirs": KNN(k=200, temperature=0.1)}
SMALL = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}
WINDOW_SECONDS = 10.0
"""Interval at which the loss is read, which waits for the GPU, and a line is printed."""
WINDOWS = 5
"""Number of windows into which a throughput trial is split, to show the spread."""
WARM_UP_STEPS = 10


@dataclass(frozen=True)
class Benchmark:
    data: str = "../shared/data/cifar10"
    """CIFAR-10 or a similar data set in Parquet: train and test files with labels."""
    methods: tuple[Literal["simclr", "mocov2", "byol", "dino"], ...] = (
        "simclr",
        "mocov2",
        "byol",
        "dino",
    )
    epochs: int = 200
    batch_size: int = 128
    encoder: Literal["resnet18", "small"] = "resnet18"
    """small: four narrow blocks, for a CPU."""
    precision: Literal["float32", "bf16"] | None = None
    """None takes bf16 on a GPU, float32 elsewhere."""
    compile: bool = False
    """torch.compile of encoders and augmentation."""
    seed: int = 0
    limit: int | None = None
    """Maximum number of train images, and of test images."""
    probes: int = 10
    """Number of probes during a run, the last at its end; at most one an epoch."""
    minutes: float | None = None
    """Save and stop after this time, but after at least one step; None trains to the end."""
    fit_minutes: float | None = None
    """Reduce the epochs so that training ends within this time, as estimated by a few seconds of
    training. For one method only."""
    optimizer: Literal["recipe", "lightly"] = "recipe"
    """lightly: SGD at 0.06 for a batch of 128, weight decay 5e-4, as in LightlySSL's table."""
    checkpoint_minutes: float = 5.0
    throughput: bool = False
    """Measure images/s of each method under each setting instead of training."""
    seconds: float = 15.0
    """Time of each throughput trial without warm-up."""
    device: str | None = None
    """None takes a GPU if there is one, else the CPU."""
    output: Path = Path("runs/bench/cifar10_gpu")

    @property
    def where(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def main() -> int:
    import tyro  # gpu_session.py calls `run` on machines without tyro

    settings = tyro.cli(Benchmark, description=__doc__)
    try:
        run(settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(settings: Benchmark) -> list[dict[str, Any]]:
    """The whole benchmark; returns what it writes to results.json or throughput.json."""
    device = settings.where
    print(f"{_name_of(device)}, torch {torch.__version__}, {BACKEND}")
    experiments = {method: experiment_of(settings, method) for method in settings.methods}
    size = next(iter(experiments.values())).encoder.image_size
    images = load(settings.data, settings.limit, size)
    print(f"{len(images.train):,} train and {len(images.test):,} test images of {size} pixels")
    if settings.throughput:
        return measure_throughput(settings, experiments, images, device)
    if settings.fit_minutes is not None:
        settings = replace(settings, epochs=fitting_epochs(settings, experiments, images, device))
        experiments = {method: experiment_of(settings, method) for method in settings.methods}
    deadline = math.inf
    if settings.minutes is not None:
        deadline = time.monotonic() + 60 * settings.minutes
    results = []
    for method, experiment in experiments.items():
        results.append(train_one(settings, method, experiment, images, device, deadline))
        if results[-1]["steps"] < results[-1]["total_steps"]:
            print("the time is over: the same command, given again, resumes from here")
            break
    Location.of(settings.output).make_folder()
    (Location.of(settings.output) / "results.json").write_json(results)
    show(results)
    return results


def experiment_of(settings: Benchmark, method: str) -> Experiment:
    """The method's CIFAR-10 recipe with this benchmark's epochs, batch and precision."""
    from selfray.recipes import cifar10

    recipe = cifar10.RECIPES[f"{method}-cifar10"]
    gpu = settings.where.type == "cuda"
    optimizer = recipe.optimizer
    if settings.optimizer == "lightly":
        optimizer = replace(
            optimizer, name="sgd", base_learning_rate=0.12, weight_decay=Constant(5e-4)
        )
    return replace(
        recipe,
        optimizer=optimizer,
        encoder=replace(recipe.encoder, **(SMALL if settings.encoder == "small" else {})),
        data=replace(recipe.data, path=settings.data),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        precision=settings.precision or ("bf16" if gpu else "float32"),
        compile=settings.compile,
        seed=settings.seed,
        probe=ProbeConfig(times=min(settings.probes, settings.epochs)),
    )


# Images


@dataclass(frozen=True)
class Images:
    """uint8 [n, 3, H, W] and int64 [n], on the host."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def load(path: str, limit: int | None, size: int) -> Images:
    """All images of a folder or pattern of Parquet files, decoded once."""
    files = parquet_files(path)
    require(bool(files), f"--data {path} holds no Parquet file: give a folder of CIFAR-10's")
    train, test = split_files(files, path)
    require(bool(test), f"--data {path} names no test files, such as test-00000.parquet")
    return Images(*_read(train, path, limit, size), *_read(test, path, limit, size))


def _read(
    files: list[str], path: str, limit: int | None, size: int
) -> tuple[np.ndarray, np.ndarray]:
    shards = open_shards(files, path)
    require(shards.has_labels, f"--data {path} has no labels, which kNN needs")
    groups, rows = sample_rows(shards, limit or shards.rows)
    encoded, labels = read_rows(shards, groups, rows)
    views, readable = evaluation_views(encoded, size)
    usable = readable & (labels >= 0)
    return views[usable], labels[usable]


def plan_of(experiment: Experiment, images: Images) -> ReadPlan:
    """One window over all images: every epoch is a permutation of the whole data set."""
    count = len(images.train)
    return ReadPlan((count,), experiment.batch_size, experiment.epochs, experiment.seed, count)


def batches(
    images: Tensor,
    plan: ReadPlan,
    experiment: Experiment,
    images_seen: int,
    draw_view: DrawView = draw_view,
) -> Iterator[Batch]:
    """The run's batches from a position on; each is a function of the seed and its position."""
    for position in range(images_seen, plan.total_images, plan.batch_size):
        chosen = plan.read(position, plan.batch_size)
        places = torch.from_numpy(chosen.rows).to(images.device, non_blocking=True)
        yield augment(images[places], places, experiment.views, plan.seed, chosen.epoch, draw_view)


# Training


class OutOfTime(Exception):  # noqa: N818 - a signal, not an error
    """Ends the training loop when the call's minutes are over."""


@dataclass
class Stopwatch:
    """Measures images/s in windows; a window ends when the device has finished its steps."""

    images_per_step: int
    seconds: float
    """Length of a window."""
    rates: list[float] = field(default_factory=list)
    images: int = 0
    started: float = field(default_factory=time.perf_counter)

    def step(self, loss: Tensor) -> float | None:
        """Count a step. Returns its loss if a window ends here, else None."""
        self.images += self.images_per_step
        if time.perf_counter() - self.started < self.seconds:
            return None
        return self.end(loss)

    def end(self, loss: Tensor) -> float:
        """End the window at this step, even if it is short. Returns the step's loss."""
        value = float(loss)  # waits for the device
        if self.images:
            self.rates.append(self.images / (time.perf_counter() - self.started))
        self.restart()
        return value

    def restart(self) -> None:
        """Start a new window; the time since the last one was not spent on training."""
        self.images, self.started = 0, time.perf_counter()


def train_one(
    settings: Benchmark,
    method: str,
    experiment: Experiment,
    images: Images,
    device: torch.device,
    deadline: float,
) -> dict[str, Any]:
    """Train a method to its end or to the deadline, starting from its checkpoint if there is
    one."""
    plan = plan_of(experiment, images)
    # The folder's name includes the number of images, since another number is another run.
    folder = Location.of(settings.output) / f"{experiment.run_name}-{plan.rows}"
    state = TrainState.start(experiment, plan.total_images, device)
    result: dict[str, Any] = {
        "method": method,
        "encoder": settings.encoder,
        "train_images": plan.rows,
        "batch_size": plan.batch_size,
        "epochs": experiment.epochs,
        "device": _name_of(device),
        "torch": torch.__version__,
        "precision": experiment.precision,
        "compile": settings.compile,
        "augmentation": BACKEND,
        "protocols": {name: str(protocol) for name, protocol in PROTOCOLS.items()},
        "lightly_knn": LIGHTLY[method] / 100,
        "probes": {},
        "rates": [],
        "experiment": config.to_json(experiment),
    }
    found = checkpoint.latest(folder)
    if found is not None:
        state.load_state_dict(found.state())
        earlier = (folder / "result.json").read_json()
        result |= {"probes": earlier["probes"], "rates": earlier["rates"]}
        print(f"{experiment.name}: continuing from step {found.step:,} of {plan.total_steps:,}")
    view_drawer = draw_view
    if settings.compile:
        view_drawer = torch.compile(draw_view, dynamic=False)
    watch = Stopwatch(plan.batch_size, WINDOW_SECONDS, result["rates"])
    warm_step = state.progress.step + WARM_UP_STEPS
    probe_steps = even_steps(plan.total_steps, experiment.probe.times)
    saved_at = time.monotonic()

    def on_step(step: Step) -> None:
        nonlocal saved_at
        number, now = step.progress.step, time.monotonic()
        if number <= warm_step:
            watch.restart()
        elif (loss := watch.step(step.loss)) is not None:
            _require_finite(loss, experiment, number)
            epoch, rate = number / plan.steps_per_epoch, watch.rates[-1]
            print(
                f"{experiment.name}: epoch {epoch:.1f} of {plan.epochs}, loss {loss:.3f}, "
                f"{rate:,.0f} images/s",
                flush=True,
            )
        is_late = now >= deadline
        is_old = now - saved_at >= 60 * settings.checkpoint_minutes
        if not (is_late or is_old or number in probe_steps or step.progress.finished):
            return
        loss = watch.end(step.loss)
        _require_finite(loss, experiment, number)
        if number in probe_steps:
            result["probes"][str(number)] = probe(state.method, experiment, images, device)
        result["steps"], result["total_steps"] = number, plan.total_steps
        # The checkpoint last: if the run stops before it, the next call overwrites the result.
        folder.make_folder()
        (folder / "result.json").write_json(result)
        checkpoint.save(state, experiment, folder, loss)
        checkpoint.retain(folder, keep=2, best_step=None, needed=set())
        saved_at = time.monotonic()
        watch.restart()
        if is_late and not step.progress.finished:
            raise OutOfTime

    on_device = torch.from_numpy(images.train).to(device)
    stream = batches(on_device, plan, experiment, state.progress.images_seen, view_drawer)
    with contextlib.suppress(OutOfTime):
        train(state, stream, experiment, on_step, device)
    return (folder / "result.json").read_json()


def probe(
    method: Method, experiment: Experiment, images: Images, device: torch.device
) -> dict[str, float]:
    """kNN accuracy of the encoder's features by each protocol, in 0..1."""
    # Use a copy: the method's encoder keeps its train mode and is not recompiled for other shapes.
    encoder = experiment.encoder.build().to(device)
    encoder.load_state_dict(method.encoder.state_dict())
    encoder.eval()
    data = experiment.data
    train_features, test_features = (
        torch.from_numpy(embed(encoder, views, data.mean, data.std)).to(device)
        for views in (images.train, images.test)
    )
    train_labels, test_labels = (
        torch.from_numpy(labels).to(device) for labels in (images.train_labels, images.test_labels)
    )
    return {
        name: protocol.accuracy(train_features, train_labels, test_features, test_labels)
        for name, protocol in PROTOCOLS.items()
    }


def _require_finite(loss: float, experiment: Experiment, step: int) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss of {experiment.name} is {loss} at step {step}: give --precision float32, or "
            "a larger --batch-size"
        )


def show(results: list[dict[str, Any]]) -> None:
    """Print the table with LightlySSL's figures; only probed runs have a row."""
    print(f"\n{'':10}{'epoch':>12}{'kNN (20)':>10}{'kNN (200)':>11}{'Lightly':>9}{'images/s':>10}")
    for result in results:
        if not result["probes"]:
            continue
        last = max(result["probes"], key=int)
        numbers = result["probes"][last]
        epoch = int(last) / result["total_steps"] * result["epochs"]
        place = f"{epoch:g} of {result['epochs']}"
        rate = f"{statistics.median(result['rates']):,.0f}" if result["rates"] else "-"
        print(
            f"{result['method']:10}{place:>12}"
            f"{numbers['ours']:10.1%}{numbers['theirs']:11.1%}{result['lightly_knn']:9.1%}"
            f"{rate:>10}"
        )
    print("kNN (k); column Lightly: k = 200, ResNet-18, all images, batch 128, 200 epochs")


# Throughput


def fitting_epochs(
    settings: Benchmark,
    experiments: dict[str, Experiment],
    images: Images,
    device: torch.device,
) -> int:
    """The number of epochs of the only method that fit into `fit_minutes`, with probes and
    checkpoints."""
    require(len(experiments) == 1, "--fit-minutes takes exactly one of --methods")
    assert settings.fit_minutes is not None
    (experiment,) = experiments.values()
    started = time.monotonic()
    long = replace(experiment, epochs=100_000)
    rates = training_rates(long, images, device, settings.compile, True, TRIAL_SECONDS)
    spent = time.monotonic() - started
    # Training reuses the compiled code; probes and checkpoints take a share of the time.
    left = 60 * settings.fit_minutes * (1 - SHARE_OF_PROBES) - spent
    epochs = int(left * statistics.median(rates) / len(images.train))
    print(
        f"{spent:.0f} s of trial at {statistics.median(rates):,.0f} images/s: {epochs} epochs fit"
    )
    return max(1, min(settings.epochs, epochs))


TRIAL_SECONDS = 5.0
SHARE_OF_PROBES = 0.15


def measure_throughput(
    settings: Benchmark,
    experiments: dict[str, Experiment],
    images: Images,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Measure images/s of training under every setting, and of the augmentation alone."""
    trials: list[dict[str, Any]] = []
    print(f"\n{'':10}{'compile':>9}{'precision':>11}{'channels':>10}{'images/s':>10}{'range':>18}")
    for method, base in experiments.items():
        # More epochs than a trial can reach.
        long = replace(base, epochs=100_000)
        for compiled in (False, True):
            rates = _attempt(partial(views_alone, long, images, device, compiled, settings.seconds))
            trials.append(_trial(method, compiled, "views", "alone", rates))
        for compiled, precision, last in product((False, True), ("float32", "bf16"), (False, True)):
            experiment = replace(long, precision=precision)
            measure = partial(training_rates, experiment, images, device, compiled, last)
            rates = _attempt(partial(measure, settings.seconds))
            trials.append(_trial(method, compiled, precision, "last" if last else "first", rates))
        measured = [t for t in trials if t["method"] == method and t["precision"] != "views"]
        best = max(measured, key=lambda trial: trial["images_per_second"] or 0)
        plain = measured[0]["images_per_second"]
        if best["images_per_second"] and plain:
            print(
                f"{method}: best with compile {best['compile']}, {best['precision']}, channels "
                f"{best['channels']}: {best['images_per_second'] / plain:.2f}x the first line"
            )
    Location.of(settings.output).make_folder()
    found = {"device": _name_of(device), "torch": torch.__version__, "trials": trials}
    found |= {"batch_size": settings.batch_size, "encoder": settings.encoder}
    (Location.of(settings.output) / "throughput.json").write_json(found)
    return trials


def _trial(
    method: str, compiled: bool, precision: str, channels: str, rates: list[float] | str
) -> dict[str, Any]:
    """Print a row of the table and return it; `rates` is the error message of a failed trial."""
    head = f"{method:10}{'yes' if compiled else 'no':>9}{precision:>11}{channels:>10}"
    failed = isinstance(rates, str)
    if failed:
        print(f"{head}  failed: {rates}", flush=True)
    else:
        spread = f"{min(rates):,.0f} - {max(rates):,.0f}"
        print(f"{head}{statistics.median(rates):10,.0f}{spread:>18}", flush=True)
    return {
        "method": method,
        "compile": compiled,
        "precision": precision,
        "channels": channels,
        "images_per_second": None if failed else statistics.median(rates),
        "rates": None if failed else rates,
        "failure": rates if failed else None,
    }


def _attempt(measure: Callable[[], list[float]]) -> list[float] | str:
    """A trial's rates, or the error message of one that cannot run here (no compiler, too little
    memory)."""
    try:
        return measure()
    except RuntimeError as error:
        return next(line for line in [*str(error).splitlines(), type(error).__name__] if line)
    finally:
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Enough(Exception):  # noqa: N818 - a signal, not an error
    """Ends the training loop when a trial has all its windows."""


def training_rates(
    experiment: Experiment,
    images: Images,
    device: torch.device,
    compiled: bool,
    channels_last: bool,
    seconds: float,
) -> list[float]:
    """Images/s of the platform's training loop, for each window."""
    plan = plan_of(experiment, images)
    experiment = replace(experiment, compile=compiled)
    state = TrainState.start(experiment, plan.total_images, device)
    if not channels_last:
        state.method.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    drawer = torch.compile(draw_view, dynamic=False) if compiled else draw_view
    watch = Stopwatch(plan.batch_size, seconds / WINDOWS)

    def on_step(step: Step) -> None:
        if step.progress.step <= WARM_UP_STEPS:
            float(step.loss)
            watch.restart()
        elif watch.step(step.loss) is not None and len(watch.rates) == WINDOWS:
            raise Enough

    on_device = torch.from_numpy(images.train).to(device)
    with contextlib.suppress(Enough):
        train(state, batches(on_device, plan, experiment, 0, drawer), experiment, on_step, device)
    return watch.rates


def views_alone(
    experiment: Experiment, images: Images, device: torch.device, compiled: bool, seconds: float
) -> list[float]:
    """Images/s of the augmentation without training, for each window: an upper bound of the
    loop."""
    plan = plan_of(experiment, images)
    drawer = torch.compile(draw_view, dynamic=False) if compiled else draw_view
    stream = batches(torch.from_numpy(images.train).to(device), plan, experiment, 0, drawer)
    watch = Stopwatch(plan.batch_size, seconds / WINDOWS)
    for step, batch in enumerate(stream):
        last_pixel = batch["global"].view(-1)[-1]
        if step < WARM_UP_STEPS:
            float(last_pixel)
            watch.restart()
        elif watch.step(last_pixel) is not None and len(watch.rates) == WINDOWS:
            break
    return watch.rates


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    sys.exit(main())
