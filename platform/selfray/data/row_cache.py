"""A process's cache of row groups, of image offsets and of open files."""

import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selfray.data.checksums import checksums_in, footer_is_checked, of_group
from selfray.data.columns import labels_of
from selfray.data.parquet_pages import value_places
from selfray.data.row_group import HeldGroup, Taken, damaged, images_of, read_group, rows_of
from selfray.data.shard_set import NO_LABEL, ShardFile, ShardSet
from selfray.storage import Location, is_about_the_file, one_line, patiently

_Result = TypeVar("_Result")


class UnreadableShard(OSError):  # noqa: N818 - it names the file, not the fault
    """Raised for a lost or damaged shard or row group: `name` says which, `reason` why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


_Key = tuple[str, int, tuple[str, str | None], object]


@dataclass(frozen=True)
class _Places:
    """A row group whose images are read one by one."""

    places: np.ndarray
    """int64 [rows, 2]: (offset, length) of each image in the file."""
    labels: np.ndarray
    """int64 [rows]."""
    stamp: "_Stamp"
    """The stamp of the file to which the offsets belong."""
    checksums: np.ndarray | None = None
    """uint32 [rows] of the images; None if the file has none."""


_Stamp = tuple[int, ...]
"""Size, time of change and inode, which distinguish a file from one that replaced it."""


@dataclass(frozen=True)
class _OpenFile:
    stream: pa.NativeFile
    footer: pq.FileMetaData
    stamp: _Stamp
    asked: float
    """When the stamp was last verified, by time.monotonic."""
    checksums: np.ndarray | None = None
    """uint32 [rows] of the file's images; None if it has none."""
    is_checked: bool = False
    """Whether its footer has a valid checksum."""

    def of_group(self, group: int) -> np.ndarray | None:
        """The checksums of a row group's images."""
        if self.checksums is None:
            return None
        return of_group(self.footer, self.checksums, group)


