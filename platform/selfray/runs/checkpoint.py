"""Checkpoints: a TrainState as a folder of files, and back.

    checkpoints/step-00001200/
        encoder.safetensors     the encoder under timm's names, for use elsewhere
        state.safetensors       every tensor of the TrainState
        state.json              the rest of the TrainState, with references to the tensors
        experiment.json         the Experiment
        MANIFEST.json           sizes and sha256 of the others; written last

A folder without a manifest, or whose files differ from it, is not a checkpoint. So a crash or a
full disk during writing does not affect earlier checkpoints. Nothing is unpickled.
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
    """A checkpoint with a valid manifest; each file is verified when it is read."""

    location: Location
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Location) -> "Checkpoint":
        """Open a checkpoint's folder, or the newest complete checkpoint in a run's folder.

        Raises FileNotFoundError or ValueError that names the path and what is there instead.
        """
        location = Location.of(path)
        if not location.exists():
            raise FileNotFoundError(f"there is no checkpoint at {location}")
        if (location / MANIFEST).exists():
            return cls(location, _read_manifest(location))
        newest = latest(location)
        if newest is None:
            raise ValueError(
                f"{location} is not a checkpoint: it has no {MANIFEST}, and no complete checkpoint "
                f"lies under it; give a run's folder or one of its {CHECKPOINTS}/step-*"
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
        """sha256 of the state's tensors in hex, which identifies the weights."""
        return self.manifest["files"]["state.safetensors"]["sha256"]

    def read(self, name: str) -> bytes:
        """Read a file and verify it. Raises ValueError if it is missing or differs from the
        manifest.
        """
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
        """The state dict for TrainState.load_state_dict."""
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
    """The part of a rank that does not write in `save`, if weights are sharded: it joins the
    gathering of weights."""
    state.state_dict()
    export_weights(state.method.encoder)


def copy(found: Checkpoint, run: Location) -> Checkpoint:
    """Copy a checkpoint into another run, replacing that run's own one of that step. Raises
    ValueError if it is damaged; an OSError leaves no partial copy."""
    files = {name: found.read(name) for name in found.manifest["files"]}
    return _write(run / CHECKPOINTS / found.location.name, files, found.manifest)


def _write(location: Location, files: dict[str, bytes], manifest: dict[str, Any]) -> Checkpoint:
    if location.exists():
        location.delete_folder()  # incomplete: a complete one of this step would have been resumed
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
    # If this fails too, the folder has no manifest, so the next start removes it.
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
    """The newest checkpoint whose files all match its manifest; None if there is none."""
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
    """Record which checkpoint has the best probe, if it has changed."""
    place = run / BEST
    if not place.exists() or place.read_json() != {"step": step}:
        place.write_json({"step": step})


def best(run: Location) -> Checkpoint | None:
    """The checkpoint with the best probe; None if there is none or it is damaged."""
    try:
        step = (run / BEST).read_json()["step"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return next(_whole(c for c in all_of(run) if c.step == step), None)


def retain(run: Location, keep: int, best_step: int | None, needed: set[int]) -> list[int]:
    """Remove all checkpoints except the last `keep`, the best one and those of the steps `needed`.

    Returns the steps of the removed checkpoints.
    """
    checkpoints = [checkpoint for checkpoint in all_of(run) if _is_complete(checkpoint)]
    kept = {checkpoint.step for checkpoint in checkpoints[-keep:]} | needed
    removed = []
    for checkpoint in checkpoints:
        if checkpoint.step not in kept and checkpoint.step != best_step:
            # The manifest is deleted first: a half-deleted folder must not look like a checkpoint.
            checkpoint.location.filesystem.delete_file((checkpoint.location / MANIFEST).path)
            checkpoint.location.delete_folder()
            removed.append(checkpoint.step)
    return removed


def _is_complete(checkpoint: Checkpoint) -> bool:
    """Whether its files have the sizes in its manifest: a quick check that reads no contents."""
    sizes = {info.base_name: info.size for info in checkpoint.location.list()}
    files = checkpoint.manifest["files"]
    return all(sizes.get(name) == entry.get("bytes") for name, entry in files.items())


def _read_manifest(location: Location) -> dict[str, Any]:
    try:
        manifest = (location / MANIFEST).read_json()
    except ValueError:  # not JSON or not UTF-8
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
    """Convert a nested state to JSON; its tensors are moved into `tensors` under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, dict):
        # As pairs, because JSON would turn the optimizer's integer keys into strings.
        return {"dict": [[k, _split(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_split(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path} of the state is a {type(value).__name__}, which cannot be saved")


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
