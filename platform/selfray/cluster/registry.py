"""Registers trained tokenizers in MLflow's model registry, so that later runs can name a
version."""

import logging
import tempfile
from pathlib import Path

from selfray.cluster.launch import RunResult
from selfray.cluster.mlflow_store import asking_mlflow, tracking_uri
from selfray.console import Console
from selfray.experiment import Experiment
from selfray.runs.checkpoint import MANIFEST, Checkpoint
from selfray.runs.folder import RUN_RECORD
from selfray.storage import Location
from selfray.tokenizer import VERSION

log = logging.getLogger(__name__)


def register_tokenizer(experiment: Experiment, result: RunResult, console: Console) -> None:
    """Register the run's tokenizer under the recipe's name, once, and print how to use it.

    Its files become artifacts of the run, so the version can be fetched without access to the
    folder.
    If the server is down, only the registration is missing: the same command tries again.
    """
    found = Checkpoint.open(result.folder)
    console.say(f"use it with --method.tokenizer {result.folder}")
    try:
        version = _version_of(experiment, found, Location.of(result.folder))
    except (OSError, ValueError) as error:
        log.exception("registering failed")
        console.say(f"not registered in MLflow ({error}): start the same command again to retry")
        return
    console.say(f"MLflow: model {experiment.name}, version {version}")


def _version_of(experiment: Experiment, found: Checkpoint, run: Location) -> str:
    """The version in MLflow's registry; created if there is none yet."""
    from mlflow.exceptions import MlflowException

    record = (run / RUN_RECORD).read_json()
    uri = tracking_uri(Location.of(experiment.output))  # as the run that has just ended did
    with asking_mlflow(uri) as (client, _):
        versions = client.search_model_versions(f"name = '{experiment.name}'")
        same = [v for v in versions if v.tags.get("sha256") == found.digest]
        if same:
            version = str(same[0].version)
        else:
            with tempfile.TemporaryDirectory() as folder:
                for name in (*found.manifest["files"], MANIFEST):
                    (Path(folder) / name).write_bytes((found.location / name).read_bytes())
                client.log_artifacts(record["run_id"], folder, "tokenizer")
            try:
                client.create_registered_model(experiment.name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            artifacts = client.get_run(record["run_id"]).info.artifact_uri
            made = client.create_model_version(
                experiment.name,
                f"{artifacts}/tokenizer",
                record["run_id"],
                tags={"sha256": found.digest, "run.folder": run.uri, "step": str(found.step)},
            )
            version = str(made.version)
    # Stored beside the weights, so that runs can read the version without a server.
    (found.location / VERSION).write_json({"model": experiment.name, "version": version})
    return version
