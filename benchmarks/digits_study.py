"""Measures a code change's effect on accuracy: the same runs and seeds on several checkouts.

    python benchmarks/digits_study.py --source before=../old after=. --seeds 3 --jobs 16
    python benchmarks/digits_study.py --studies cifar10 --data cifar10/ --device cuda
    python benchmarks/digits_study.py --studies leak --seeds 3
    python benchmarks/digits_study.py --methods beit --seeds 2 --epochs 2       # a quick trial

There are three studies. They use the core alone (neither ray nor mlflow nor tyro), with one
single-threaded process for each run:

    digits   the nine digits recipes, unchanged; BEiT trains its tokenizer first
    cifar10  SimCLR, BYOL, MoCo v2, DINO and MAE at one small setting, each seeing the same images;
             on a CPU the ResNets have half the channels
    leak     MoCo v2 on digits, with batch norm over the whole batch and over shuffled groups of it

Every run is judged by kNN and by the linear probe, before and after training, and writes its own
JSON file when it is done, with losses and metrics over time. After each run, results.json and
table.md in the output folder are updated, with the cause of each failed run. The same command,
given again, resumes: runs whose file is in the output folder are not repeated.

A checkout is a folder with `platform/` and `experiments/`; older ones, with all modules in the
package's root, work as well. CIFAR-10 is read from a folder of Parquet files.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

DIGITS = ("simclr", "mae", "byol", "mocov1", "mocov2", "mocov3", "dino", "beit", "dinov2")
CIFAR10 = ("simclr", "byol", "mocov2", "dino", "mae")
ARMS: dict[str, dict[str, Any]] = {"whole batch": {}, "8 groups": {"method.batchnorm_groups": 8}}
"""Arms of the leak study -> their changes to the recipe."""
SLOWEST_FIRST = ("beit", "dinov2", "dino", "byol", "simclr", "mocov3", "mocov2", "mocov1", "mae")
WARM_UP = "warm-up"
"""The run that compiles a checkout's augmentation; the runs on digits wait for it."""
POINTS = 40
"""Number of points of the loss and the metrics that a run stores."""
TEST_DIGITS = 597
"""The same number of test images, and the same images, as in the platform's probes."""


@dataclass(frozen=True)
class Job:
    """One run."""

    study: str
    source: str
    root: str
    method: str
    seed: int
    output: str
    device: str
    precision: str
    arm: str = ""
    images: str = ""
    """Folder of .npy files with the decoded images of CIFAR-10."""
    epochs: int | None = None
    limit: int | None = None

    @property
    def name(self) -> str:
        parts = [self.study, self.source, self.method, self.arm.replace(" ", "-"), str(self.seed)]
        return "-".join(part for part in parts if part)

    @property
    def file(self) -> Path:
        return Path(self.output) / "runs" / f"{self.name}.json"


def main() -> int:
    if sys.argv[1:2] == ["--job"]:
        return run_job(Job(**json.loads(sys.argv[2])))
    settings = parse()
    output = Path(settings.output).absolute()
    (output / "runs").mkdir(parents=True, exist_ok=True)
    jobs = plan(settings, output)
    run_all(jobs, settings.jobs, 60 * settings.minutes, output)
    results = collect(jobs, output)
    print(table(results))
    return 1 if any(result["failure"] for result in results) else 0


def parse() -> argparse.Namespace:
    here = str(Path(__file__).resolve().parent.parent)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--source", nargs="+", default=[f"here={here}"], metavar="NAME=FOLDER", help="checkouts")
    add("--studies", nargs="+", default=["digits"], choices=["digits", "cifar10", "leak"])
    add("--methods", nargs="+", help="only these methods")
    add("--seeds", type=int, default=3, help="runs of each method, with seeds 0, 1, ...")
    add("--cifar-seeds", type=int, default=1, help="the same for CIFAR-10")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    add("--device", default="cpu", help="cpu or cuda, for the runs on CIFAR-10")
    add("--digits-device", default="cpu", help="cpu or cuda; one GPU can run many")
    add(
        "--precision", default="float32", choices=["float32", "bf16"], help="not for ViTs on digits"
    )
    add("--epochs", type=int, help="of runs on digits; default: the recipe's")
    add("--cifar-epochs", type=int, default=10)
    add("--data", default="", help="folder of CIFAR-10's Parquet files")
    add("--limit", type=int, help="maximum number of CIFAR-10's train and of its test images")
    add("--minutes", type=float, default=60.0, help="unfinished runs are stopped after this time")
    add("--output", default="runs/study")
    settings = parser.parse_args()
    if "cifar10" in settings.studies and not settings.data:
        parser.error("--data is missing: give a folder of CIFAR-10's Parquet files")
    for source in settings.source:
        name, _, folder = source.partition("=")
        if not name or not (Path(folder) / "platform" / "selfray").is_dir():
            parser.error(f"--source {source}: give NAME=FOLDER, a checkout with platform/selfray")
    unknown = set(settings.methods or ()) - set(DIGITS)
    if unknown:
        parser.error(f"--methods: there is no {', '.join(unknown)}; there are {', '.join(DIGITS)}")
    return settings


