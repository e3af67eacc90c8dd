"""Shards -> Ray Data -> batches of views: Ray tasks carry out the plan.

Each train worker runs one Ray Data stream for its own share of the plan. Tasks read, decode and
augment rows (data/source.py); views return as uint8 in the plan's order. A stream needs only rank,
world size and current step, so workers need not coordinate: a restart, also with another world
size, simply starts another stream.
"""

import itertools
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

from selfray.cluster import local_ray
from selfray.cluster.gate import Gate, GateClosed
from selfray.cluster.ray_internals import get_or_create_stats_actor, stream_alone
from selfray.data.plan import Share
from selfray.data.source import LABEL, POSITION, Arrays, Segment, Source
from selfray.method import Batch
from selfray.pixels.augment import MASK_SUFFIX, PARAMETERS_SUFFIX
from selfray.views import Views

CHUNK_BYTES = 192 * 2**20
"""Approximate largest output of a task. Each task costs the trainer's CPU a fixed time in Ray Data:
for SimCLR's views at 224 pixels on two cores, 91 us per image with 64 MiB, 53 with 128, 46 with 192
(medians of three rounds; drawing an image took 1,600 us)."""
STORE_SHARE = 1 / 3
"""Largest share of a node's object store that all streams ending on the node may fill, about."""
CHUNKS_PER_CPU = 3
"""Chunks in memory per CPU: one being drawn, one waiting for a CPU, one waiting for the trainer."""
MOST_STEPS_PER_CHUNK = 64
GROWTH = 4
"""After each window of chunks, the number of steps per chunk grows by this factor."""
CHUNKS_PER_EXECUTION = 128
"""At least this many, or two windows. Starting an execution costs the trainer's CPU 40 ms, plus 1
ms per chunk."""
CLOSE_SECONDS = 10.0
"""A closed stream waits at most this long for its threads."""


@dataclass(frozen=True)
class Stream:
    """One rank's micro-batches from a step on, drawn by Ray Data tasks on `cpus` CPUs.

    It submits 1.5 tasks per CPU, so that no CPU idles; if other CPUs are free, all run at once.
    """

    source: Source
    share: Share
    first_step: int
    cpus: float
    until_step: int | None = None
    """The step after the last; None for the run's end."""
    room: float = math.inf
    """Largest size of a chunk in bytes, from `chunk_room`."""

    @property
    def micro_batch(self) -> int:
        return self.share.micro_batch(self.source.plan.batch_size)

    @property
    def window(self) -> int:
        """Largest number of chunks in memory."""
        return max(2, math.ceil(CHUNKS_PER_CPU * self.cpus))

    @property
    def chunks_per_execution(self) -> int:
        return max(CHUNKS_PER_EXECUTION, 2 * self.window)

    @property
    def most_steps_per_chunk(self) -> int:
        sizes = [view.size or 0 for group in self.source.views.values() for view in group]
        image_bytes = sum(self.source.channels * size**2 for size in sizes)
        step_bytes = image_bytes * self.micro_batch * self.share.accumulate
        most = min(CHUNK_BYTES, self.room) // step_bytes
        return int(np.clip(most, 1, MOST_STEPS_PER_CHUNK))

    def segments(self) -> Iterator[Segment]:
        """The rest of the run, split into executions."""
        firsts, most = self.bounds(), self.chunks_per_execution
        bounds = list(itertools.islice(firsts, most + 1))
        while len(bounds) > 1:
            yield Segment(self.source, self.share, tuple(bounds))
            bounds = [bounds[-1], *itertools.islice(firsts, most)]

    def bounds(self) -> Iterator[int]:
        """The first step of each chunk, and the step after the last.

        The first chunks have one step, so that training starts at once; later ones are larger.
        """
        end = self.source.plan.total_steps if self.until_step is None else self.until_step
        first, steps = self.first_step, 1
        for number in itertools.count():
            yield min(first, end)
            if first >= end:
                return
            if number and number % self.window == 0:
                steps = min(GROWTH * steps, self.most_steps_per_chunk)
            # An execution's first block stays in memory until its end (Ray 2.60), so it is small.
            first += 1 if number % self.chunks_per_execution == 0 else steps

    def __iter__(self) -> Iterator[Arrays]:
        """Micro-batches in the plan's order, `accumulate` for each step."""
        segments = self.segments()
        executions: list[_Execution] = []

        def begin() -> _Execution | None:
            segment = next(segments, None)
            if segment is None:
                return None
            executions[:] = [e for e in executions if e.is_running]
            executions.append(_Execution(segment, self.cpus))
            return executions[-1]

        try:
            running = begin()
            while running is not None:
                chunks, upcoming = running.segment.chunks, None
                for chunk in range(chunks):
                    # For each chunk taken, one more may be drawn: so there are no gaps, and never
                    # more than a window of chunks in memory, also across executions.
                    ahead = chunk + self.window
                    running.gate.open_to(ahead)
                    if upcoming is None and ahead + self.window >= chunks:
                        upcoming = begin()
                    if upcoming is not None:
                        upcoming.gate.open_to(max(0, ahead - chunks))
                    for wanted in running.segment.starts(chunk):
                        yield self._checked(running.take(), wanted)
                running = upcoming
        finally:
            for execution in executions:
                execution.stop()
            for execution in executions:
                execution.join()

    def _checked(self, batch: Arrays, wanted: int) -> Arrays:
        """The batch, after checking that it is the one that the plan expects here."""
        expected = np.arange(wanted, wanted + self.micro_batch)
        if not np.array_equal(batch[POSITION], expected):
            raise AssertionError(
                f"the stream gave positions from {batch[POSITION][0]}, not from {wanted}"
            )
        return batch


