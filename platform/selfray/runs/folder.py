"""A run's folder: the names of what lies in it, and whether a command is writing into it."""

import fcntl
from pathlib import Path
from typing import Any

from selfray.storage import Location

RUN_FILE = "run.json"
"""What a run is and how it stands; launch.py writes it."""
CONFIG = "experiment.yaml"
"""The experiment, as `selfray pretrain --config` reads it."""
LOCK = "lock"
"""Held by the command that writes into a run's folder, where that is local."""
STOP = "stop.json"
"""Why the run's own guard ends it; written by its driver, read by its workers."""
START = "start.safetensors"
"""The public weights that it started from, in its encoder's shapes; the header says whose."""
BEST = "best.json"
"""The step of the checkpoint with the best probe."""
SPOOL = "spool"
CHECKPOINTS = "checkpoints"
ARTIFACTS = "artifacts"
PICTURES = "pictures"
"""In the folder of artifacts."""
RUN_RECORD = "mlflow.json"
"""{"tracking_uri", "experiment_id", "run_id"}: which MLflow run this run folder belongs to."""
SHIPPED = "shipped.json"
"""{"key", "run_id", "offsets", "artifacts", "status"}: what of the spool MLflow has by now."""
TRIALS = "trials"
"""In a sweep's folder: an outcome for each trial that has ended."""
OUTCOMES = "outcomes.json"
"""Stands in the folder of a sweep that has ended."""


def is_training(run: Location) -> bool:
    """Whether a command is writing into the run's folder now; where that is no local one, whether
    its record says so, which is not taken back by a command that is killed."""
    if not run.is_local:
        return read_object(run / RUN_FILE).get("status") == "running"
    try:
        with open(Path(run.path) / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def read_object(file: Location) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, or it is damaged: no JSON, no UTF-8, of
    another shape, or nested without end."""
    try:
        value = file.read_json()
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