# Which runs


def plan(settings: argparse.Namespace, output: Path) -> list[Job]:
    """All runs, ordered by seed, and within a seed the slowest first."""
    images = str(output / "cifar10")
    if "cifar10" in settings.studies:
        decode_cifar10(Path(settings.data), Path(images))
    jobs = []
    for source in settings.source:
        name, _, folder = source.partition("=")
        common: dict[str, Any] = {
            "source": name,
            "root": str(Path(folder).absolute()),
            "output": str(output),
            "device": settings.digits_device,
            "precision": settings.precision,
        }
        small = common | {
            "device": settings.device,
            "images": images,
            "epochs": settings.cifar_epochs,
            "limit": settings.limit,
        }
        if set(settings.studies) - {"cifar10"}:
            jobs.append(Job(WARM_UP, method="mae", seed=0, **common))
        for seed in range(settings.seeds if "digits" in settings.studies else 0):
            jobs += [
                Job("digits", method=method, seed=seed, epochs=settings.epochs, **common)
                for method in DIGITS
            ]
        for seed in range(settings.cifar_seeds if "cifar10" in settings.studies else 0):
            jobs += [Job("cifar10", method=m, seed=seed, **small) for m in CIFAR10]
        # Only the last checkout: batch norms of older ones have no groups.
        if "leak" in settings.studies and source == settings.source[-1]:
            for seed in range(settings.seeds):
                jobs += [
                    Job("leak", method="mocov2", seed=seed, arm=a, epochs=settings.epochs, **common)
                    for a in ARMS
                ]
    if settings.methods:
        jobs = [job for job in jobs if job.study == WARM_UP or job.method in settings.methods]
    return sorted(
        jobs,
        key=lambda job: (job.study != WARM_UP, job.seed, SLOWEST_FIRST.index(job.method)),
    )


def decode_cifar10(data: Path, folder: Path) -> None:
    """Decode every image once and store uint8 [n, 3, 32, 32] and int64 [n] for train and test."""
    import cv2
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        if (folder / f"{part}-labels.npy").exists():
            continue
        files = sorted(data.glob(f"{part}-*.parquet"))
        if not files:
            raise SystemExit(f"--data {data} holds no {part}-*.parquet")
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        encoded = (np.frombuffer(row["image"]["bytes"], np.uint8) for row in rows)
        pixels = [np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)) for data in encoded]
        images = np.stack(pixels)[..., ::-1].transpose(0, 3, 1, 2)  # BGR [n, H, W, 3] -> RGB
        np.save(folder / f"{part}-images.npy", np.ascontiguousarray(images))
        np.save(folder / f"{part}-labels.npy", np.array([row["label"] for row in rows]))


# The processes


def run_all(jobs: Sequence[Job], at_a_time: int, seconds: float, output: Path) -> None:
    """Run each job in its own process, `at_a_time` concurrently, until the time is over."""
    waiting = [job for job in jobs if not job.file.exists()]
    running: dict[Job, subprocess.Popen[bytes]] = {}
    started, done = time.monotonic(), len(jobs) - len(waiting)
    try:
        while (waiting or running) and time.monotonic() - started < seconds:
            cold = {j.source for j in [*waiting, *running] if j.study == WARM_UP}
            ready = [j for j in waiting if j.study != "digits" or j.source not in cold]
            for job in ready[: at_a_time - len(running)]:
                waiting.remove(job)
                running[job] = start(job)
            for job, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                done += 1
                if not job.file.exists():
                    write(job, {"failure": f"its process ended with code {process.returncode}"})
                result = json.loads(job.file.read_text())
                print(
                    f"[{done} of {len(jobs)}, {time.monotonic() - started:.0f} s] {job.name}: "
                    f"{result['failure'] or summary(result)}",
                    flush=True,
                )
                collect(jobs, output)
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    for job in [*running, *waiting]:
        print(f"{job.name}: not finished in time")


