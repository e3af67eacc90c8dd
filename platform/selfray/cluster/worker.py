"""What Ray Train runs on every worker: starts training, and writes down why it failed.

Torch and timm are imported inside the functions: Ray Train's controller imports this module too
and would spend seconds on them, and a worker first has a process started for its data tasks.
"""

import logging
from contextlib import suppress
from typing import Any

import ray

from selfray.cluster.endings import FAILURE, recorded_failure, root_cause, would_repeat
from selfray.cluster.task import WorkerTask
from selfray.storage import Location

log = logging.getLogger(__name__)


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
        if would_repeat(cause):
            name = type(cause).__name__
            message = str(cause).strip() or name
            with suppress(OSError):  # the folder itself may be what is missing
                record.write_json({"launch": task.launch, "type": name, "message": message})
        raise


def _load_data_libraries() -> None:
    """What a process does that is started ahead of its first data task."""
    import selfray.data.source  # noqa: F401
