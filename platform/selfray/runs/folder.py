"""A run's folder: the names of its files, and whether a command is writing into it."""

import fcntl
from pathlib import Path

from selfray.storage import Location, read_object

RUN_FILE = "run.json"
"""A run's settings and status; launch.py writes it."""
CONFIG = "experiment.yaml"
"""The experiment, as `selfray pretrain --config` reads it."""
LOCK = "lock"
"""Lock file held by the command that writes into a local run folder."""
STOP = "stop.json"
"""The reason why the run's guard ends it; written by its driver, read by its workers."""
START = "start.safetensors"
"""The public weights that the run started from, in its encoder's shapes; the header names them."""
BEST = "best.json"
"""The step of the checkpoint with the best probe."""
SPOOL = "spool"
CHECKPOINTS = "checkpoints"
ARTIFACTS = "artifacts"
PICTURES = "pictures"
"""A folder inside the folder of artifacts."""
RUN_RECORD = "mlflow.json"
"""{"tracking_uri", "experiment_id", "run_id"} of the MLflow run of this run folder."""
SHIPPED = "shipped.json"
"""{"key", "run_id", "offsets", "artifacts", "status"}: how much of the spool MLflow has
received."""
TRIALS = "trials"
"""Folder in a sweep's folder, with the outcome of each trial that has ended."""
OUTCOMES = "outcomes.json"
"""File in the folder of a sweep that has ended."""


def is_training(run: Location) -> bool:
    """Whether a command is writing into the run's folder now. For an object store this is the
    status in its record, which stays "running" if the command is killed."""
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