def start(job: Job) -> "subprocess.Popen[bytes]":
    one_thread = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
    )
    # Without PYTHONPATH, so that the process imports only its own checkout.
    environment = {**os.environ, **one_thread, "PYTHONPATH": ""}
    command = [sys.executable, __file__, "--job", json.dumps(asdict(job))]
    log = Path(job.output) / "runs" / f"{job.name}.log"
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def summary(result: dict[str, Any]) -> str:
    if "knn" not in result:
        return f"{result['seconds']:.0f} s"
    return (
        f"kNN {result['knn']:.1%}, linear {result['linear']:.1%}, loss {result['loss']:.3f}, "
        f"{result['seconds']:.0f} s"
    )


def write(job: Job, result: dict[str, Any]) -> None:
    """Write the run's file atomically."""
    partial = job.file.with_suffix(".partial")
    partial.write_text(json.dumps({**asdict(job), "failure": None, **result}, indent=1))
    partial.replace(job.file)


# One run, in its own process


def run_job(job: Job) -> int:
    started = time.perf_counter()
    # At the front, so that the checkout takes precedence over an installed selfray.
    sys.path[:0] = [f"{job.root}/platform", f"{job.root}/experiments"]
    try:
        import torch

        torch.set_num_threads(1)
        result = cifar10_run(job) if job.study == "cifar10" else digits_run(job)
    except Exception as error:  # the other runs continue, and the table shows the cause
        traceback.print_exc()
        lines = str(error).splitlines() or [""]
        write(job, {"failure": f"{type(error).__name__}: {lines[0]}"})
        return 1
    write(job, {"seconds": time.perf_counter() - started, **result})
    return 0


def moved(*names: str) -> Any:
    """A module of the checkout, by its present or a former name."""
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise ModuleNotFoundError(f"this checkout has none of {', '.join(names)}")


@dataclass(frozen=True)
class Images:
    """Labelled images of one part of a data set."""

    views: np.ndarray
    """The views for probes, uint8 [n, 3, size, size]."""
    labels: np.ndarray


def digits_run(job: Job) -> dict[str, Any]:
    import torch

    from selfray import config

    recipes = moved("selfray.recipes.digits", "recipes.digits").RECIPES
    augment = moved("selfray.pixels.augment", "selfray.augment")
    codecs = moved("selfray.pixels.codecs", "selfray.images")
    encoded, labels = digits_as_png()
    order = np.random.default_rng(0).permutation(len(encoded))
    parts = {"train": order[TEST_DIGITS:], "test": order[:TEST_DIGITS]}

    def adjusted(name: str) -> Any:
        recipe = recipes[name]
        # As in the platform's own comparison, only ResNets may train in bf16.
        precision = job.precision if recipe.encoder.is_resnet else "float32"
        epochs = min(job.epochs or recipe.epochs, recipe.epochs)
        changed = replace(recipe, seed=job.seed, precision=precision, epochs=epochs)
        return config.override(changed, **ARMS[job.arm]) if job.arm else changed

    def stream(experiment: Any) -> Iterator[Any]:
        training = [encoded[i] for i in parts["train"]]
        reading = plan_of(experiment, len(training))
        for position in range(0, reading.total_images, reading.batch_size):
            chosen = reading.read(position, reading.batch_size)
            quantiles = {
                name: reading.quantiles(chosen.positions, len(group))
                for name, group in experiment.views.items()
                if any(view.mask is not None for view in group)
            }
            batch = [training[row] for row in chosen.rows]
            drawn = augment.augment_batch(
                batch, experiment.views, experiment.seed, chosen.epoch, quantiles
            )
            yield {name: torch.from_numpy(values) for name, values in drawn.arrays.items()}

    def seen(part: str, size: int) -> Images:
        views = [augment.evaluation_view(codecs.decode(encoded[i]), size) for i in parts[part]]
        return Images(np.stack(views).transpose(0, 3, 1, 2).copy(), labels[parts[part]])

    if job.study == WARM_UP:
        for _ in zip(range(2), stream(adjusted("simclr-digits")), strict=False):
            pass
        return {}
    experiment = adjusted(f"{job.method}-digits")
    if job.method == "beit":
        experiment = with_tokenizer(experiment, adjusted("tokenizer-digits"), stream, job)
    size = experiment.encoder.image_size
    images = plan_of(experiment, len(parts["train"])).total_images
    return train_and_probe(
        experiment, stream(experiment), images, seen("train", size), seen("test", size), job.device
    )