class RowGroupCache:
    """Caches whole row groups up to a number of bytes and, beyond that, the offsets of their
    images.

    A small data set soon fits in memory. In a larger one, whole row groups would evict each other
    before their other rows are needed, so images are read one by one (parquet_pages.py) if the
    files are plain, as `selfray shards build` writes them. Unreadable shards are remembered for a
    while. The cache is thread-safe.
    """

    FORGET_SECONDS = 300.0
    """A lost shard is not tried again for this long, because each try may wait for the storage."""
    OPEN_FILES = 256
    ASK_SECONDS = 60.0
    """An object is checked for replacement at most this often, because each check is a request."""
    KNOWN_IMAGES = 2_000_000
    """Largest number of images whose offsets are kept, 24 bytes each."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._tables: OrderedDict[_Key, HeldGroup] = OrderedDict()
        self._bytes = 0
        self._places: OrderedDict[_Key, _Places] = OrderedDict()
        self._placed = 0
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._is_plain: dict[tuple[str, str], bool] = {}
        """Whether a file's images have offsets, by name and column; checked once."""
        self._unreadable: dict[tuple[str, int | None], tuple[float, UnreadableShard]] = {}
        self._lock = threading.Lock()
        self._check = threading.Lock()

    def take(self, shards: ShardSet, file: ShardFile, group: int, rows: np.ndarray) -> Taken:
        """Read rows int64 [n] of a row group.

        Raises UnreadableShard if the file is lost or damaged, OSError if its storage fails for
        longer than it is retried.
        """
        label = shards.label_column if file.classes is not None else None
        key = (file.uri, group, (shards.image_column, label), file.classes)
        taken = self._take(key, shards, file, group, rows)
        if file.label != NO_LABEL:
            taken.labels.fill(file.label)
        return taken

    def _take(
        self, key: "_Key", shards: ShardSet, file: ShardFile, group: int, rows: np.ndarray
    ) -> Taken:
        known = self._known(key)
        if isinstance(known, HeldGroup):
            return rows_of(known, shards, file, rows)
        self._raise_if_known_unreadable(file, group)
        try:
            for places in (known, None):
                if places is None:
                    places = self._learn(key, shards, file, group)
                if isinstance(places, HeldGroup):
                    return rows_of(places, shards, file, rows)
                images = self._images_at(places, file, group, rows)
                if images is not None:
                    faults = damaged(images, rows, places.checksums)
                    for index in faults:
                        images[index] = b""
                    return Taken(images, places.labels[rows], faults)
            raise UnreadableShard(file.uri, "it is being written while it is read")
        except UnreadableShard as error:
            until = time.monotonic() + self.FORGET_SECONDS
            self._unreadable[file.uri, None if error.name == file.uri else group] = (until, error)
            raise

    def _raise_if_known_unreadable(self, file: ShardFile, group: int) -> None:
        for known in ((file.uri, None), (file.uri, group)):
            until, error = self._unreadable.get(known, (0.0, None))
            if error is not None and time.monotonic() < until:
                raise error

    def _known(self, key: "_Key") -> "HeldGroup | _Places | None":
        with self._lock:
            for kept in (self._tables, self._places):
                if key in kept:
                    kept.move_to_end(key)
                    return kept[key]
        return None

    def _learn(
        self, key: "_Key", shards: ShardSet, file: ShardFile, group: int
    ) -> "HeldGroup | _Places":
        with self._lock:
            count = len(self._tables)
            is_full = count > 0 and self._bytes * (count + 1) / count > self.limit_bytes
        if is_full and self._is_plain.get((file.uri, shards.image_column), True):
            places = self._find(shards, file, group)
            if places is not None:
                self._store_places(key, places)
                return places
        table = self._read(file, group, *key[2])
        with self._lock:
            if key not in self._tables:
                self._tables[key] = table
                self._bytes += table.table.nbytes
            while self._bytes > self.limit_bytes and len(self._tables) > 1:
                self._bytes -= self._tables.popitem(last=False)[1].table.nbytes
        return table

    def _store_places(self, key: "_Key", places: _Places) -> None:
        with self._lock:
            known = self._places.pop(key, None)
            self._placed += len(places.labels) - (0 if known is None else len(known.labels))
            self._places[key] = places
            while self._placed > self.KNOWN_IMAGES and len(self._places) > 1:
                self._placed -= len(self._places.popitem(last=False)[1].labels)

    def _find(self, shards: ShardSet, file: ShardFile, group: int) -> _Places | None:
        """The offsets of a row group's images; None if the group must be read as a whole."""
        is_local = Location.of(file.uri).is_local
        places = self._with_file(
            file, group, lambda opened: _places_in(opened, shards, file, group, is_local)
        )
        name = (file.uri, shards.image_column)
        with self._check:
            if places is None:
                self._is_plain[name] = False
            elif name not in self._is_plain:
                # Compare once with pyarrow's own reading, so that wrong offsets are found before an
                # image is used.
                read = self._read(file, group, shards.image_column, None)
                ends = np.array([0, len(read.table) - 1])
                images = images_of(read.table.column(shards.image_column), file, ends, {})
                self._is_plain[name] = self._images_at(places, file, group, ends) == images
        return places if self._is_plain[name] else None

    def _images_at(
        self, places: _Places, file: ShardFile, group: int, rows: np.ndarray
    ) -> list[bytes] | None:
        """Read images at their offsets; None if these belong to an earlier file of that name."""
        wanted = places.places[rows].tolist()

        def read(opened: _OpenFile) -> list[bytes] | None:
            if opened.stamp != places.stamp:
                return None
            images = [opened.stream.read_at(length, at) for at, length in wanted]
            if any(len(data) < length for data, (_, length) in zip(images, wanted, strict=True)):
                raise pa.ArrowInvalid("the file was cut short")
            return images

        return self._with_file(file, group, read)

    def _with_file(
        self, file: ShardFile, group: int, action: Callable[[_OpenFile], _Result]
    ) -> _Result:
        """Call action(open file), and retry while its storage fails; raises the errors of
        `take`."""
        location = Location.of(file.uri)
        name = file.uri

        def attempt() -> _Result:
            nonlocal name
            name = file.uri
            opened = self._open(file, location)
            name = f"{file.uri} row group {group}"
            try:
                return action(opened)
            except (OSError, pa.ArrowException):
                self._forget(file.uri)
                raise

        with _faults_named(location, lambda: name):
            return patiently(attempt, location)

    def _forget(self, uri: str) -> None:
        with self._lock:
            self._files.pop(uri, None)

    def _open(self, file: ShardFile, location: Location) -> _OpenFile:
        with self._lock:
            opened = self._files.get(file.uri)
        if opened is not None:
            opened = _still(opened, location, self.ASK_SECONDS)
        opened = opened or self._open_anew(file, location)
        with self._lock:
            self._files[file.uri] = opened
            self._files.move_to_end(file.uri)
            while len(self._files) > self.OPEN_FILES:
                self._files.popitem(last=False)
        return opened

    def _open_anew(self, file: ShardFile, location: Location) -> _OpenFile:
        try:
            opened = _opened(location)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            with self._lock:
                self._files.clear()
            opened = _opened(location)
        rows = [opened.footer.row_group(i).num_rows for i in range(opened.footer.num_row_groups)]
        if rows != list(file.group_rows):
            raise pa.ArrowInvalid("its row groups have changed since the start")
        return opened

    @staticmethod
    def _read(file: ShardFile, group: int, image: str, label: str | None) -> HeldGroup:
        location = Location.of(file.uri)
        name = file.uri

        def read() -> HeldGroup:
            nonlocal name
            with location.filesystem.open_input_file(location.path) as stream:
                is_checked = footer_is_checked(stream)
                parquet = pq.ParquetFile(stream, page_checksum_verification=True)
                found = parquet.metadata.num_row_groups
                if found != len(file.group_rows):
                    raise pa.ArrowInvalid(
                        f"{found} row groups where there were {len(file.group_rows)} at the start"
                    )
                name = f"{file.uri} row group {group}"
                rows = parquet.metadata.row_group(group).num_rows
                if rows != file.group_rows[group]:
                    raise pa.ArrowInvalid(
                        f"{rows} rows where there were {file.group_rows[group]} at the start"
                    )
                return read_group(stream, parquet, group, image, label, is_checked)

        with _faults_named(location, lambda: name):
            return patiently(read, location)


