"""Shards -> Ray Data -> batches of views: the plan carried out by Ray tasks.

Each train worker runs one Ray Data stream of its own share of the plan. Tasks read rows, decode
and augment (source.py); views come back as uint8 in the plan's order. A worker knows its rank, the
world size and its cursor, so nothing has to be agreed on beforehand: a restart, at another world
size too, just starts another stream.
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
"""A task makes at most about this much. Ray Data spends the trainer's CPU on each task, whatever it
makes: of SimCLR's views at 224 pixels, on two cores, 91 us for each image with 64 MiB, 53 with 128,
46 with 192 (medians of three rounds, in which an image took 1,600)."""
STORE_SHARE = 1 / 3
"""All streams that end on a node keep at most about this share of its object store filled."""
CHUNKS_PER_CPU = 3
"""Chunks in memory for each CPU: being drawn, waiting for a CPU, and waiting for the trainer."""
MOST_STEPS_PER_CHUNK = 64
GROWTH = 4
"""How many times as many steps chunks have after a window of them."""
CHUNKS_PER_EXECUTION = 128
"""Or two windows of them. To begin one costs the trainer's CPU 40 ms, and 1 ms for each chunk."""
CLOSE_SECONDS = 10.0
"""A stream that is closed waits so long for its threads, and then leaves them to themselves."""


@dataclass(frozen=True)
class Stream:
    """One rank's micro-batches from a step on, drawn by Ray Data tasks on `cpus` CPUs.

    Half as many tasks more wait for these CPUs, and run at once where others are free.
    """

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
    def window(self) -> int:
        """How many chunks are in memory at most."""
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
        """The rest of the run, one execution after the other."""
        firsts, most = self.bounds(), self.chunks_per_execution
        bounds = list(itertools.islice(firsts, most + 1))
        while len(bounds) > 1:
            yield Segment(self.source, self.share, tuple(bounds))
            bounds = [bounds[-1], *itertools.islice(firsts, most)]

    def bounds(self) -> Iterator[int]:
        """The first step of each chunk, and the step after the last.

        The first chunks are of one step, so that training starts at once; then they grow.
        """
        end = self.source.plan.total_steps if self.until_step is None else self.until_step
        first, steps = self.first_step, 1
        for number in itertools.count():
            yield min(first, end)
            if first >= end:
                return
            if number and number % self.window == 0:
                steps = min(GROWTH * steps, self.most_steps_per_chunk)
            # An execution's first block lies in memory to its end (Ray 2.60): a small one.
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
                    # As one chunk is taken up, one more may be drawn: no bubble, and never more
                    # than a window of them in memory, over the end of an execution too.
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
        """Whatever happened on the way, a batch is the one that the plan has here."""
        expected = np.arange(wanted, wanted + self.micro_batch)
        if not np.array_equal(batch[POSITION], expected):
            raise AssertionError(
                f"the stream gave positions from {batch[POSITION][0]}, not from {wanted}"
            )
        return batch


def chunk_room(ranks_here: int, world_size: int) -> float:
    """Bytes of a chunk for which the chunks of all streams that end on this node fit its store.

    Each has a window of them, in proportion to its CPUs. All streams of all runs have the cluster's
    CPUs between them; of these a node with some ranks of a run feeds on their part.
    """
    here = ray.get_runtime_context().get_node_id()
    resources = next((n["Resources"] for n in ray.nodes() if n["NodeID"] == here), {})
    cpus = ray.cluster_resources().get("CPU", 1.0) * ranks_here / world_size
    store = resources.get("object_store_memory", math.inf)
    return STORE_SHARE * store / (CHUNKS_PER_CPU * cpus)


class _Execution:
    """A segment that Ray Data carries out, and a thread that takes over its results.

    The thread waits for what comes from other nodes, while the trainer computes.
    """

    def __init__(self, segment: Segment, cpus: float) -> None:
        self.segment = segment
        # A finished task is noticed up to 0.1 s late (Ray 2.60): by then its CPU has another.
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
        """Draw no more, unless all that was to be drawn is taken: then it ends by itself."""
        if self._left:
            self.gate.close()

    def join(self) -> None:
        """Wait for its end: a thread that asks Ray for something after `ray.shutdown` starts
        another Ray."""
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
    """How many CPUs a task of a stream with `cpus` CPUs asks for."""
    return min(1.0, cpus)


def execute(segment: Segment, cpus: float, gate: Gate) -> Iterator[Arrays]:
    """One Ray Data execution: a task for each chunk, micro-batches in order, as read-only arrays
    in the object store's own memory.

    A chunk comes as one block and is taken apart here. Ray Data's own `iter_batches` would copy
    micro-batches, in eight threads that take the interpreter lock from the trainer.
    """
    configure(DataContext.get_current())
    draw: Any = segment.draw  # Ray's stubs know no dict of arrays
    num_cpus = task_cpus(cpus)
    dataset = blocks_of_ids(segment.chunks).map_batches(draw, batch_size=None, num_cpus=num_cpus)
    dataset.context.target_max_block_size = None  # a block is never cut, at whatever row
    options = dataset.context.execution_options
    options.preserve_order = True
    # No task waits for this, but without it Ray Data asks an autoscaler for ever more nodes.
    options.resource_limits = ExecutionResources.for_limits(cpu=max(cpus, num_cpus))
    gate.apply(dataset.context)
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            block: Any = ray.get(entry.ref)  # pyright: ignore[reportCallIssue, reportArgumentType]
            chunk = {name: as_numpy(block[name].chunk(0)) for name in block.column_names}
            yield from segment.micro_batches(chunk)


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
    if local_ray.is_running():
        stream_alone()


def to_tensors(arrays: Arrays, views: Views) -> Batch:
    """What the loop trains on. Copied: Ray's arrays lie in shared memory and can't be written."""
    parts = ("", MASK_SUFFIX, PARAMETERS_SUFFIX)
    names = [group + part for group in views for part in parts if group + part in arrays] + [LABEL]
    return {name: torch.from_numpy(np.array(arrays[name])) for name in names}
