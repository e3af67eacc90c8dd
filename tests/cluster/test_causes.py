"""The cause of a failed run in one line, from the errors that Ray raises."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train import WorkerGroupError

from selfray.cluster import fit
from selfray.cluster.endings import KilledForMemory, failure_of
from selfray.console import Console
from selfray.recipes import every

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
        cause = str(failure_of(WorkerGroupError("2 workers failed", {1: error})))
        assert cause.startswith("Ray killed train worker 1 because the memory of its machine")
        assert "smaller --batch-size" in cause
        assert "\n" not in cause


def test_a_task_outside_of_workers_is_a_worker_all_the_same():
    assert str(failure_of(OutOfMemoryError(MONITOR))).startswith("Ray killed a worker because")


def test_a_gpus_memory_and_other_errors_keep_their_own_words():
    of_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert str(failure_of(WorkerGroupError("x", {0: of_gpu}))).startswith("CUDA out of memory")
    assert str(failure_of(WorkerGroupError("x", {0: ValueError("views")}))) == "views"


def test_workers_that_were_killed_while_they_started_are_started_again(monkeypatch):
    failures = iter([failure_of(OutOfMemoryError(MONITOR)), failure_of(OutOfMemoryError(MONITOR))])
    attempts = []

    def attempt(*_: Any) -> None:
        attempts.append(1)
        for failure in failures:
            raise failure

    monkeypatch.setattr(fit, "_attempt", attempt)
    monkeypatch.setattr(fit, "RETRY_SECONDS", 0.0)
    said = io.StringIO()
    few = replace(every()["mae-digits"], max_failures=2)
    unused: Any = None
    fit.fit(few, unused, unused, unused, Console(said, None))
    assert len(attempts) == 3
    assert said.getvalue().count("was nearly full: trying again (--max-failures 2)") == 2


def test_workers_killed_while_they_train_are_left_to_ray_which_has_retried_them(monkeypatch):
    def attempt(*_: Any) -> None:
        raise failure_of(WorkerGroupError("x", {0: OutOfMemoryError(MONITOR)}))

    monkeypatch.setattr(fit, "_attempt", attempt)
    unused: Any = None
    with pytest.raises(KilledForMemory, match="train worker 0"):
        fit.fit(every()["mae-digits"], unused, unused, unused, Console(io.StringIO(), None))