def _opened(location: Location) -> _OpenFile:
    # Before opening: if the file is replaced in between, the stamp is outdated and is noticed.
    stamp = _stamp_of(location)
    stream = location.filesystem.open_input_file(location.path)
    is_checked = footer_is_checked(stream)
    footer = pq.ParquetFile(stream).metadata
    checksums = checksums_in(footer) if is_checked else None
    return _OpenFile(stream, footer, stamp, time.monotonic(), checksums, is_checked)


def _stamp_of(location: Location) -> _Stamp:
    if location.is_local:
        found = os.stat(location.path)
        return found.st_size, found.st_mtime_ns, found.st_ino
    info = location.filesystem.get_file_info(location.path)
    return info.size or 0, info.mtime_ns or 0


def _still(opened: _OpenFile, location: Location, seconds: float) -> _OpenFile | None:
    """The open file if it was not replaced, else None. Object stores are checked again only after
    `seconds`, local files in every call. A deleted local file can still be read."""
    now = time.monotonic()
    if not location.is_local and now - opened.asked < seconds:
        return opened
    try:
        same = _stamp_of(location) == opened.stamp
    except OSError:
        if not location.is_local:
            raise  # the store is away: the caller retries
        same = True
    return replace(opened, asked=now) if same else None


def _places_in(
    opened: _OpenFile, shards: ShardSet, file: ShardFile, group: int, is_local: bool
) -> _Places | None:
    kind = opened.footer.schema.to_arrow_schema().field(shards.image_column).type
    column = shards.image_column + (".bytes" if pa.types.is_struct(kind) else "")
    checksums = opened.of_group(group)
    if not opened.is_checked:
        # If an unverified footer is damaged, this read raises an error, whereas value_places below
        # would crash the process.
        parquet = pq.ParquetFile(opened.stream, metadata=opened.footer)
        next(parquet.iter_batches(1, [group], [column]), None)
    places = value_places(
        lambda at, n: opened.stream.read_at(n, at),
        opened.footer,
        group,
        column,
        at_once=not is_local,
        checked=checksums is not None,
    )
    if places is None:
        return None
    labels = np.full(len(places), NO_LABEL, dtype=np.int64)
    if shards.label_column and file.classes is not None:
        parquet = pq.ParquetFile(
            opened.stream, metadata=opened.footer, page_checksum_verification=True
        )
        table = parquet.read_row_group(group, columns=[shards.label_column])
        if table.num_rows != len(places):
            raise pa.ArrowInvalid(f"{table.num_rows} labels of {len(places)} images")
        labels = labels_of(table.column(0), file.classes)
    return _Places(places, labels, opened.stamp, checksums)


@contextmanager
def _faults_named(location: Location, name: Callable[[], str]) -> Iterator[None]:
    """Turn pyarrow's errors about a lost or damaged file into UnreadableShard."""
    try:
        yield
    except pa.ArrowException as error:
        raise UnreadableShard(name(), one_line(error)) from error
    except OSError as error:
        if not location.is_local and not is_about_the_file(error):
            raise  # the store was away for longer than it was retried: not a fault of the file
        raise UnreadableShard(name(), _reason(error)) from error


def _reason(error: OSError) -> str:
    return "the file is gone" if isinstance(error, FileNotFoundError) else one_line(error)