def chunk_room(ranks_here: int, world_size: int) -> float:
    """Largest size of a chunk in bytes, so that the chunks of all streams ending on this node fit
    its object store.

    Each stream has a window of chunks, in proportion to its CPUs. All streams together use at most
    the cluster's CPUs; this node receives the share of its ranks.
    """
    here = ray.get_runtime_context().get_node_id()
    resources = next((n["Resources"] for n in ray.nodes() if n["NodeID"] == here), {})
    cpus = ray.cluster_resources().get("CPU", 1.0) * ranks_here / world_size
    store = resources.get("object_store_memory", math.inf)
    return STORE_SHARE * store / (CHUNKS_PER_CPU * cpus)


class _Execution:
    """A segment carried out by Ray Data, and a thread that collects its results.

    The thread waits for results from other nodes while the trainer computes.
    """

    def __init__(self, segment: Segment, cpus: float) -> None:
        self.segment = segment
        # Ray notices a finished task up to 0.1 s late (2.60), so each CPU has another one waiting.
        tasks = max(1, int(cpus / task_cpus(cpus)))
        self.gate = Gate(segment.chunks, tasks + math.ceil(tasks / 2))
        self._left = segment.batches
        self._queue: queue.SimpleQueue[Arrays | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(cpus,), daemon=True, name="stream")
        self._thread.start()

    def _run(self, cpus: float) -> None:
        try:
            for batch in execute(self.segment, cpus, self.gate):
                self._queue.put(batch)
            self._queue.put(AssertionError("the stream ended before its last micro-batch"))
        except GateClosed:
            pass
        except BaseException as error:  # handed to the consumer, who raises it
            self._queue.put(error)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Stop submitting tasks. No-op once every batch is taken: the execution then ends by
        itself."""
        if self._left:
            self.gate.close()

    def join(self) -> None:
        """Wait for the thread's end: if it called Ray after `ray.shutdown`, it would start a new
        Ray.
        """
        # A garbage collection may close a stream on any thread.
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    def take(self) -> Arrays:
        """The next micro-batch."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        self._left -= 1
        return item


def task_cpus(cpus: float) -> float:
    """The CPUs that each task of a stream with `cpus` CPUs requests."""
    return min(1.0, cpus)


def execute(segment: Segment, cpus: float, gate: Gate) -> Iterator[Arrays]:
    """Run one Ray Data execution, with a task for each chunk, and yield micro-batches in order, as
    read-only arrays in the object store's memory.

    A chunk arrives as one block and is split here. Ray Data's own `iter_batches` would copy
    micro-batches in eight threads, which take the interpreter lock from the trainer.
    """
    configure(DataContext.get_current())
    draw: Any = segment.draw  # Ray's type stubs do not allow a dict of arrays
    num_cpus = task_cpus(cpus)
    dataset = blocks_of_ids(segment.chunks).map_batches(draw, batch_size=None, num_cpus=num_cpus)
    dataset.context.target_max_block_size = None  # never split a block
    options = dataset.context.execution_options
    options.preserve_order = True
    # This limits no task, but without it Ray Data would ask an autoscaler for more and more nodes.
    options.resource_limits = ExecutionResources.for_limits(cpu=max(cpus, num_cpus))
    gate.apply(dataset.context)
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            block: Any = ray.get(entry.ref)  # pyright: ignore[reportCallIssue, reportArgumentType]
            chunk = {name: as_numpy(block[name].chunk(0)) for name in block.column_names}
            yield from segment.micro_batches(chunk)


def as_numpy(column: Any) -> np.ndarray:
    """A column of Arrow, or of Ray's tensor type, as an array; Ray's tensors are not copied."""
    return column.to_numpy(zero_copy_only=False)


def blocks_of_ids(count: int) -> ray.data.Dataset:
    """A dataset of `id` 0..count-1, one block each. Not `ray.data.range`: each of its read tasks
    requests a whole CPU and is not fused with a map that requests less, so on a small machine they
    would wait forever for a CPU that train workers hold."""
    return ray.data.from_items([{"id": id} for id in range(count)], override_num_blocks=count)


def keep_statistics_here() -> None:
    """Start Ray Data's statistics actor on this node.

    It outlives the job, on the node that first uses it. That would be a train worker's node, which
    would never be idle again, so that an autoscaler could not remove it (Ray 2.60).
    """
    get_or_create_stats_actor()


def configure(context: DataContext) -> None:
    """Apply Ray Data's settings for selfray: no progress bars, no banners."""
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    if local_ray.is_running():
        stream_alone()


def to_tensors(arrays: Arrays, views: Views) -> Batch:
    """Copy arrays to torch tensors for training; Ray's arrays lie in read-only shared memory."""
    parts = ("", MASK_SUFFIX, PARAMETERS_SUFFIX)
    names = [group + part for group in views for part in parts if group + part in arrays] + [LABEL]
    return {name: torch.from_numpy(np.array(arrays[name])) for name in names}
