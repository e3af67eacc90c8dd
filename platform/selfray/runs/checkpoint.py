"""TrainState <-> a folder of files, and the encoder out of one.

    checkpoints/step-00001200/
        encoder.safetensors     the encoder under timm's names: all that a user takes home
        state.safetensors       every tensor of the TrainState
        state.json              the rest of it, with the tensors' places
        experiment.json         the Experiment
        MANIFEST.json           sizes and sha256 of the others; written last

A folder without a manifest, or whose files differ from it, is not a checkpoint: a crash or a full
disk in the middle of writing leaves the ones before it as they were. Nothing is unpickled.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from selfray import config
from selfray.experiment import Experiment
from selfray.models.encoder import Encoder, export_weights, import_weights
from selfray.runs.folder import BEST, CHECKPOINTS
from selfray.storage import Location
from selfray.train import TrainState

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole, readable checkpoint; `verify` looks at every byte."""

    location: Location
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Location) -> "Checkpoint":
        """A checkpoint's folder, or a run's folder, whose newest whole checkpoint is meant.

        FileNotFoundError or ValueError names the path and says what is there instead.
        """
        location = Location.of(path)
        if not location.exists():
            raise FileNotFoundError(f"there is no checkpoint at {location}")
        if (location / MANIFEST).exists():
            return cls(location, _read_manifest(location))
        newest = latest(location)
        if newest is None:
            raise ValueError(
                f"{location} is no checkpoint: it has no {MANIFEST}, and no whole checkpoint lies "
                f"under it; give a run's folder or one of its {CHECKPOINTS}/step-*"
            )
        return newest

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def images_seen(self) -> int:
        return int(self.manifest["images_seen"])

    @property
    def digest(self) -> str:
        """sha256 of its state's tensors, in hex: which weights these are."""
        return self.manifest["files"]["state.safetensors"]["sha256"]

    def read(self, name: str) -> bytes:
        """One file, compared with the manifest. ValueError where it differs."""
        try:
            data = (self.location / name).read_bytes()
        except FileNotFoundError:
            raise ValueError(f"{self.location / name} is missing from the checkpoint") from None
        expected = self.manifest["files"].get(name, {})
        if hashlib.sha256(data).hexdigest() != expected.get("sha256"):
            raise ValueError(
                f"{self.location / name} is damaged: its sha256 is not the manifest's; use an "
                "earlier checkpoint"
            )
        return data

    def experiment(self) -> Experiment:
        experiment = config.loads(self.read("experiment.json"))
        if not isinstance(experiment, Experiment):
            raise ValueError(f"{self.location}/experiment.json holds no Experiment")
        return experiment

    def encoder(self) -> Encoder:
        """The pretrained encoder, in eval mode on the CPU."""
        encoder = self.experiment().encoder.build()
        import_weights(encoder, _tensors(self, "encoder.safetensors"))
        return encoder.eval()

    def state(self) -> dict[str, Any]:
        """What TrainState.load_state_dict takes."""
        return _join(json.loads(self.read("state.json")), _tensors(self, "state.safetensors"))


def save(state: TrainState, experiment: Experiment, run: Location, loss: float) -> Checkpoint:
    """Write a checkpoint into a run's folder; OSError leaves nothing of it behind."""
    location = run / CHECKPOINTS / f"step-{state.progress.step:08d}"
    tensors: dict[str, Tensor] = {}
    skeleton = _split(state.state_dict(), "", tensors)
    files = {
        "encoder.safetensors": safetensors.torch.save(export_weights(state.method.encoder)),
        "state.safetensors": safetensors.torch.save(tensors),
        "state.json": json.dumps(skeleton).encode(),
        "experiment.json": config.dumps(experiment).encode(),
    }
    manifest = {
        "format": "selfray-checkpoint",
        "version": 1,
        "step": state.progress.step,
        "images_seen": state.progress.images_seen,
        "total_images": state.progress.total_images,
        "loss": loss,
        "method": experiment.method.name,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }
    return _write(location, files, manifest)


def take_part(state: TrainState) -> None:
    """A rank's part in `save` on another rank, where each holds a share of the weights: nothing is
    written."""
    state.state_dict()
    export_weights(state.method.encoder)


def copy(found: Checkpoint, run: Location) -> Checkpoint:
    """Give another run a checkpoint, in place of its own of that step. OSError leaves nothing of it
    behind; ValueError where it is damaged."""
    files = {name: found.read(name) for name in found.manifest["files"]}
    return _write(run / CHECKPOINTS / found.location.name, files, found.manifest)


