"""What several tests share: tiny encoders, tiny experiments, and batches made of nothing.

An image is a function of its position in the run, so a global batch is the same however it is
shared out among ranks and micro-batches.
"""

import atexit
import contextlib
import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from selfray import methods
from selfray.data.plan import Share
from selfray.experiment import DataConfig, Experiment
from selfray.method import Batch, MethodConfig
from selfray.methods.mae import MAEConfig
from selfray.methods.simclr import SimCLRConfig
from selfray.methods.vqvae import VQVAEConfig
from selfray.models.encoder import EncoderConfig, normalize
from selfray.optim import OptimizerConfig
from selfray.runs import checkpoint
from selfray.runs.checkpoint import MANIFEST, Checkpoint
from selfray.schedules import Constant, WarmupCosine
from selfray.storage import Location
from selfray.train import Step, TrainState, train
from selfray.views import View

RESNET = EncoderConfig(
    "resnet18", image_size=16, small_stem=True, layers=(1, 1, 1, 1), channels=(8, 16, 16, 16)
)
VIT = EncoderConfig(
    "vit_tiny_patch16_224",
    image_size=16,
    patch_size=4,
    width=32,
    depth=2,
    heads=2,
    position="sincos",
)
BEIT = replace(VIT, name="beit_base_patch16_224", position="relative", layer_scale=0.1)
SIMCLR = SimCLRConfig(projector_width=16)
MAE = MAEConfig(decoder_width=32, decoder_depth=1, decoder_heads=2)

Config = TypeVar("Config", bound=MethodConfig)

SMALLER: dict[str, Any] = {
    "decoder_width": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "projector_hidden": 32,
    "projector_width": 16,
    "queue_size": 24,
    "prototypes": 24,
    "patch_prototypes": 20,
    "hidden": 32,
    "bottleneck": 16,
    "local_crops": 2,
    "local_view": View(size=8, crop_scale=(0.05, 0.4)),
    "codes": 16,
    "code_width": 8,
}
"""What the contract tests change in a method's config where it has such a field, to be fast. A
new method with a large head adds the head's field here."""


def wait_for(what: str, found: Callable[[], Any], every: float = 0.1) -> Any:
    """The first true answer, asked for every so many seconds. AssertionError says what did not
    happen, after a time in which it would have on any machine."""
    until = time.monotonic() + 600
    while not (answer := found()):
        assert time.monotonic() < until, f"{what}: not within ten minutes"
        time.sleep(every)
    return answer


def tiny(kind: type[Config]) -> Config:
    """A method's own settings, with its heads made small."""
    names = {field.name for field in fields(kind)}
    smaller = {name: value for name, value in SMALLER.items() if name in names}
    if "tokenizer" in names:
        smaller["tokenizer"] = tokenizer_run()
    return kind(**smaller)


@lru_cache
def tokenizer_run() -> str:
    """The run folder of a tokenizer after some steps, the same in every process."""
    folder = os.path.join(tempfile.gettempdir(), f"selfray-tokenizer-{os.getpid()}")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    wanted = experiment(tiny(VQVAEConfig), VIT)
    state = start(wanted)
    train_for(state, wanted, 3)
    checkpoint.save(state, wanted, Location.of(folder), loss=1.0)
    return folder


def all_methods() -> list[MethodConfig]:
    """A tiny config of every method that has a file in methods/."""
    found = []
    for info in pkgutil.iter_modules(methods.__path__, f"{methods.__name__}."):
        module = importlib.import_module(info.name)
        kinds = [
            kind
            for _, kind in inspect.getmembers(module, inspect.isclass)
            if issubclass(kind, MethodConfig) and kind.__module__ == info.name
        ]
        assert len(kinds) == 1, f"{info.name} holds {len(kinds)} configs of methods, not one"
        found.append(tiny(kinds[0]))
    return found


def encoder_for(method: MethodConfig) -> EncoderConfig:
    """The tiny ResNet, or the tiny ViT for a method that needs one."""
    try:
        method.views(RESNET)
    except ValueError:
        return VIT
    return RESNET