def digits_as_png() -> tuple[list[bytes], np.ndarray]:
    """The digits as PNG files, as in the platform's embedded data set, and their labels int64
    [n]."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    encoded = []
    for values in digits.images:  # [8, 8] in 0..16
        file = io.BytesIO()
        Image.fromarray((values * (255 / 16)).round().astype(np.uint8)).save(file, format="PNG")
        encoded.append(file.getvalue())
    return encoded, digits.target.astype(np.int64)


def with_tokenizer(experiment: Any, tokenizer: Any, stream: Any, job: Job) -> Any:
    """BEiT's experiment with a tokenizer, which is trained here by the same checkout and seed."""
    from selfray.storage import Location
    from selfray.train import TrainState, train

    checkpoint = moved("selfray.runs.checkpoint", "selfray.checkpoint")
    images = plan_of(tokenizer, len(digits_as_png()[0]) - TEST_DIGITS).total_images
    state = TrainState.start(tokenizer, images, job.device)
    losses: list[Any] = []
    train(state, stream(tokenizer), tokenizer, lambda step: losses.append(step.loss), job.device)
    folder = Path(job.output) / "runs" / f"{job.name}-tokenizer"
    checkpoint.save(state, tokenizer, Location.of(folder), loss=float(losses[-1]))
    return replace(experiment, method=replace(experiment.method, tokenizer=str(folder)))


def cifar10_run(job: Job) -> dict[str, Any]:
    import torch

    device_augment = moved("selfray.pixels.device", "selfray.device_augment")
    experiment = small_setting(job)
    folder = Path(job.images)
    pixels, labels = (np.load(folder / f"train-{what}.npy") for what in ("images", "labels"))
    pixels, labels = pixels[: job.limit], labels[: job.limit]
    test, test_labels = (np.load(folder / f"test-{what}.npy") for what in ("images", "labels"))
    test, test_labels = test[: job.limit], test_labels[: job.limit]
    reading = plan_of(experiment, len(pixels))
    on_device = torch.from_numpy(pixels).to(job.device)
    # Views are drawn on the device, their masks on the host.
    views = {
        name: tuple(replace(view, mask=None) for view in group)
        for name, group in experiment.views.items()
    }

    def stream() -> Iterator[Any]:
        for position in range(0, reading.total_images, reading.batch_size):
            chosen = reading.read(position, reading.batch_size)
            places = torch.from_numpy(chosen.rows).to(job.device)
            batch = device_augment.augment(
                on_device[places], places, views, experiment.seed, chosen.epoch
            )
            yield batch | masks(experiment, position)

    judged = Images(pixels, labels), Images(test, test_labels)
    return train_and_probe(experiment, stream(), reading.total_images, *judged, job.device)


def masks(experiment: Any, position: int) -> dict[str, Any]:
    import torch

    rng = np.random.default_rng((experiment.seed, position))
    drawn = {}
    for name, group in experiment.views.items():
        if any(view.mask is not None for view in group):
            rows = [
                [view.mask.draw(rng, view.grid) for view in group]
                for _ in range(experiment.batch_size)
            ]
            drawn[f"{name}_mask"] = torch.from_numpy(np.array(rows))  # [B, V, N]
    return drawn


def small_setting(job: Job) -> Any:
    """The method's CIFAR-10 recipe with a small encoder and schedules for a short run."""
    from selfray.schedules import Constant, Cosine, WarmupCosine

    recipe = moved("selfray.recipes.cifar10", "recipes.cifar10").RECIPES[f"{job.method}-cifar10"]
    method, encoder = recipe.method, recipe.encoder
    if encoder.is_resnet:
        width = 32 if job.device.startswith("cuda") else 16  # on one core a run takes minutes
        encoder = replace(
            encoder, layers=(1, 1, 1, 1), channels=(width, 2 * width, 4 * width, 8 * width)
        )
    else:
        encoder = replace(encoder, depth=6)
    # The recipes' teachers change too slowly for a short run: they are meant for 1000 epochs.
    if job.method == "mocov2":
        method = replace(method, queue_size=4096, momentum=Constant(0.99))
    if job.method == "byol":
        method = replace(method, momentum=Cosine(0.98, 1.0), projector_hidden=1024)
    if job.method == "dino":
        method = replace(
            method, momentum=Cosine(0.99, 1.0), prototypes=1024, teacher_temperature=Constant(0.04)
        )
    optimizer = replace(recipe.optimizer, schedule=WarmupCosine(warmup_fraction=0.1))
    if job.method == "mae":
        optimizer = replace(optimizer, base_learning_rate=1e-3)
    return replace(
        recipe,
        method=method,
        encoder=encoder,
        optimizer=optimizer,
        epochs=job.epochs,
        batch_size=256,
        precision=job.precision,
        seed=job.seed,
    )