def _write(location: Location, files: dict[str, bytes], manifest: dict[str, Any]) -> Checkpoint:
    if location.exists():
        location.delete_folder()  # a torn one: a whole one of this step would have been resumed
    try:
        location.make_folder()
        for name, data in files.items():
            (location / name).write_bytes(data)
        (location / MANIFEST).write_json(manifest)
    except OSError:
        _remove_quietly(location)
        raise
    return Checkpoint(location, manifest)


def _remove_quietly(location: Location) -> None:
    # Where this fails, too: without a manifest it is no checkpoint, the next start removes it.
    with contextlib.suppress(OSError):
        location.delete_folder()


def all_of(run: Location) -> list[Checkpoint]:
    """A run's checkpoints that have a manifest, oldest first."""
    found = []
    for info in (run / CHECKPOINTS).list():
        location = run / CHECKPOINTS / info.base_name
        name = _NAME.fullmatch(info.base_name)
        if name and (location / MANIFEST).exists():
            try:
                checkpoint = Checkpoint(location, _read_manifest(location))
            except ValueError:
                continue
            if checkpoint.step == int(name[1]):
                found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def latest(run: Location) -> Checkpoint | None:
    """The newest checkpoint whose every file is as its manifest says; None where there is none."""
    return next(_whole(reversed(all_of(run))), None)


def _whole(checkpoints: Iterator[Checkpoint]) -> Iterator[Checkpoint]:
    for checkpoint in checkpoints:
        try:
            for name in checkpoint.manifest["files"]:
                checkpoint.read(name)
        except ValueError:
            continue
        yield checkpoint


def mark_best(run: Location, step: int) -> None:
    """Write down which checkpoint has the best probe, where that is news."""
    place = run / BEST
    if not place.exists() or place.read_json() != {"step": step}:
        place.write_json({"step": step})


def best(run: Location) -> Checkpoint | None:
    """The checkpoint with the best probe, where it is whole; None where none was probed."""
    try:
        step = (run / BEST).read_json()["step"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return next(_whole(c for c in all_of(run) if c.step == step), None)


def retain(run: Location, keep: int, best_step: int | None, needed: set[int]) -> list[int]:
    """Remove all checkpoints but the last `keep`, the best and those still `needed` (steps).

    Returns the steps that were removed.
    """
    checkpoints = [checkpoint for checkpoint in all_of(run) if _is_complete(checkpoint)]
    kept = {checkpoint.step for checkpoint in checkpoints[-keep:]} | needed
    removed = []
    for checkpoint in checkpoints:
        if checkpoint.step not in kept and checkpoint.step != best_step:
            # The manifest goes first: a half-removed folder must not look like a checkpoint.
            checkpoint.location.filesystem.delete_file((checkpoint.location / MANIFEST).path)
            checkpoint.location.delete_folder()
            removed.append(checkpoint.step)
    return removed


def _is_complete(checkpoint: Checkpoint) -> bool:
    """Whether its files have the sizes of its manifest: no proof, but no byte of them is read."""
    sizes = {info.base_name: info.size for info in checkpoint.location.list()}
    files = checkpoint.manifest["files"]
    return all(sizes.get(name) == entry.get("bytes") for name, entry in files.items())


def _read_manifest(location: Location) -> dict[str, Any]:
    try:
        manifest = (location / MANIFEST).read_json()
    except ValueError:  # no JSON, or no text at all
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != "selfray-checkpoint":
        raise ValueError(f"{location / MANIFEST} is not the manifest of a checkpoint")
    if manifest.get("version") != 1:
        raise ValueError(f"{location} was written by a newer version of selfray")
    if not (isinstance(manifest.get("step"), int) and isinstance(manifest.get("files"), dict)):
        raise ValueError(
            f"{location / MANIFEST} is not the manifest of a checkpoint: it is damaged"
        )
    return manifest


def _tensors(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(checkpoint.read(name))
    except SafetensorError as error:
        raise ValueError(f"{checkpoint.location / name} is not readable: {error}") from None


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A nested state as JSON, its tensors moved into `tensors` under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, dict):
        # Pairs, since JSON would turn the optimizer's integer keys into strings.
        return {"dict": [[k, _split(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_split(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path} of the state is a {type(value).__name__}, which is not saved")


def _join(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of _split."""
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, value),) = skeleton.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _join(item, tensors) for key, item in value}
    items = [_join(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items
