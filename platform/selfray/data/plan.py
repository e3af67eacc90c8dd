"""The read plan as data: which image is seen at which position of the run. Pure; no Ray, no I/O.

A run is a sequence of positions 0, 1, 2, ...; step s of global batch size B covers positions
[s*B, (s+1)*B). The image at a position follows only from the seed, so workers, restarts and changes
of world size decide who reads a position, but never which image it is.

Shuffling respects that Parquet is read by row groups. Each epoch permutes the row groups of all
shards, joins consecutive ones into windows of at least `window_rows` rows and permutes the rows
inside each window. Since a window contains row groups from all over the data set, its mixture of
classes is close to that of the data set even if shards are sorted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from selfray.check import require


@dataclass(frozen=True)
class Rows:
    """Rows of the data set, in the order in which they are seen."""

    positions: np.ndarray
    """int64 [n]: their positions in the run."""
    groups: np.ndarray
    """int64 [n]: the row group of each, counted over all shards."""
    rows: np.ndarray
    """int64 [n]: the row within its row group."""
    epoch: int


@dataclass(frozen=True)
class ReadPlan:
    """The order of all images over all epochs of a run."""

    group_rows: tuple[int, ...]
    """Rows of each row group, over all shards in order."""
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
        # Neither hashes nor sums all row groups: for 10^6 rows in 25,000 groups that took 12 ms
        # per batch.
        return hash((len(self.group_rows), self.batch_size, self.epochs, self.seed))

    @cached_property
    def rows(self) -> int:
        return sum(self.group_rows)

    @property
    def steps_per_epoch(self) -> int:
        return self.rows // self.batch_size

    @property
    def tail(self) -> int:
        """Images left over in each epoch after the last full global batch; they differ by epoch."""
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
        """The rank of each view within its global batch, in [0, 1): positions int64 [n] -> float64
        [n, views]. Each of a batch's B * views equal parts of [0, 1) contains one, in random order.
        """
        steps = positions // self.batch_size
        drawn = [_step_quantiles(self, int(step), views) for step in steps]
        offsets = positions % self.batch_size
        return np.stack([s[o] for s, o in zip(drawn, offsets, strict=True)])

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
def _step_quantiles(plan: ReadPlan, step: int, views: int) -> np.ndarray:
    """The quantiles of all views of a step's global batch: float [B, views]."""
    rng = np.random.default_rng((plan.seed, step, views, QUANTILES))
    count = plan.batch_size * views
    return ((rng.permutation(count) + rng.random(count)) / count).reshape(-1, views)


QUANTILES = 0x9A
"""Part of the seed of quantiles, which separates their generator from those of the order."""


@dataclass(frozen=True)
class Share:
    """The part of every global batch that one rank reads: `accumulate` consecutive
    micro-batches."""

    rank: int
    world_size: int
    accumulate: int = 1

    def __post_init__(self) -> None:
        require(0 <= self.rank < self.world_size, f"rank {self.rank} of {self.world_size}")

    def micro_batch(self, batch_size: int) -> int:
        """Images in one forward pass of one rank. Raises ValueError if the batch does not
        divide."""
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
    """`times` steps, evenly spread over a run; the last is the final step."""
    return {math.ceil(total * i / times) for i in range(1, times + 1)} if times else set()
