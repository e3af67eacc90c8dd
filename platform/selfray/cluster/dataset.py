"""Shards -> Ray Data -> batches of views: the plan carried out by Ray tasks.

Each train worker runs one Ray Data stream of its own share of the plan. Tasks read rows, decode
and augment (source.py); views come back as uint8 in the plan's order. A worker knows its rank, the
world size and its cursor, so nothing has to be agreed on beforehand: a restart, at another world
size too, just starts another stream.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.data import DataContext, ExecutionResources

from selfray.experiment import Experiment
from selfray.method import Batch
from selfray.plan import ReadPlan, Share
from selfray.shards import ShardSet
from selfray.source import LABEL, POSITION, Arrays, Segment, Source
from selfray.views import Views

CHUNK_BYTES = 16 * 2**20
"""A task makes about this much before it ends: enough to outweigh the ~10 ms that a task costs."""
CHUNKS_PER_SEGMENT = 500
"""Chunks of one Ray Data execution. Building one costs about 1 ms for each chunk before the first
is read, so a long run is a chain of executions, the next started before the last one ends."""
PREFETCHED_BATCHES = 3


def source_of(experiment: Experiment, shards: ShardSet) -> Source:
    plan = ReadPlan(
        shards.group_rows,
        experiment.batch_size,
        experiment.epochs,
        experiment.seed,
        experiment.data.window_rows,
    )
    return Source(shards, plan, experiment.views)


@dataclass(frozen=True)
class Stream:
    """One rank's micro-batches from a step on, drawn by Ray Data tasks on at most `cpus` CPUs."""

    source: Source
    share: Share
    first_step: int
    cpus: float

    @property
    def micro_batch(self) -> int:
        return self.share.micro_batch(self.source.plan.batch_size)

    @property
    def steps_per_chunk(self) -> int:
        sizes = [view.size or 0 for group in self.source.views.values() for view in group]
        image_bytes = sum(3 * size**2 for size in sizes)
        step_bytes = image_bytes * self.micro_batch * self.share.accumulate
        return int(np.clip(CHUNK_BYTES // step_bytes, 1, 8))

    def segments(self) -> list[Segment]:
        total, length = self.source.plan.total_steps, CHUNKS_PER_SEGMENT * self.steps_per_chunk
        return [
            Segment(self.source, self.share, first, min(first + length, total), self.steps_per_chunk)
            for first in range(self.first_step, total, length)
        ]

    def __iter__(self) -> Iterator[Arrays]:
        """Micro-batches in the plan's order, `accumulate` for each step."""
        segments = self.segments()
        upcoming = _Execution(segments[0], self.cpus) if segments else None
        for index, segment in enumerate(segments):
            assert upcoming is not None
            running, upcoming = upcoming, None
            starts = list(segment.starts(segment.first_step, segment.last_step))
            overlap = 4 * self.steps_per_chunk * self.share.accumulate
            for count, (wanted, batch) in enumerate(zip(starts, running, strict=True)):
                # Whatever happened on the way, a batch is the one that the plan has here.
                expected = np.arange(wanted, wanted + self.micro_batch)
                if not np.array_equal(batch[POSITION], expected):
                    raise AssertionError(
                        f"the stream gave positions from {batch[POSITION][0]}, not from {wanted}"
                    )
                yield batch
                if upcoming is None and index + 1 < len(segments) and count + overlap >= len(starts):
                    upcoming = _Execution(segments[index + 1], self.cpus)


class _Execution:
    """A segment that Ray Data carries out in a thread, a few batches ahead of its consumer."""

    def __init__(self, segment: Segment, cpus: float) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(PREFETCHED_BATCHES)
        thread = threading.Thread(
            target=self._run, args=(segment, cpus), daemon=True, name="selfray-stream"
        )
        thread.start()

    def _run(self, segment: Segment, cpus: float) -> None:
        try:
            for batch in execute(segment, cpus):
                self._queue.put(batch)
            self._queue.put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            self._queue.put(error)

    def __iter__(self) -> Iterator[Arrays]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


def execute(segment: Segment, cpus: float) -> Iterator[Arrays]:
    """One Ray Data execution: a task for each chunk, results in order."""
    configure(DataContext.get_current())
    task_cpus = min(1.0, cpus)
    dataset = ray.data.range(segment.chunks, override_num_blocks=segment.chunks).map_batches(
        segment.draw, batch_size=None, num_cpus=task_cpus
    )
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(cpu=max(cpus, task_cpus))
    size = segment.share.micro_batch(segment.source.plan.batch_size)
    return iter(dataset.iter_batches(batch_size=size, batch_format="numpy", prefetch_batches=2))


def configure(context: DataContext) -> None:
    """Ray Data's settings for this platform: no bars, no banners."""
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False


def to_tensors(arrays: Arrays, views: Views) -> Batch:
    """What the loop trains on. Copied: Ray's arrays lie in shared memory and can't be written."""
    names = [n for group in views for n in (group, f"{group}_mask") if n in arrays] + [LABEL]
    return {name: torch.from_numpy(np.array(arrays[name])) for name in names}
