"""Failures of a run: which ones would repeat, and the cause in one line."""

from ray.exceptions import RayTaskError

from selfray.storage import Location, last_line

FAILURE = "failure.json"
"""File with the cause of a failure that another attempt would only repeat."""


class RunFailed(RuntimeError):  # noqa: N818 - it is the run that failed
    """Raised when a run ends early; the message is the cause in one line."""


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


def cause_of(error: Exception) -> str:
    """The first worker's own error, in one line."""
    failures = getattr(error, "worker_failures", None)
    return last_line(root_cause(next(iter(failures.values())) if failures else error))
