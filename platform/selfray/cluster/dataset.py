"""Shards -> Ray Data -> batches of views: the plan carried out by Ray tasks.

Each train worker runs one Ray Data stream of its own share of the plan. Tasks read rows, decode
and augment (source.py); views come back as uint8 in the plan's order. A worker knows its rank, the
world size and its cursor, so nothing has to be agreed on beforehand: a restart, at another world
size too, just starts another stream.
"""

import math
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
from ray.data._internal.stats import get_or_create_stats_actor

from selfray.augment import MASK_SUFFIX, PARAMETERS_SUFFIX
from selfray.method import Batch
from selfray.plan import Share
from selfray.source import LABEL, POSITION, Arrays, Segment, Source
from selfray.views import Views

CHUNK_BYTES = 192 * 2**20
"""A task makes at most about this much. Ray Data spends the trainer's CPU on each task, whatever it
makes, 14 ms on one of 0.4 s: of SimCLR's views at 224 pixels, on two cores, 45 to 50 us for each
image with 128 MiB, 36 to 42 with 192, 34 with 256, which came no faster and takes more memory."""
STORE_SHARE = 1 / 3
"""All streams that end on a node keep at most about this share of its object store filled."""
CHUNKS_PER_CPU = 2
"""Chunks in an execution, for each CPU, since beginning one costs 40 ms. More of them lie in more
of the object store's memory, which each task's process touches for the first time: with 4 of
256 MiB the tasks spent 100 us of each image in the kernel, with 2 of them 22 and 35."""
MOST_STEPS_PER_CHUNK = 64
GROWTH = 4
"""How many times as many steps the chunks of the next execution have. Over the first 300 steps of
32 images, doubling gave 0.77 and 0.78 of the bare function's speed, this 0.85 (one run)."""


@dataclass(frozen=True)
class Stream:
    """One rank's micro-batches from a step on, drawn by Ray Data tasks on at most `cpus` CPUs."""

    source: Source
    share: Share
    first_step: int
    cpus: float
    until_step: int | None = None
    """The step after the last; None for the run's end."""
    room: float = math.inf
    """Bytes that a chunk may have, from `chunk_room`."""

    @property
    def micro_batch(self) -> int:
        return self.share.micro_batch(self.source.plan.batch_size)

    @property
    def chunks(self) -> int:
        """How many chunks an execution has."""
        return max(1, math.ceil(CHUNKS_PER_CPU * self.cpus))

    @property
    def most_steps_per_chunk(self) -> int:
        sizes = [view.size or 0 for group in self.source.views.values() for view in group]
        image_bytes = sum(3 * size**2 for size in sizes)
        step_bytes = image_bytes * self.micro_batch * self.share.accumulate
        most = min(CHUNK_BYTES, self.room) // step_bytes
        return int(np.clip(most, 1, MOST_STEPS_PER_CHUNK))

    def segments(self) -> Iterator[Segment]:
        """The rest of the run, one execution after the other.

        The first chunks are of one step, so that training starts at once; then they grow.
        """
        end = self.source.plan.total_steps if self.until_step is None else self.until_step
        first, steps = self.first_step, 1
        while first < end:
            last = min(first + self.chunks * steps, end)
            yield Segment(self.source, self.share, first, last, steps)
            first, steps = last, min(GROWTH * steps, self.most_steps_per_chunk)

    def __iter__(self) -> Iterator[Arrays]:
        """Micro-batches in the plan's order, `accumulate` for each step."""
        segments = self.segments()
        running = _Execution.of(next(segments, None), self.cpus)
        while running is not None:
            # The next one is drawn while this one is consumed: no gap between them, and never more
            # than two in memory.
            upcoming = _Execution.of(next(segments, None), self.cpus)
            segment = running.segment
            starts = list(segment.starts(segment.first_step, segment.last_step))
            for wanted, batch in zip(starts, running, strict=True):
                # Whatever happened on the way, a batch is the one that the plan has here.
                expected = np.arange(wanted, wanted + self.micro_batch)
                if not np.array_equal(batch[POSITION], expected):
                    raise AssertionError(
                        f"the stream gave positions from {batch[POSITION][0]}, not from {wanted}"
                    )
                yield batch
            running = upcoming


