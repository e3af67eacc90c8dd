"""Measures the training step on one GPU, in stages that gpu_session.sh runs one after the other.

    python benchmarks/gpu_session.py steps --recipe mae --output mae.json
    python benchmarks/gpu_session.py loss --output loss.json
    python benchmarks/gpu_session.py cifar --data cifar10/ --minutes 4 --output cifar.json
    python benchmarks/gpu_session.py table FOLDER          # prints the results in the folder

Needs neither ray, mlflow nor tyro; lightly is compared if it is installed. `--dry` runs the same at
toy size on a CPU, where the figures mean nothing.

`steps` measures, in turns on one batch of noise:

- `platform`: selfray.train.train, eager and compiled, with a batch on the device and with one in
  the host's memory (pinned, and copied while the previous step computes);
- `bare`: the same module in a loop of twenty lines, eager and compiled, to show the platform's
  overhead;
- `lightly`: LightlySSL's modules in a loop like that of its examples (float32), and with bf16.

MFU = (3 x forward FLOPs of trained modules + 1 x those of teachers) x steps/s / the card's dense
bf16 peak. FLOPs are those of matrix products, convolutions and attention in the method's modules,
counted by torch's FlopCounterMode, 2 for each multiply-add. The backward pass counts as two forward
passes; recomputation does not count.
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from selfray.experiment import Experiment
from selfray.losses import nt_xent
from selfray.method import Batch
from selfray.models.encoder import EncoderConfig, normalize
from selfray.schedules import Progress
from selfray.step import compiled, devices
from selfray.train import Step, TrainState, train

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "benchmarks")]

import gpu_peers  # noqa: E402 - neither folder is a package
import steps as small_steps  # noqa: E402
from selfray.recipes import imagenet  # noqa: E402

DENSE_BF16 = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "GH200": 989.4e12}
"""FLOP/s without sparsity, from NVIDIA's data sheets (SXM)."""
FOREVER = 10**12
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Recipe:
    """An experiment to measure, and the number of images in a step."""

    experiment: Experiment
    batch_size: int


def recipes(dry: bool) -> dict[str, Recipe]:
    """The ImageNet recipes with batch sizes for a card of 80 GB, or toy versions for a dry run."""
    found = {
        "mae": Recipe(imagenet.MAE, 512),
        "dino": Recipe(imagenet.DINO, 128),
        "simclr": Recipe(imagenet.SIMCLR, 256),
    }
    return {name: _toy(recipe) for name, recipe in found.items()} if dry else found


def _toy(recipe: Recipe) -> Recipe:
    encoder = recipe.experiment.encoder
    small = (
        EncoderConfig("vit_tiny_patch16_224", 32, patch_size=8, width=48, depth=2, heads=2)
        if encoder.is_vit
        else EncoderConfig("resnet18", 32, layers=(1, 1, 1, 1), channels=(8, 16, 16, 16))
    )
    if encoder.position == "sincos":
        small = replace(small, position="sincos")
    changes = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    changes |= {"prototypes": 64, "hidden": 32, "bottleneck": 16, "local_crops": 2}
    names = vars(recipe.experiment.method)
    changes = {name: value for name, value in changes.items() if name in names}
    if "local_view" in names:
        changes["local_view"] = replace(names["local_view"], size=16)
    method = replace(recipe.experiment.method, **changes)
    return Recipe(replace(recipe.experiment, encoder=small, method=method), 8)


# Steps


class Enough(Exception):  # noqa: N818 - a signal, not an error
    """Ends the training loop."""


@dataclass
class Clock:
    """Times steps in a window that starts after the warm-up and ends when the device has
    finished."""

    device: torch.device
    seconds: float
    steps: int = 0
    started: float = 0.0

    def tick(self) -> bool:
        """Count a step. Returns whether the window is over."""
        self.steps += 1
        if self.steps == WARM_UP_STEPS:
            wait(self.device)
            self.started = time.perf_counter()
        # The host runs ahead of the device; to wait in every step would slow the loop.
        if self.steps > WARM_UP_STEPS and (self.steps - WARM_UP_STEPS) % 8 == 0:
            wait(self.device)
            return time.perf_counter() - self.started > self.seconds
        return False

    @property
    def rate(self) -> float:
        """Steps per second."""
        return (self.steps - WARM_UP_STEPS) / (time.perf_counter() - self.started)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def platform_turn(
    state: TrainState, wanted: Experiment, batch: Batch, device: torch.device, seconds: float
) -> float:
    """Steps per second of the platform's loop."""
    clock = Clock(device, seconds)
    rate = 0.0

    def on_step(step: Step) -> None:
        nonlocal rate
        if clock.tick():
            rate = clock.rate
            raise Enough

    def endless() -> Iterator[Batch]:
        while True:
            yield batch

    with contextlib.suppress(Enough):
        train(state, endless(), wanted, on_step, device)
    return rate


