"""Measures optimizer steps per second of every method, at one small setting, in one process.

    python benchmarks/steps.py                  # CPU, batch 64 at 32 pixels
    python benchmarks/steps.py --device cuda --precision bf16

The encoder is a ViT of 4 blocks, width 96, with patches of 4 pixels (64 tokens). Heads are small
and the batch is drawn once, so that the figures show the cost of the methods themselves: the views
that pass through encoder and teacher, and the heads. The methods take turns; the table shows the
median of the turns, their spread, and the ratio to SimCLR in the same run.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from selfray.experiment import DataConfig, Experiment
from selfray.method import Batch, MethodConfig
from selfray.methods.beit import BEiTConfig
from selfray.methods.byol import BYOLConfig
from selfray.methods.dino import DINOConfig
from selfray.methods.dinov2 import DINOv2Config
from selfray.methods.mae import MAEConfig
from selfray.methods.moco import MoCoConfig
from selfray.methods.mocov3 import MoCoV3Config
from selfray.methods.simclr import SimCLRConfig
from selfray.methods.vqvae import VQVAEConfig
from selfray.models.encoder import EncoderConfig
from selfray.optim import OptimizerConfig
from selfray.runs import checkpoint
from selfray.storage import Location
from selfray.train import Step, TrainState, train
from selfray.views import View, Views

ENCODER = EncoderConfig("vit_tiny_patch16_224", 32, patch_size=4, width=96, depth=4, heads=4)
LOCAL = View(size=16, crop_scale=(0.05, 0.4))
SMALL_HEAD: dict[str, Any] = {"prototypes": 1024, "hidden": 256, "bottleneck": 64}


@dataclass(frozen=True)
class Steps:
    """Measure every method's steps per second."""

    batch_size: int = 64
    turns: int = 5
    """Number of measurements of each method, in turn with the others."""
    seconds: float = 3.0
    """Length of a turn."""
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["float32", "bf16"] = "float32"
    threads: int = 1
    """Threads of torch on a CPU."""


def methods(tokenizer: str) -> dict[str, MethodConfig]:
    return {
        "SimCLR": SimCLRConfig(projector_hidden=256),
        "MoCo v2": MoCoConfig(queue_size=4096),
        "MoCo v3": MoCoV3Config(projector_hidden=256, projector_width=64),
        "BYOL": BYOLConfig(projector_hidden=256, projector_width=64),
        "DINO, 2 + 4 crops": DINOConfig(local_crops=4, local_view=LOCAL, **SMALL_HEAD),
        "MAE": MAEConfig(decoder_width=64, decoder_depth=2, decoder_heads=4),
        "VQ-VAE tokenizer": VQVAEConfig(
            codes=512, decoder_width=64, decoder_depth=2, decoder_heads=4
        ),
        "BEiT": BEiTConfig(tokenizer=tokenizer, smallest_block=6),
        "DINOv2, 2 + 4 crops": DINOv2Config(local_crops=4, local_view=LOCAL, **SMALL_HEAD),
    }


def experiment(method: MethodConfig, settings: Steps) -> Experiment:
    return Experiment(
        "steps",
        method,
        ENCODER,
        DataConfig(path="none: the batch is drawn"),
        OptimizerConfig(),
        batch_size=settings.batch_size,
        precision=settings.precision,
    )


def batch_of(views: Views, count: int, device: str) -> Batch:
    """A batch of noise, uint8 [count, V, 3, H, W] for each group of views, and masks as in
    training, bool [count, V, N]."""
    rng = np.random.default_rng(0)
    batch: Batch = {}
    for name, group in views.items():
        size, grid = group[0].size, group[0].grid
        assert size is not None
        shape = (count, len(group), 3, size, size)
        batch[name] = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)).to(device)
        if group[0].mask is not None:
            assert grid is not None
            masks = [
                [view.mask.draw(rng, grid) for view in group if view.mask] for _ in range(count)
            ]
            batch[f"{name}_mask"] = torch.from_numpy(np.array(masks)).to(device)
    return batch


class Enough(Exception):  # noqa: N818 - a signal, not an error
    """Ends the training loop."""


def turn(state: TrainState, wanted: Experiment, batch: Batch, settings: Steps) -> float:
    """Steps per second over one turn, without its first two steps."""
    steps, started = 0, 0.0

    def on_step(step: Step) -> None:
        nonlocal steps, started
        if settings.device == "cuda":
            torch.cuda.synchronize()
        steps += 1
        if steps == 2:
            started = time.perf_counter()
        if steps > 2 and time.perf_counter() - started > settings.seconds:
            raise Enough

    def forever():
        while True:
            yield batch

    with contextlib.suppress(Enough):
        train(state, forever(), wanted, on_step, settings.device)
    return (steps - 2) / (time.perf_counter() - started)


def main() -> None:
    import tyro  # here, because gpu_session.py imports this file on machines without tyro

    settings = tyro.cli(Steps, description=__doc__)
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        wanted = experiment(VQVAEConfig(codes=512), settings)
        checkpoint.save(TrainState.start(wanted, 10**9), wanted, Location.of(folder), loss=0.0)
        runs: dict[str, Callable[[], float]] = {}
        for name, method in methods(folder).items():
            runs[name] = measured(experiment(method, settings), settings)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(settings.turns):
        print(f"turn {number + 1} of {settings.turns}", flush=True)
        for name, run in runs.items():
            rates[name].append(run())
    print(f"\n{'method':22}{'steps/s':>9}{'images/s':>10}{'spread':>9}{'to SimCLR':>11}")
    for name, found in rates.items():
        middle = statistics.median(found)
        ratios = [own / simclr for own, simclr in zip(found, rates["SimCLR"], strict=True)]
        spread = (max(found) - min(found)) / middle
        print(
            f"{name:22}{middle:9.2f}{middle * settings.batch_size:10,.0f}{spread:9.0%}"
            f"{statistics.median(ratios):11.2f}"
        )


def measured(wanted: Experiment, settings: Steps) -> Callable[[], float]:
    """A function that runs one more turn of an experiment."""
    state = TrainState.start(wanted, 10**9, settings.device)
    batch = batch_of(wanted.views, settings.batch_size, settings.device)
    return lambda: turn(state, wanted, batch, settings)


if __name__ == "__main__":
    main()
