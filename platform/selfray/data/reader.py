"""Reads chosen rows of Parquet shards: image bytes and labels. Needs only pyarrow."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from selfray.data.row_cache import RowGroupCache, UnreadableShard
from selfray.data.shard_set import NO_LABEL, ShardFile, ShardSet
from selfray.storage import Location

REMOTE_READS = 16
"""Largest number of concurrent requests of a task."""
CACHE = RowGroupCache(limit_bytes=256 * 2**20)


@dataclass(frozen=True)
class ChosenRows:
    """Rows of a data set, in the requested order."""

    images: list[bytes]
    """The n encoded images; empty bytes for a row without image or in an unreadable shard."""
    labels: np.ndarray
    """int64 [n]; -1 for none."""
    unreadable: dict[int, UnreadableShard]
    """The reasons for unreadable rows, by index among the n rows."""


def read_chosen(
    shards: ShardSet, groups: np.ndarray, rows: np.ndarray, cache: RowGroupCache = CACHE
) -> ChosenRows:
    """Read the chosen rows, given by groups int64 [n] and rows int64 [n].

    A lost or damaged shard affects only its own rows. Raises OSError if the storage fails for
    longer than it is retried.
    """
    chosen = ChosenRows([b""] * len(rows), np.full(len(rows), NO_LABEL, dtype=np.int64), {})
    where = _group_index(shards)

    def take(group: int) -> None:
        wanted = np.flatnonzero(groups == group)
        try:
            file, index_in_file = where[group]
            taken = cache.take(shards, file, index_in_file, rows[wanted])
        except UnreadableShard as error:
            chosen.unreadable.update(dict.fromkeys(wanted.tolist(), error))
            return
        for index, data in zip(wanted, taken.images, strict=True):
            chosen.images[index] = data
        chosen.labels[wanted] = taken.labels
        first = sum(file.group_rows[:index_in_file])
        for place, reason in taken.faults.items():
            row = first + int(rows[wanted[place]])
            error = UnreadableShard(f"{file.uri} row {row}", reason)
            chosen.unreadable[int(wanted[place])] = error

    distinct = np.unique(groups).tolist()
    if len(distinct) < 2 or Location.of(where[distinct[0]][0].uri).is_local:
        for group in distinct:
            take(group)
    else:
        # A request to an object store takes about 10 ms before its first byte.
        with ThreadPoolExecutor(REMOTE_READS) as pool:
            list(pool.map(take, distinct))
    return chosen


def read_rows(
    shards: ShardSet, groups: np.ndarray, rows: np.ndarray, cache: RowGroupCache = CACHE
) -> tuple[list[bytes], np.ndarray]:
    """(encoded images, labels int64 [n]) of chosen rows in order. A label is -1 for none; an image
    is empty bytes if the row has none or its shard cannot be read."""
    chosen = read_chosen(shards, groups, rows, cache)
    return chosen.images, chosen.labels


@lru_cache(maxsize=8)
def _group_index(shards: ShardSet) -> list[tuple[ShardFile, int]]:
    return [(file, i) for file in shards.files for i in range(len(file.group_rows))]


def sample_rows(shards: ShardSet, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(groups, rows), int64 [count] each, of a random sample of rows that follows from the seed."""
    return placed(shards, np.random.default_rng(seed).permutation(shards.rows)[:count])


def placed(shards: ShardSet, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(groups, rows), int64 [n] each, of rows int64 [n] that are counted over the data set."""
    starts = np.concatenate([[0], np.cumsum(shards.group_rows)])
    groups = np.searchsorted(starts, chosen, side="right") - 1
    return groups.astype(np.int64), (chosen - starts[groups]).astype(np.int64)
