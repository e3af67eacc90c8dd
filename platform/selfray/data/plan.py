"""The read plan as data: which image is seen at which position of the run. Pure; no Ray, no I/O.

A run is a sequence of positions 0, 1, 2, ...; step s of global batch size B covers positions
[s*B, (s+1)*B). What lies at a position follows from the seed alone, so workers, restarts and
changes of world size only decide who reads a position, never what is there.

Shuffling works as storage does: Parquet is read by row groups. Each epoch permutes the row groups
of all shards, joins consecutive ones into windows of at least `window_rows` rows and permutes the
rows inside each window. Since a window gathers row groups from all over the data set, its mixture
is close to the data set's own even where the shards are sorted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from selfray.check import require


@dataclass(frozen=True)
class Rows:
    """Some rows of the data set, in the order in which they are seen."""

    positions: np.ndarray
    """int64 [n]: their places in the run."""
    groups: np.ndarray
    """int64 [n]: the row group (counted over all shards) that holds each."""
    rows: np.ndarray
    """int64 [n]: the row inside that row group."""
    epoch: int


@dataclass(frozen=True)
class ReadPlan:
    """The order of all images over all epochs of a run."""

    group_rows: tuple[int, ...]
    """How many rows each row group holds, over all shards in their order."""
    batch_size: int
    epochs: int
    seed: int
    window_rows: int = 65_536

    def __post_init__(self) -> None:
        require(self.batch_size > 0, f"batch_size must be positive, got {self.batch_size}")
        require(self.epochs > 0, f"epochs must be positive, got {self.epochs}")
        require(
            self.batch_size <= self.rows,
            f"batch_size {self.batch_size} is larger than the data set of {self.rows} images: "
            f"give --batch-size {self.rows} or less",
        )

    def __hash__(self) -> int:
        # Not over all row groups, nor summed anew: of 10^6 rows in 25,000 groups, that took 12 ms
        # for each batch.
        return hash((len(self.group_rows), self.batch_size, self.epochs, self.seed))

    @cached_property
    def rows(self) -> int:
        return sum(self.group_rows)

    @property
    def steps_per_epoch(self) -> int:
        return self.rows // self.batch_size

    @property
    def tail(self) -> int:
        """Images of each epoch that fill no global batch; a different few in every epoch."""
        return self.rows - self.steps_per_epoch * self.batch_size

    @property
    def images_per_epoch(self) -> int:
        return self.steps_per_epoch * self.batch_size

    @property
    def total_images(self) -> int:
        return self.images_per_epoch * self.epochs

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def read(self, start: int, count: int) -> Rows:
        """The rows at positions [start, start + count), which must lie in one epoch."""
        epoch, offset = divmod(start, self.images_per_epoch)
        if offset + count > self.images_per_epoch:
            raise AssertionError(f"positions {start}..{start + count} cross an epoch's end")
        groups, rows = [], []
        for window, first, last in self._windows_over(epoch, offset, offset + count):
            window_groups, window_rows = _window(self, epoch, window)
            groups.append(window_groups[first:last])
            rows.append(window_rows[first:last])
        positions = np.arange(start, start + count, dtype=np.int64)
        return Rows(positions, np.concatenate(groups), np.concatenate(rows), epoch)

    def quantiles(self, positions: np.ndarray, views: int) -> np.ndarray:
        """Where each of an image's views stands among all of its global batch, in [0, 1): float
        [n, views]. Each of a batch's B * views equal parts of [0, 1) holds one, in random order."""
        standing = [_standing(self, int(step), views) for step in positions // self.batch_size]
        offsets = positions % self.batch_size
        return np.stack([s[o] for s, o in zip(standing, offsets, strict=True)])

    def _windows_over(self, epoch: int, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The windows over an epoch's positions [start, end), each with the slice inside it."""
        bounds = _layout(self, epoch)[1]
        window = int(np.searchsorted(bounds, start, side="right")) - 1
        while start < end:
            low, high = int(bounds[window]), int(bounds[window + 1])
            yield window, start - low, min(end, high) - low
            start, window = min(end, high), window + 1


@lru_cache(maxsize=4)
def _layout(plan: ReadPlan, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
    """An epoch's windows as arrays of row groups, and their bounds int64 [windows + 1]."""
    sizes = np.asarray(plan.group_rows, dtype=np.int64)
    order = np.random.default_rng((plan.seed, epoch)).permutation(len(sizes))
    ends = np.cumsum(sizes[order])
    windows, bounds, first = [], [0], 0
    while first < len(order):
        # The first row group that brings the window to window_rows closes it.
        last = int(np.searchsorted(ends, bounds[-1] + plan.window_rows, side="left"))
        last = min(last, len(order) - 1)
        windows.append(order[first : last + 1])
        bounds.append(int(ends[last]))
        first = last + 1
    return windows, np.asarray(bounds, dtype=np.int64)


@lru_cache(maxsize=4)
def _window(plan: ReadPlan, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of one window in the order in which they are seen: (row groups, rows inside)."""
    members = _layout(plan, epoch)[0][window]
    sizes = np.asarray(plan.group_rows, dtype=np.int64)[members]
    groups = np.repeat(members, sizes)
    rows = np.concatenate([np.arange(size, dtype=np.int64) for size in sizes])
    order = np.random.default_rng((plan.seed, epoch, window)).permutation(len(rows))
    return groups[order], rows[order]


@lru_cache(maxsize=4)
def _standing(plan: ReadPlan, step: int, views: int) -> np.ndarray:
    """The quantiles of all views of a step's global batch: float [B, views]."""
    rng = np.random.default_rng((plan.seed, step, views, QUANTILES))
    count = plan.batch_size * views
    return ((rng.permutation(count) + rng.random(count)) / count).reshape(-1, views)


QUANTILES = 0x9A
"""Sets the generator of quantiles apart from those of the order."""


@dataclass(frozen=True)
class Share:
    """Which part of every global batch one rank reads: `accumulate` micro-batches in a row."""

    rank: int
    world_size: int
    accumulate: int = 1

    def __post_init__(self) -> None:
        require(0 <= self.rank < self.world_size, f"rank {self.rank} of {self.world_size}")

    def micro_batch(self, batch_size: int) -> int:
        """Images in one forward of one rank. ValueError where the batch can't be shared evenly."""
        parts = self.world_size * self.accumulate
        require(
            batch_size % parts == 0,
            f"batch_size {batch_size} does not divide among {self.world_size} workers"
            + (f" x {self.accumulate} accumulated micro-batches" if self.accumulate > 1 else "")
            + f": give a multiple of {parts}",
        )
        return batch_size // parts

    def starts(self, plan: ReadPlan, step: int) -> Sequence[int]:
        """The first position of each of this rank's micro-batches in a step."""
        size = self.micro_batch(plan.batch_size)
        first = step * plan.batch_size + self.rank * self.accumulate * size
        return range(first, first + self.accumulate * size, size)


def even_steps(total: int, times: int) -> set[int]:
    """`times` steps spread evenly over a run, the last at its end."""
    return {math.ceil(total * i / times) for i in range(1, times + 1)} if times else set()
