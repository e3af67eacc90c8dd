"""A run's status in its folder: run.json, and the lock of the command that writes there."""

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from selfray import config
from selfray.experiment import Experiment
from selfray.runs.folder import CONFIG, LOCK, RUN_FILE
from selfray.storage import Location

log = logging.getLogger(__name__)

RESERVE = "reserve"
RESERVE_BYTES = 2**18
"""Size of a reserve file that is deleted when a run fails, so that a full disk has room for the
cause."""

Status = Literal["running", "failed", "finished", "stopped", "paused"]


def read(run: Location) -> dict[str, Any]:
    """The run.json of an earlier start; empty if there is none or it is damaged."""
    try:
        record = (run / RUN_FILE).read_json()
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return record if isinstance(record, dict) else {}


def write(run: Location, experiment: Experiment, status: Status, **more: Any) -> None:
    """Write run.json. Raises OSError if the folder cannot be written."""
    if status == "running" and run.is_local:
        (run / RESERVE).write_bytes(bytes(RESERVE_BYTES))
    elif run.is_local:
        give_back_reserve(run)
    (run / RUN_FILE).write_json(
        {
            "status": status,
            "name": run.name,
            # Stored separately, because parsing the experiment imports torch, which takes seconds.
            "judged_by": experiment.method.judged_by,
            "experiment": config.to_json(experiment),
            **more,
        }
    )


def write_config(run: Location, experiment: Experiment) -> Location:
    """Write the file that repeats the run: `selfray pretrain --config FILE`."""
    file = run / CONFIG
    file.write_bytes(config.to_yaml(experiment).encode())
    return file


def give_back_reserve(run: Location) -> None:
    """Delete the reserve file to make room for the cause of a failure."""
    with suppress(OSError):
        os.unlink(os.path.join(run.path, RESERVE))


def write_failure(run: Location, experiment: Experiment, cause: str, **more: Any) -> None:
    """Record why a run failed; if that cannot be written, log it."""
    try:
        write(run, experiment, "failed", failure=cause, **more)
    except OSError:
        log.exception("the failure cannot be recorded")


@contextmanager
def alone(run: Location) -> Iterator[None]:
    """Hold the lock of a run's folder, so that only one command writes into it. Raises ValueError
    if another command holds it. Folders in object stores cannot be locked."""
    if not run.is_local:
        yield
        return
    with open(Path(run.path) / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ValueError(
                f"{run} is being written by another command (process {file.read().strip()}): wait "
                "for it, or change a setting, such as --seed, for a run of its own"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def exclusive(output: Location, say: Callable[[str], None]) -> Iterator[None]:
    """Wait for and hold the lock of an output folder's shared data, so that only one command
    prepares it. Folders in object stores cannot be locked."""
    if not output.is_local:
        yield
        return
    folder = Path(output.path) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"another command is preparing its data in {folder}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