def experiment(
    method: MethodConfig = SIMCLR, encoder: EncoderConfig | None = None, **changes: Any
) -> Experiment:
    """A run of a few steps that moves from its first step on (no warm-up)."""
    settings: dict[str, Any] = {
        "optimizer": OptimizerConfig(
            "adamw",
            base_learning_rate=1e-3,
            scaling="none",
            schedule=WarmupCosine(warmup_fraction=0.0, final=1.0),
            weight_decay=Constant(0.01),
        ),
        "data": DataConfig(path="nowhere"),
        "batch_size": 8,
    }
    return Experiment("test", method, encoder or encoder_for(method), **{**settings, **changes})


PLAIN_SGD = OptimizerConfig(
    "sgd",
    base_learning_rate=1.0,
    scaling="none",
    schedule=WarmupCosine(warmup_fraction=0.0, final=1.0),
    weight_decay=Constant(0.0),
    momentum=0.0,
)
"""Weights move by exactly the gradient."""


def positions(start: int, count: int, wanted: Experiment) -> Batch:
    """The images at positions [start, start + count) as the data path gives them: uint8."""
    columns: dict[str, list[np.ndarray]] = {}
    for position in range(start, start + count):
        rng = np.random.default_rng((17, position))
        for name, group in wanted.views.items():
            images, masks = _draw(rng, group)
            columns.setdefault(name, []).append(images)
            if masks is not None:
                columns.setdefault(f"{name}_mask", []).append(masks)
    batch = {name: torch.from_numpy(np.stack(values)) for name, values in columns.items()}
    return batch | {"label": torch.arange(start, start + count) % 3}


def _draw(
    rng: np.random.Generator, group: tuple[View, ...]
) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 [V, 3, size, size], bool [V, N]: one coarse picture, with other noise in each view."""
    size = group[0].size
    assert size is not None
    coarse = rng.integers(20, 236, (3, 4, 4))
    picture = coarse.repeat(-(-size // 4), 1).repeat(-(-size // 4), 2)[:, :size, :size]
    images = np.stack([picture + rng.integers(-20, 20, picture.shape) for _ in group])
    masks = [view.mask.draw(rng, view.grid or 0) for view in group if view.mask is not None]
    return images.astype(np.uint8), np.stack(masks) if masks else None


def batches(
    wanted: Experiment, first_step: int = 0, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """One rank's micro-batches from a step on, without end."""
    share = Share(rank, ranks, wanted.accumulate)
    size = share.micro_batch(wanted.batch_size)
    position = first_step * wanted.batch_size + rank * wanted.accumulate * size
    while True:
        for micro_batch in range(wanted.accumulate):
            yield positions(position + micro_batch * size, size, wanted)
        position += wanted.batch_size


def prepared(batch: Batch, wanted: Experiment) -> Batch:
    """A batch as a method sees it: views as float, normalised."""
    return {
        name: normalize(values, wanted.data.mean, wanted.data.std)
        if name in wanted.views
        else values
        for name, values in batch.items()
    }


class Enough(Exception):  # noqa: N818 - it is no error
    """Raised by on_step to leave the loop."""


def train_for(
    state: TrainState, wanted: Experiment, steps: int, data: Iterator[Batch] | None = None
) -> list[Step]:
    """Some steps of a run that goes on, from where its state stands."""
    told: list[Step] = []

    def on_step(step: Step) -> None:
        told.append(step)
        if len(told) == steps:
            raise Enough

    with contextlib.suppress(Enough):
        train(state, data or batches(wanted, state.progress.step), wanted, on_step)
    return told


def start(wanted: Experiment, steps: int = 100) -> TrainState:
    """The first state of a run of 100 steps, the same for the same seed."""
    return TrainState.start(wanted, steps * wanted.batch_size)


def weights(state: TrainState) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in state.method.state_dict().items()}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """The names under which two sets of tensors differ in any bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, and |found| where nothing was expected."""
    norm = expected.double().norm()
    error = (found.double() - expected.double()).norm()
    return float((error / norm if norm > 0 else error).detach())


def forge(found: Checkpoint, name: str, data: bytes) -> None:
    """Replace a file of a checkpoint and make the manifest agree, as an attacker would."""
    (found.location / name).write_bytes(data)
    manifest = json.loads((found.location / MANIFEST).read_bytes())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (found.location / MANIFEST).write_json(manifest)


def reseeded(wanted: Experiment) -> Experiment:
    """The same experiment from other first weights."""
    return replace(wanted, seed=wanted.seed + 1)
