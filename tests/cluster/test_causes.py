"""The cause of a failed run in one line, from the errors that Ray raises."""

import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train import WorkerGroupError

from selfray.cluster.endings import cause_of

MONITOR = (
    "Task was killed due to the node running low on memory.\n"
    "Memory on the node (IP: 10.0.0.3) was 121 GB / 128 GB (0.953), which exceeds the memory usage "
    "threshold of 0.95."
)


def died(text: str) -> RayError:
    error = RayActorError()
    error.error_msg = text
    return error


def test_a_worker_that_the_memory_monitor_killed_is_named_with_the_way_out():
    for error in (OutOfMemoryError(MONITOR), died(MONITOR)):
        cause = cause_of(WorkerGroupError("2 workers failed", {1: error}))
        assert cause.startswith("Ray killed train worker 1 because the memory of its machine")
        assert "smaller --batch-size" in cause
        assert "\n" not in cause


def test_a_task_outside_of_workers_is_a_worker_all_the_same():
    assert cause_of(OutOfMemoryError(MONITOR)).startswith("Ray killed a worker because")


def test_a_gpus_memory_and_other_errors_keep_their_own_words():
    of_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert cause_of(WorkerGroupError("x", {0: of_gpu})).startswith("CUDA out of memory")
    assert cause_of(WorkerGroupError("x", {0: ValueError("views")})) == "views"