def bare_turn(
    state: TrainState, wanted: Experiment, batch: Batch, device: torch.device, seconds: float
) -> float:
    """Steps per second of the same module, optimizer and batch in a minimal loop."""
    method, optimizer = state.method.train(), state.optimizer
    settings = wanted.optimizer
    progress = Progress(0, FOREVER, 0)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 1e-6, 0.05
    clock = Clock(device, seconds)
    while True:
        ready = {
            name: normalize(values, wanted.data.mean, wanted.data.std)
            if name in wanted.views
            else values
            for name, values in batch.items()
        }
        with torch.autocast(device.type, torch.bfloat16):
            loss, _ = method(ready, progress)
        loss.backward()
        if settings.clip_norm is not None:
            gradients = [p.grad for p in method.parameters() if p.grad is not None]
            norms = torch._foreach_norm(gradients)
            torch._foreach_mul_(
                gradients, [(settings.clip_norm / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(progress)
        if clock.tick():
            return clock.rate


def flops_of(state: TrainState, batch: Batch, wanted: Experiment) -> float:
    """FLOPs of a step, by the formula in the module's docstring."""
    method = state.method
    ready = {
        name: normalize(values, wanted.data.mean, wanted.data.std)
        if name in wanted.views
        else values
        for name, values in batch.items()
    }
    counter = FlopCounterMode(display=False)
    with (
        torch.compiler.set_stance("force_eager"),
        torch.no_grad(),
        counter,
        torch.autocast(batch["global"].device.type, torch.bfloat16),
    ):
        method(ready, Progress(0, FOREVER, 0))
    method.zero_grad(set_to_none=True)
    _forget(method)
    counts = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    frozen = {
        name
        for name, child in method.named_children()
        if not any(p.requires_grad for p in child.parameters())
    }
    kind = type(method).__name__
    teachers = sum(counts.get(f"{kind}.{name}", 0) for name in frozen)
    return 3.0 * (counts["Global"] - teachers) + teachers


def _forget(method: torch.nn.Module) -> None:
    """Clear the state that forward leaves for after_step, which does not follow here."""
    for module in method.modules():
        for name in ("_seen", "_embedded"):
            if isinstance(getattr(module, name, None), list):
                getattr(module, name).clear()


def measure_steps(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cpu" if arguments.dry else "cuda")
    recipe = recipes(arguments.dry)[arguments.recipe]
    batch_size = arguments.batch_size or recipe.batch_size
    wanted = replace(
        recipe.experiment, batch_size=batch_size, precision="bf16", data=recipe.experiment.data
    )
    devices.settle(device, "bf16")
    result: dict[str, Any] = {
        "recipe": arguments.recipe,
        "encoder": wanted.encoder.name,
        "batch_size": batch_size,
        **machine(device),
        "rows": [],
    }
    batch = small_steps.batch_of(wanted.views, batch_size, device.type)
    host = {name: values.cpu() for name, values in batch.items()}
    batch = devices.with_hidden_places(batch)

    def save() -> None:
        Path(arguments.output).write_text(json.dumps(result, indent=1))

    save()
    _measure_platform(wanted, batch, host, result, arguments, device)
    save()
    free(device)
    _measure_peers(wanted, result, arguments, device)
    save()
    # Last, since compilation may take long; a dry run skips it, as it takes minutes on a CPU.
    if not arguments.dry:
        _measure_platform(replace(wanted, compile=True), batch, host, result, arguments, device)
    save()
    return result


def _measure_peers(
    wanted: Experiment,
    result: dict[str, Any],
    arguments: argparse.Namespace,
    device: torch.device,
) -> None:
    for name, build in gpu_peers.loops(arguments.recipe, wanted, wanted.batch_size, device).items():
        try:
            turn = {name: partial(peer_turn, build(), device, arguments.seconds)}
        except ImportError as error:
            result["rows"].append({"name": name, "failure": f"not installed: {error}"})
            return
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            result["rows"].append({"name": name, "failure": str(error)[:300]})
            continue
        measure(turn, "", result, device, arguments.turns, wanted.batch_size)
        Path(arguments.output).write_text(json.dumps(result, indent=1))
        del turn
        free(device)


def _measure_platform(
    run: Experiment,
    batch: Batch,
    host: Batch,
    result: dict[str, Any],
    arguments: argparse.Namespace,
    device: torch.device,
) -> None:
    """Add the rows of the platform's loop and of the bare loop, both with the same module."""
    state = TrainState.start(run, FOREVER, device)
    if run.compile:
        compiled.in_place(state.method, device)
    else:
        result["flops_per_step"] = flops_of(state, batch, run)
    turns = {
        "platform": partial(platform_turn, state, run, batch, device, arguments.seconds),
        "bare": partial(bare_turn, state, run, batch, device, arguments.seconds),
        "platform, from the host": partial(
            platform_turn, state, run, host, device, arguments.seconds
        ),
    }
    kind = "compiled" if run.compile else "eager"
    measure(turns, f"{kind} bf16", result, device, arguments.turns, run.batch_size)


def peer_turn(one_step: Callable[[], None], device: torch.device, seconds: float) -> float:
    clock = Clock(device, seconds)
    while True:
        one_step()
        if clock.tick():
            return clock.rate


def measure(
    turns: dict[str, Callable[[], float]],
    kind: str,
    result: dict[str, Any],
    device: torch.device,
    count: int,
    batch_size: int,
) -> None:
    """Run the turns alternately, `count` times each, and add a row for each to the result, with the
    cause if it failed."""
    rates: dict[str, list[float]] = {name: [] for name in turns}
    peaks: dict[str, int] = {}
    failures: dict[str, str] = {}
    for _ in range(count):
        for name, turn in turns.items():
            if name in failures:
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            try:
                rates[name].append(turn())
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                failures[name] = f"{type(error).__name__}: {str(error)[:300]}"
                continue
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated(device)
    for name in turns:
        row: dict[str, Any] = {"name": f"{name} {kind}".strip()}
        if name in failures:
            row["failure"] = failures[name]
        else:
            middle = statistics.median(rates[name])
            row |= {"steps_per_second": middle, "images_per_second": middle * batch_size}
            row |= {"turns": rates[name], "peak_bytes": peaks.get(name)}
            peak = peak_flops(device)
            if peak and "lightly" not in name:
                row["mfu"] = result["flops_per_step"] * middle / peak
            if name.startswith("platform") and "bare" in rates and rates["bare"]:
                ratios = [
                    ours / bare for ours, bare in zip(rates[name], rates["bare"], strict=False)
                ]
                row["to_bare"] = statistics.median(ratios)
        result["rows"].append(row)
        print(json.dumps(row), flush=True)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def machine(device: torch.device) -> dict[str, Any]:
    known = {"torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        known["device"] = torch.cuda.get_device_name(device)
        known["peak_flops"] = peak_flops(device)
    return known


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s from the data sheet; None for a device that is not in DENSE_BF16."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in DENSE_BF16.items() if known in name), None)


# The loss


def plain_nt_xent(values: Tensor, temperature: float) -> Tensor:
    """NT-Xent of embeddings [B, 2, D] with the logits of all pairs in memory at once."""
    flat = F.normalize(values.flatten(0, 1), dim=-1)
    logits = flat @ flat.T / temperature
    places = torch.arange(len(flat), device=flat.device)
    logits = logits.masked_fill(F.one_hot(places, len(flat)).bool(), float("-inf"))
    return F.cross_entropy(logits, places ^ 1)


def measure_loss(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure time and memory of NT-Xent, forward and backward, against the number of images."""
    device = torch.device("cpu" if arguments.dry else "cuda")
    result: dict[str, Any] = {**machine(device), "rows": []}
    losses = {
        "blocked": lambda values: nt_xent(values, values, 0, 0.1),
        "plain": lambda values: plain_nt_xent(values, 0.1),
    }
    for images in (64, 128) if arguments.dry else (512, 4096, 8192, 16_384, 32_768):
        values = torch.randn(images, 2, 128, device=device).requires_grad_()
        for name, loss in losses.items():
            row: dict[str, Any] = {"name": name, "images": images}
            try:
                row |= cost_of(lambda loss=loss, values=values: loss(values).backward(), device)
            except torch.OutOfMemoryError:
                row["failure"] = "out of memory"
            values.grad = None
            free(device)
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            Path(arguments.output).write_text(json.dumps(result, indent=1))
    return result


def cost_of(compute: Callable[[], None], device: torch.device) -> dict[str, Any]:
    compute()
    wait(device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    times = []
    for _ in range(3):
        started = time.perf_counter()
        compute()
        wait(device)
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else None
    return {"seconds": statistics.median(times), "extra_bytes": peak}


# Large batches on one card


def measure_batches(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure SimCLR at growing batches: whole, with gradient caching, with recomputed blocks."""
    device = torch.device("cpu" if arguments.dry else "cuda")
    base = recipes(arguments.dry)["simclr"].experiment
    vit = recipes(arguments.dry)["dino"].experiment.encoder
    base = replace(base, encoder=replace(vit, drop_path=0.0), precision="bf16")
    result: dict[str, Any] = {**machine(device), "encoder": base.encoder.name, "rows": []}
    sizes = (8, 16) if arguments.dry else (512, 1024, 4096)
    for batch_size in sizes:
        for name, parts, recompute in (
            ("whole", 1, False),
            ("recompute", 1, True),
            ("cached", max(2, batch_size // (4 if arguments.dry else 256)), False),
        ):
            encoder = replace(base.encoder, recompute=recompute)
            run = replace(base, encoder=encoder, batch_size=batch_size, accumulate=parts)
            row: dict[str, Any] = {"name": name, "batch_size": batch_size, "accumulate": parts}
            try:
                row |= a_few_steps(run, device)
            except torch.OutOfMemoryError as error:
                row["failure"] = str(error)[:400]
            free(device)
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            Path(arguments.output).write_text(json.dumps(result, indent=1))
    return result


def a_few_steps(run: Experiment, device: torch.device) -> dict[str, Any]:
    state = TrainState.start(run, FOREVER, device)
    batch = small_steps.batch_of(run.views, run.batch_size // run.accumulate, device.type)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []

    def on_step(step: Step) -> None:
        wait(device)
        times.append(time.perf_counter())
        if len(times) == 4:
            raise Enough

    def endless() -> Iterator[Batch]:
        while True:
            # Copies, like the new tensors of a real stream.
            yield {name: values.clone() for name, values in batch.items()}

    with contextlib.suppress(Enough):
        train(state, endless(), run, on_step, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    return {"images_per_second": run.batch_size / seconds, "peak_bytes": peak}


# CIFAR-10


def train_cifar(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from cifar10_gpu import Benchmark, run

    settings = Benchmark(
        data=arguments.data,
        methods=("simclr",),
        epochs=1 if arguments.dry else 800,
        batch_size=arguments.batch_size or 256,
        encoder="small" if arguments.dry else "resnet18",
        compile=not arguments.dry,
        limit=512 if arguments.dry else None,
        probes=4,
        fit_minutes=arguments.minutes,
        # A limit in case the trial was too optimistic; the trial's own time comes before it.
        minutes=arguments.minutes if arguments.dry else max(0.1, arguments.minutes - 0.7),
        optimizer="lightly",
        output=Path(arguments.output).with_suffix(""),
    )
    results = run(settings)
    Path(arguments.output).write_text(json.dumps(results, indent=1))
    return results


# The table


def show(folder: Path) -> None:
    """Print each stage's result as a Markdown table."""
    for file in sorted(folder.glob("*.json")):
        found = json.loads(file.read_text())
        print(f"\n### {file.stem}\n")
        if isinstance(found, list):  # cifar
            print("| method | epochs | kNN, ours | kNN, theirs | LightlySSL | images/s |")
            print("|---|---|---|---|---|---|")
            for run in found:
                last = run["probes"][max(run["probes"], key=int)] if run["probes"] else {}
                rate = statistics.median(run["rates"]) if run["rates"] else 0.0
                print(
                    f"| {run['method']} | {run['epochs']} | {last.get('ours', 0):.1%} | "
                    f"{last.get('theirs', 0):.1%} | {run['lightly_knn']:.1%} | {rate:,.0f} |"
                )
            continue
        head = {name: value for name, value in found.items() if name != "rows"}
        print(", ".join(f"{name} {value}" for name, value in head.items()) + "\n")
        names = list(dict.fromkeys(name for row in found["rows"] for name in row))
        names = [name for name in names if name != "turns"]
        print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
        for row in found["rows"]:
            print("| " + " | ".join(_shown(name, row.get(name)) for name in names) + " |")


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.endswith("bytes"):
        return f"{value / 2**30:.2f} GiB"
    if name in ("mfu", "to_bare"):
        return f"{value:.3f}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    for name, stage in STAGES.items():
        sub = stages.add_parser(name)
        sub.set_defaults(run=stage)
        sub.add_argument("--output", required=True)
        sub.add_argument("--dry", action="store_true")
        sub.add_argument("--batch-size", type=int)
        if name == "steps":
            sub.add_argument("--recipe", choices=("mae", "dino", "simclr"), required=True)
            sub.add_argument("--seconds", type=float, default=2.0)
            sub.add_argument("--turns", type=int, default=2)
        if name == "cifar":
            sub.add_argument("--data", required=True)
            sub.add_argument("--minutes", type=float, default=4.0)
    table = stages.add_parser("table")
    table.add_argument("folder", type=Path)
    table.set_defaults(run=lambda arguments: show(arguments.folder))
    arguments = parser.parse_args()
    arguments.run(arguments)


STAGES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "steps": measure_steps,
    "loss": measure_loss,
    "batches": measure_batches,
    "cifar": train_cifar,
}

if __name__ == "__main__":
    main()
