"""What several tests share: tiny encoders, tiny experiments, and batches made of nothing.

An image is a function of its position in the run, so a global batch is the same however it is
shared out among ranks and micro-batches.
"""

import atexit
import hashlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from selfray import contract, methods
from selfray.contract import (  # noqa: F401 - for the tests
    PLAIN_SGD,
    RESNET,
    VIT,
    Enough,
    batches,
    differing,
    encoder_for,
    first_move,
    positions,
    prepared,
    relative_error,
    reseeded,
    start,
    train_for,
    weights,
)
from selfray.experiment import Experiment
from selfray.method import MethodConfig
from selfray.methods.mae import MAEConfig
from selfray.methods.simclr import SimCLRConfig
from selfray.methods.vqvae import VQVAEConfig
from selfray.models.encoder import EncoderConfig
from selfray.runs import checkpoint
from selfray.runs.checkpoint import MANIFEST, Checkpoint
from selfray.storage import Location

BEIT = replace(VIT, name="beit_base_patch16_224", position="relative", layer_scale=0.1)
SIMCLR = SimCLRConfig(projector_width=16)
MAE = MAEConfig(decoder_width=32, decoder_depth=1, decoder_heads=2)

Config = TypeVar("Config", bound=MethodConfig)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Files in a folder, made where it is missing."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def wait_for(what: str, found: Callable[[], Any], every: float = 0.1) -> Any:
    """The first true answer, asked for every so many seconds. AssertionError says what did not
    happen, after a time in which it would have on any machine."""
    until = time.monotonic() + 600
    while not (answer := found()):
        assert time.monotonic() < until, f"{what}: not within ten minutes"
        time.sleep(every)
    return answer


def tiny(kind: type[Config]) -> Config:
    """A method's own settings, with its heads made small, and a tokenizer where it needs one."""
    names = {field.name for field in fields(kind)}
    made = contract.tiny(kind)
    return replace(made, tokenizer=tokenizer_run()) if "tokenizer" in names else made


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


def experiment(
    method: MethodConfig = SIMCLR, encoder: EncoderConfig | None = None, **changes: Any
) -> Experiment:
    """A run of a few steps that moves from its first step on (no warm-up)."""
    return contract.experiment(method, encoder, **changes)


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


def forge(found: Checkpoint, name: str, data: bytes) -> None:
    """Replace a file of a checkpoint and make the manifest agree, as an attacker would."""
    (found.location / name).write_bytes(data)
    manifest = json.loads((found.location / MANIFEST).read_bytes())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (found.location / MANIFEST).write_json(manifest)
