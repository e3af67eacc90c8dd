"""Failures of a run: which ones would repeat, and the cause in one line."""

import re

from ray.exceptions import OutOfMemoryError, RayTaskError

from selfray.storage import Location, last_line

FAILURE = "failure.json"
"""File with the cause of a failure that another attempt would only repeat."""


class RunFailed(RuntimeError):  # noqa: N818 - it is the run that failed
    """Raised when a run ends early; the message is the cause in one line."""


class KilledForMemory(RunFailed):
    """The failure of a run of which Ray's memory monitor killed a worker.

    Args:
        who: the worker.
        at_start: whether it was still starting; Ray Train does not retry that.
    """

    def __init__(self, who: str, at_start: bool) -> None:
        self.at_start = at_start
        self.short = f"Ray killed {who} because the memory of its machine was nearly full"
        super().__init__(
            f"{self.short}, other programs included: free memory, or give a smaller --batch-size; "
            "the same command continues from the last checkpoint"
        )


REPEATABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
)


def would_repeat(error: BaseException) -> bool:
    """Whether another attempt would fail in the same way."""
    from torch import OutOfMemoryError

    return isinstance(error, (*REPEATABLE, OutOfMemoryError))


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain, through Python's causes and Ray's wrappers."""
    while True:
        inner = error.cause if isinstance(error, RayTaskError) else error.__cause__
        if not isinstance(inner, BaseException):
            return error
        error = inner


def recorded_failure(record: Location, launch: str) -> str | None:
    """The recorded cause why this start of the command must fail; None if there is none."""
    try:
        failure = record.read_json()
    except FileNotFoundError:
        return None
    return failure["message"] if failure["launch"] == launch else None


LOW_MEMORY = re.compile(r"low on memory|out[- ]of[- ]memory|\bOOM\b|memory usage threshold", re.I)
"""Ray's words where its memory monitor has killed a worker."""


def failure_of(error: Exception) -> RunFailed:
    """The failure of a run whose training raised `error`: the first worker's own, in one line."""
    failures = getattr(error, "worker_failures", None)
    rank, first = next(iter(failures.items())) if failures else (None, error)
    root = root_cause(first)
    if isinstance(root, OutOfMemoryError) or (
        type(root).__module__.startswith("ray.") and LOW_MEMORY.search(str(root))
    ):
        who = "a worker" if rank is None else f"train worker {rank}"
        return KilledForMemory(who, at_start=rank is None)
    return RunFailed(last_line(root))
