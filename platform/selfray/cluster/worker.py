"""What Ray Train runs on every worker: starts training, and writes down why it failed.

Torch and timm are imported inside the functions: Ray Train's controller imports this module too
and would spend seconds on them, and a worker first has a process started for its data tasks.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from selfray.data.shard_set import ShardSet
from selfray.storage import Location

log = logging.getLogger(__name__)

FAILURE = "failure.json"
"""The cause of a failure that another attempt would only repeat."""


@dataclass(frozen=True)
class WorkerTask:
    """What a worker is told. Plain values, so that any process can unpickle it."""

    experiment: str
    """The Experiment as JSON."""
    shards: ShardSet
    run: str
    """The run's folder: an absolute path or a URI."""
    cpus: float
    """CPUs of each train worker."""
    data_cpus: float
    """CPUs for the data tasks of each worker: an elastic run's grow and shrink with it."""
    launch: str
    """Which start of the command this is: a failure of an earlier one is no reason to give up."""
    until_step: int | None = None
    """Where the run pauses, with a checkpoint; None goes to its end."""
    stop_file: str | None = None
    """The run ends, with a checkpoint, soon after this file appears."""


def train_worker(loop_config: dict[str, Any]) -> None:
    """The function that TorchTrainer runs on every worker, and runs again after a failure.

    A worker that dies, or that loses its peers, is worth another attempt. An error in the data or
    in the code is not: its cause is written down, and the next attempt returns at once, for the
    launcher to report.
    """
    task: WorkerTask = loop_config["task"]
    record = Location.of(task.run) / FAILURE
    if recorded_failure(record, task.launch) is not None:
        return
    ray.remote(num_cpus=min(1.0, task.data_cpus))(_load_data_libraries).remote()
    from selfray.cluster.training import run

    try:
        run(task)
    except Exception as error:
        cause = root_cause(error)
        log.exception("training failed")
        if _would_repeat(cause):
            name = type(cause).__name__
            message = str(cause).strip() or name
            with suppress(OSError):  # the folder itself may be what is missing
                record.write_json({"launch": task.launch, "type": name, "message": message})
        raise


REPEATABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
)


def _would_repeat(error: BaseException) -> bool:
    from torch import OutOfMemoryError

    return isinstance(error, (*REPEATABLE, OutOfMemoryError))


def _load_data_libraries() -> None:
    """What a process does that is started ahead of its first data task."""
    import selfray.data.source  # noqa: F401


def root_cause(error: BaseException) -> BaseException:
    """The error that began it all, through Python's chain and Ray's wrappers."""
    while True:
        inner = error.cause if isinstance(error, RayTaskError) else error.__cause__
        if not isinstance(inner, BaseException):
            return error
        error = inner


def recorded_failure(record: Location, launch: str) -> str | None:
    """Why this start of the command is bound to fail; None where nothing says so."""
    try:
        failure = record.read_json()
    except FileNotFoundError:
        return None
    return failure["message"] if failure["launch"] == launch else None