def chunk_room(ranks_here: int, world_size: int) -> float:
    """Bytes of a chunk for which the chunks of all streams that end on this node fit its store.

    Two executions of each are in memory, of chunks in proportion to its CPUs. All streams of all
    runs have the cluster's CPUs between them; of these a node with some ranks of a run feeds on
    their part.
    """
    here = ray.get_runtime_context().get_node_id()
    resources = next((n["Resources"] for n in ray.nodes() if n["NodeID"] == here), {})
    cpus = ray.cluster_resources().get("CPU", 1.0) * ranks_here / world_size
    store = resources.get("object_store_memory", math.inf)
    return STORE_SHARE * store / (2 * CHUNKS_PER_CPU * cpus)


class _Execution:
    """A segment that Ray Data carries out in a thread, as fast as its CPUs go.

    Its results are taken at once and kept here: an execution that waits for a slow consumer spins
    (Ray 2.60) and takes the interpreter lock from the trainer, which then runs at half its speed.
    """

    def __init__(self, segment: Segment, cpus: float) -> None:
        self.segment = segment
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        thread = threading.Thread(target=self._run, args=(cpus,), daemon=True, name="stream")
        thread.start()

    @classmethod
    def of(cls, segment: Segment | None, cpus: float) -> "_Execution | None":
        return None if segment is None else cls(segment, cpus)

    def _run(self, cpus: float) -> None:
        try:
            for batch in execute(self.segment, cpus):
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
    """One Ray Data execution: a task for each chunk, micro-batches in order, as read-only arrays
    in the object store's own memory.

    A task's micro-batches come as one block, each the record batch that the task made of it. Ray
    Data's own `iter_batches` would copy them, in eight threads that take the interpreter lock from
    the trainer.
    """
    configure(DataContext.get_current())
    task_cpus = min(1.0, cpus)
    draw: Any = segment.draw  # Ray's stubs know no dict of arrays
    dataset = blocks_of_ids(segment.chunks).map_batches(draw, batch_size=None, num_cpus=task_cpus)
    dataset.context.target_max_block_size = None  # a block is never cut, at whatever row
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(cpu=max(cpus, task_cpus))
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            block: Any = ray.get(entry.ref)  # pyright: ignore[reportCallIssue, reportArgumentType]
            for batch in block.to_batches():
                names, columns = batch.schema.names, batch.columns
                yield {n: as_numpy(column) for n, column in zip(names, columns, strict=True)}


def as_numpy(column: Any) -> np.ndarray:
    """A column of Arrow's, or of Ray's own tensors, which need no copy."""
    return column.to_numpy(zero_copy_only=False)


def blocks_of_ids(count: int) -> ray.data.Dataset:
    """A dataset of `id` 0..count-1, one block each. Not `ray.data.range`: its read tasks want a
    whole CPU each and are not joined with a map that wants less, so on a small machine they would
    wait forever for a CPU that the train workers hold."""
    return ray.data.from_items([{"id": id} for id in range(count)], override_num_blocks=count)


def keep_statistics_here() -> None:
    """Start the actor in which Ray Data counts, on this node.

    It outlives the job, on the node that asks first. That would be a train worker's, which an
    autoscaler would then never see idle and never give back (Ray 2.60).
    """
    get_or_create_stats_actor()


def configure(context: DataContext) -> None:
    """Ray Data's settings for this platform: no bars, no banners."""
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False


def to_tensors(arrays: Arrays, views: Views) -> Batch:
    """What the loop trains on. Copied: Ray's arrays lie in shared memory and can't be written."""
    parts = ("", MASK_SUFFIX, PARAMETERS_SUFFIX)
    names = [group + part for group in views for part in parts if group + part in arrays] + [LABEL]
    return {name: torch.from_numpy(np.array(arrays[name])) for name in names}
