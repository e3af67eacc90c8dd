"""Runs work as Ray tasks, in order of completion, and counts progress."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.exceptions

from selfray import signals
from selfray.data.manifest import Shard, ShardRecord
from selfray.storage import one_line


@dataclass(frozen=True)
class Progress:
    images_done: int
    """Images in finished shards."""
    images_total: int | None
    """Largest possible number of images; None for tars, which have no table of contents."""
    quarantined: int
    shards_done: int
    shards_total: int
    seconds: float
    bytes: int
    """Size of the finished shards."""
    note: str = ""
    """A line for the user, such as that a build is continued; empty for none."""


class Tally:
    """Counts for the user's progress line."""

    def __init__(
        self,
        on_progress: Callable[[Progress], None] | None,
        images_total: int | None,
        shards_total: int,
    ) -> None:
        self._on_progress = on_progress
        self._images_total = images_total
        self._shards_total = shards_total
        self._started = time.monotonic()
        self.images_done = self.quarantined = self.shards_done = self.bytes = 0

    def add(self, shard: Shard | ShardRecord) -> None:
        self.images_done += shard.rows
        self.bytes += shard.bytes
        self.shards_done += 1
        if isinstance(shard, ShardRecord):
            self.quarantined += len(shard.quarantined)

    def remove(self, shard: ShardRecord) -> None:
        self.images_done -= shard.rows
        self.bytes -= shard.bytes
        self.shards_done -= 1
        self.quarantined -= len(shard.quarantined)

    def report(self, note: str = "") -> None:
        if self._on_progress is not None:
            self._on_progress(
                Progress(
                    images_done=self.images_done,
                    images_total=self._images_total,
                    quarantined=self.quarantined,
                    shards_done=self.shards_done,
                    shards_total=self._shards_total,
                    seconds=time.monotonic() - self._started,
                    bytes=self.bytes,
                    note=note,
                )
            )


Result = TypeVar("Result")


def in_parallel(
    function: Callable[..., Result], work: Iterable[tuple[str, tuple[Any, ...]]]
) -> Iterator[Result]:
    """Results of function(*arguments) for each (name, arguments), in order of completion.

    Each task takes one CPU. About twice as many tasks as CPUs are submitted: more than CPUs, so
    that an autoscaler sees demand, but not all, because their arguments would fill the object
    store.
    """
    task = ray.remote(num_cpus=1)(function)
    waiting = iter(work)
    running: dict[ray.ObjectRef, str] = {}
    try:
        while True:
            free = 2 * max(1, int(ray.cluster_resources().get("CPU", 1))) - len(running)
            for name, arguments in itertools.islice(waiting, free):
                running[task.remote(*arguments)] = name
            if not running:
                return
            (ready,), _ = ray.wait(list(running), num_returns=1)
            name = running.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, OSError):  # storage: a traceback does not help users
                    raise error.cause from None
                raise
            except ray.exceptions.RayError as error:
                raise OSError(f"the worker of {name} died: {one_line(error)}") from None
            yield result
    finally:
        # After a signal this process ends, and its tasks with it. Ray 2.60 aborts if a task is
        # cancelled that Ctrl-C ends in the same moment (task_manager.cc, "not pending").
        for reference in running if not signals.were_received() else ():
            ray.cancel(reference)