def plan_of(experiment: Any, images: int) -> Any:
    """One window over all images: every epoch is a permutation of the whole data set."""
    ReadPlan = moved("selfray.data.plan", "selfray.plan").ReadPlan  # noqa: N806 - a class
    count = (images,)
    return ReadPlan(count, experiment.batch_size, experiment.epochs, experiment.seed, images)


def train_and_probe(
    experiment: Any,
    batches: Iterator[Any],
    total_images: int,
    train_images: Images,
    test_images: Images,
    device: str,
) -> dict[str, Any]:
    """Train and probe. Returns accuracies in 0..1, and POINTS points of the loss and the
    metrics."""
    from selfray import config
    from selfray.train import TrainState, train

    state = TrainState.start(experiment, total_images, device)
    data = experiment.data
    untrained = probed(state.method, experiment, train_images, test_images)
    steps = total_images // experiment.batch_size
    points: list[dict[str, float]] = []
    began = time.perf_counter()

    def on_step(step: Any) -> None:
        number = step.progress.step
        if number % max(1, steps // POINTS) and not step.progress.finished:
            return
        metrics = {name: float(value) for name, value in step.metrics.items()}
        points.append({"step": number, "loss": float(step.loss), **metrics})
        if not np.isfinite(points[-1]["loss"]):
            raise ArithmeticError(f"the loss is {points[-1]['loss']} at step {number}")

    train(state, batches, experiment, on_step, device)
    trained_seconds = time.perf_counter() - began
    return {
        **probed(state.method, experiment, train_images, test_images),
        "untrained": untrained,
        "loss": statistics.mean(point["loss"] for point in points[-3:]),
        "points": points,
        "steps": steps,
        "train_seconds": trained_seconds,
        "mean": data.mean,
        "experiment": config.to_json(experiment),
    }


def probed(method: Any, experiment: Any, train_images: Images, test: Images) -> dict[str, float]:
    import torch

    from selfray.probes.features import LabelledFeatures, embed, probe

    # Use a copy, so that the method stays in train mode.
    encoder = experiment.encoder.build()
    encoder.load_state_dict(method.encoder.state_dict())
    encoder.to(next(method.parameters()).device).eval()
    data = experiment.data
    width = encoder.width if experiment.encoder.is_vit else None
    parts = []
    with torch.no_grad():
        for images in (train_images, test):
            features = embed(encoder, images.views, data.mean, data.std)
            labels = torch.from_numpy(images.labels)
            parts.append(LabelledFeatures(torch.from_numpy(features), labels, width))
    found = probe(*parts)
    assert found.knn is not None
    assert found.linear is not None
    return {"knn": found.knn, "linear": found.linear}


# The table


def collect(jobs: Sequence[Job], output: Path) -> list[dict[str, Any]]:
    """Write results.json and table.md of the finished runs, and return their results."""
    done = [json.loads(job.file.read_text()) for job in jobs if job.file.exists()]
    results = [result for result in done if result["study"] != WARM_UP]
    (output / "results.json").write_text(json.dumps(results, indent=1))
    (output / "table.md").write_text(table(results))
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """A row for each study, method and checkout: mean and range over seeds, in %."""
    columns = ["study", "method", "code", "seeds"]
    columns += ["kNN, untrained", "kNN", "linear, untrained", "linear", "loss"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in results:
        code = " ".join(part for part in (result["source"], result["arm"]) if part)
        groups.setdefault((result["study"], result["method"], code), []).append(result)
    for (study, method, code), group in sorted(groups.items(), key=_in_order):
        good = [result for result in group if result["failure"] is None]
        cells = [study, method, code, str(len(good))]
        if good:
            cells += [
                spread([result["untrained"]["knn"] for result in good]),
                spread([result["knn"] for result in good]),
                spread([result["untrained"]["linear"] for result in good]),
                spread([result["linear"] for result in good]),
                f"{statistics.mean(result['loss'] for result in good):.3f}",
            ]
        failures = [result["failure"] for result in group if result["failure"]]
        if failures:
            cells += [f"{len(failures)} failed: {failures[0]}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _in_order(item: tuple[tuple[str, str, str], Any]) -> tuple[str, int]:
    study, method, _ = item[0]
    return study, DIGITS.index(method)


def spread(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
