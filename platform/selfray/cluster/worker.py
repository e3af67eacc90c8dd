"""The function that Ray Train runs on every worker: starts training and records why it failed.

Torch and timm are imported inside functions, because Ray Train's controller also imports this
module and would spend seconds on them, and because a worker first starts a process for its data
tasks.
"""

import logging
from contextlib import suppress
from typing import Any

import ray

from selfray.cluster.endings import FAILURE, recorded_failure, root_cause, would_repeat
from selfray.cluster.task import WorkerTask
from selfray.imports import uncollected
from selfray.storage import Location

log = logging.getLogger(__name__)


def train_worker(loop_config: dict[str, Any]) -> None:
    """The function that TorchTrainer runs on every worker, and again after a failure.

    If a worker dies or loses its peers, another attempt may succeed. An error in the data or in the
    code would repeat: its cause is recorded, and the next attempt returns at once, so that the
    launcher reports it.
    """
    task: WorkerTask = loop_config["task"]
    record = Location.of(task.run) / FAILURE
    if recorded_failure(record, task.launch) is not None:
        return
    ray.remote(num_cpus=min(1.0, task.data_cpus))(_load_data_libraries).remote()
    with uncollected():
        from selfray.cluster.training import run

    try:
        run(task)
    except Exception as error:
        cause = root_cause(error)
        log.exception("training failed")
        if would_repeat(cause):
            name = type(cause).__name__
            message = str(cause).strip() or name
            with suppress(OSError):  # the folder itself may be missing
                record.write_json({"launch": task.launch, "type": name, "message": message})
        raise


def _load_data_libraries() -> None:
    """Import the data libraries in a new process, before its first data task arrives."""
    with uncollected():
        import selfray.data.source  # noqa: F401
