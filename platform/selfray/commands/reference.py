"""Resolves a user's reference to a checkpoint: a path, a URL or an MLflow run."""

import posixpath
from typing import TYPE_CHECKING

from selfray.check import require
from selfray.commands.words import nearest
from selfray.runs.folder import CHECKPOINTS
from selfray.storage import Location

if TYPE_CHECKING:
    from selfray.console import Console
    from selfray.experiment import Experiment
    from selfray.runs.checkpoint import Checkpoint


MLRUNS = "mlruns:"


def open_checkpoint(reference: str, tracking: str | None, console: "Console") -> "Checkpoint":
    """Open a checkpoint by its folder, its run's folder or mlruns:/RUN_ID. ValueError and OSError
    say what the reference is instead, or why it cannot be read."""
    from selfray.runs import checkpoint
    from selfray.runs.checkpoint import Checkpoint

    path = reference
    if reference.startswith(MLRUNS):
        path = _folder_of_run(reference.removeprefix(MLRUNS).strip("/"), tracking)
    try:
        found = Checkpoint.open(path)
    except FileNotFoundError as error:
        if path == reference:
            raise FileNotFoundError(f"{error}{nearest(*_siblings(path))}") from None
        raise FileNotFoundError(
            f"according to MLflow, {reference} is in {path}, which this machine cannot see: "
            "give the folder's path on this machine"
        ) from error
    newest = checkpoint.all_of(Location.of(path))[-1:]
    if newest and newest[0].step > found.step:
        console.say(f"{newest[0].location} is damaged: using an earlier one, step {found.step:,}")
    return found


def _siblings(path: str) -> tuple[str, list[str]]:
    """(name, names of what lies in the same folder) of a path."""
    place = Location.of(path)
    try:
        return place.name, [info.base_name for info in place.parent.list()]
    except OSError:
        return place.name, []


def _folder_of_run(run_id: str, tracking: str | None) -> str:
    from selfray.cluster.mlflow_store import mlflow_tags, tracking_uri

    require(run_id != "", f"{MLRUNS}/RUN_ID needs the id of a run, as MLflow's page shows it")
    uri = tracking_uri(Location.of("runs"), tracking)
    tags = mlflow_tags(uri, run_id)
    if "run.folder" not in tags:
        raise ValueError(
            f"MLflow run {run_id} has no tag run.folder, so selfray did not log it: give the "
            "run's folder"
        )
    return tags["run.folder"]


def run_folder(checkpoint: "Checkpoint") -> Location | None:
    """The folder of the run that a checkpoint lies in; None for a copy elsewhere."""
    place = checkpoint.location
    outer = posixpath.dirname(place.path.rstrip("/"))
    if posixpath.basename(outer) != CHECKPOINTS:
        return None
    uri = posixpath.dirname(posixpath.dirname(place.uri.rstrip("/")))
    return Location(place.filesystem, posixpath.dirname(outer), uri)


def output_of(checkpoint: "Checkpoint") -> Location:
    """The folder that holds the run's folder and the converted data sets."""
    run = run_folder(checkpoint)
    return Location.of("runs" if run is None else posixpath.dirname(run.uri))


def name_of(checkpoint: "Checkpoint") -> str:
    run = run_folder(checkpoint)
    return f"{run.name}-{checkpoint.location.name}" if run else checkpoint.location.name


def described(experiment: "Experiment") -> str:
    encoder = experiment.encoder
    return (
        f"{experiment.method.name}, {encoder.name} at {encoder.image_size} x {encoder.image_size}"
    )
