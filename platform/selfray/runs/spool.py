"""The spool of a run: metrics and events as JSON lines in the run's folder.

Training processes append; readers (the console, the shipper to MLflow) keep their own byte offsets.
Every record has `time` (milliseconds since the epoch) and `kind`:

    {"time": ..., "kind": "metrics", "images_seen": 4096, "values": {"loss": 5.1}}
    {"time": ..., "kind": "tags", "values": {"probe.knn.protocol": "v1"}}
    {"time": ..., "kind": "artifact", "path": "attention/step_100.png"}   under <run>/artifacts/
    {"time": ..., "kind": "dropped", "count": 12}     records that did not fit in memory
    {"time": ..., "kind": "checkpoint", ...}          any other event, with its own fields
"""

import json
import logging
import os
import posixpath
import re
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from selfray.check import require
from selfray.masking import masked, masked_json
from selfray.storage import Location

logger = logging.getLogger(__name__)

_RESERVED = ("time", "kind")
_WRITER = re.compile(r"[\w-]+")
_FILE = re.compile(r"([\w-]+)(?:\.(\d+))?\.jsonl")
_SMALLEST_READ = 64 * 1024
_LOCAL_RETRY_SECONDS = 1.0
_CLOSE_SECONDS = 30.0


def _plain(value: Any) -> int | float | str:
    """Convert other libraries' numbers to numbers and anything else to text, so that no event
    fails.
    """
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    return masked(str(value))


@dataclass(frozen=True)
class _SpoolFile:
    """The parsed name of a spool file; `segment` is None for a file that is appended to."""

    name: str
    writer: str
    segment: int | None

    @classmethod
    def of(cls, name: str) -> "_SpoolFile | None":
        match = _FILE.fullmatch(name)
        if match is None:
            return None
        return cls(name, match[1], None if match[2] is None else int(match[2]))

    @property
    def order(self) -> int:
        return -1 if self.segment is None else self.segment


class SpoolWriter:
    """Appends one process's records to a spool folder. Storage errors are never raised to callers.

    On a local disk each record is written at once to `<writer_id>.jsonl`. An object store cannot
    append, so a background thread writes numbered segments `<writer_id>.000017.jsonl`, at most one
    per `flush_seconds`: a killed process loses up to that many seconds of records there, and none
    on a local disk. While the store fails, up to `max_pending` records wait in memory; beyond that
    the oldest are dropped and counted in a "dropped" record. Thread-safe.

    `writer_id` consists of letters, digits, `_` and `-` and must be unique among living processes:
    a restarted worker may reuse its old id, but two attempts at once may not share one.
    """

    def __init__(
        self,
        folder: Location,
        writer_id: str,
        flush_seconds: float = 10.0,
        max_pending: int = 100_000,
    ) -> None:
        require(
            _WRITER.fullmatch(writer_id) is not None,
            f"writer_id must be letters, digits, _ and -, got {writer_id!r}",
        )
        require(flush_seconds > 0, f"flush_seconds must be positive, got {flush_seconds}")
        require(max_pending > 0, f"max_pending must be positive, got {max_pending}")
        self.folder = folder
        self.writer_id = writer_id
        self._flush_seconds = flush_seconds
        self._max_pending = max_pending
        self._lock = threading.Lock()
        self._pending: deque[bytes] = deque()
        self._dropped = 0
        self._warned = False
        # Local files.
        self._descriptor: int | None = None
        self._retry_at = 0.0
        # Object stores.
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._segment: int | None = None
        self._in_flight: bytes | None = None

    def metrics(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Record numbers at a point of training; NaN and infinity are kept."""
        numbers = {name: float(value) for name, value in values.items()}
        self._write("metrics", {"images_seen": int(images_seen), "values": numbers})

    def tags(self, values: Mapping[str, str]) -> None:
        """Record facts about the run as text, such as a protocol's version."""
        self._write("tags", {"values": {name: str(value) for name, value in values.items()}})

    def event(self, kind: str, **fields: Any) -> None:
        """Record an event such as "started", "checkpoint", "warning" or "finished"."""
        for name in _RESERVED:
            require(name not in fields, f"an event's field cannot be named {name!r}")
        self._write(kind, fields)

    def close(self) -> None:
        """Write waiting records, for at most 30 seconds. The writer may be used again
        afterwards."""
        if self.folder.is_local:
            with self._lock:
                self._append()
                self._close_file()
        elif self._thread is not None:
            self._stop.set()
            self._thread.join(_CLOSE_SECONDS)
            self._thread = None
        with self._lock:
            waiting = len(self._pending) + (self._in_flight is not None)
        if waiting:
            logger.warning("%s: the last records of %s are lost", self.folder, self.writer_id)

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        line = _line(kind, fields)
        with self._lock:
            if len(self._pending) >= self._max_pending:
                self._pending.popleft()
                self._dropped += 1
            self._pending.append(line)
            if self.folder.is_local:
                if time.monotonic() >= self._retry_at:
                    self._append()
            elif self._thread is None:
                self._stop = threading.Event()
                self._thread = threading.Thread(
                    target=self._upload_until, args=(self._stop,), name="spool", daemon=True
                )
                self._thread.start()

    def _dropped_line(self) -> list[bytes]:
        return [_line("dropped", {"count": self._dropped})] if self._dropped else []

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "cannot write to %s (%s): training continues, records wait in memory",
                self.folder,
                error,
            )

    # A local disk: one write per line, so that after a full disk it is known which lines arrived.

    def _append(self) -> None:
        """Write all pending lines, or as many as the disk takes. Call with the lock held."""
        try:
            for line in self._dropped_line():
                self._append_line(line)
                self._dropped = 0
            while self._pending:
                self._append_line(self._pending[0])
                self._pending.popleft()
        except OSError as error:
            self._warn(error)
            self._close_file()
            self._retry_at = time.monotonic() + min(self._flush_seconds, _LOCAL_RETRY_SECONDS)

    def _append_line(self, line: bytes) -> None:
        if self._descriptor is None:
            self._descriptor = self._open_file()
        written = os.write(self._descriptor, line)
        if written < len(line):
            raise OSError(f"only {written} of {len(line)} bytes of a line were written")

    def _open_file(self) -> int:
        self.folder.make_folder()
        path = os.path.join(self.folder.path, f"{self.writer_id}.jsonl")
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            # A killed process or a full disk may have left half a line: end it, so that the next
            # record is not joined to it. Readers skip the half line.
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                os.write(descriptor, b"\n")
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def _close_file(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.close(descriptor)
            except OSError as error:  # a network disk may report a failed write only on close
                self._warn(error)

    # An object store: in a thread, because a request may take a minute while the store has trouble.

    def _upload_until(self, stop: threading.Event) -> None:
        stopping = False
        while not stopping:
            stopping = stop.wait(self._flush_seconds)
            try:
                self._upload()
            except Exception as error:  # each store's client raises its own types: try again later
                self._warn(error)

    def _upload(self) -> None:
        if self._segment is None:
            self.folder.make_folder()
            self._segment = self._first_free_segment()
        while True:
            with self._lock:
                if self._in_flight is None and self._pending:
                    self._in_flight = b"".join([*self._dropped_line(), *self._pending])
                    self._pending.clear()
                    self._dropped = 0
            if self._in_flight is None:
                return
            # A write that failed may still have arrived and been read, so a retry must write the
            # same bytes under the same number.
            name = f"{self.writer_id}.{self._segment:06d}.jsonl"
            (self.folder / name).write_bytes(self._in_flight)
            self._in_flight = None
            self._segment += 1

    def _first_free_segment(self) -> int:
        files = (_SpoolFile.of(posixpath.basename(info.path)) for info in self.folder.list())
        taken = [file.order for file in files if file and file.writer == self.writer_id]
        return max(taken, default=-1) + 1


def _line(kind: str, fields: dict[str, Any]) -> bytes:
    record = {"time": int(time.time() * 1000), "kind": kind, **masked_json(fields)}
    return json.dumps(record, default=_plain, separators=(",", ":")).encode() + b"\n"


class SpoolReader:
    """Reads a spool folder from offsets kept by the caller. Any number of readers may read at once.

    `corrupt` counts the lines that this reader skipped because they were not valid records.
    """

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self.corrupt = 0

    def read(
        self, offsets: Mapping[str, int], limit_bytes: int | None = None
    ) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """All complete records since `offsets` (file name -> bytes read), and the new offsets.

        Start with `{}`. A line that is still being written is left for the next call. With
        `limit_bytes`, about that much is read: call again until the offsets do not change. Records
        are sorted by time. Raises OSError if the folder cannot be read; a missing folder is empty.
        """
        reached = dict(offsets)
        # The last segment read of each writer. Segments are written in order and atomically, so the
        # newest offset implies all earlier ones, which are dropped.
        newest = {
            file.writer: file
            for file in map(_SpoolFile.of, offsets)
            if file is not None and file.segment is not None
        }
        left = limit_bytes
        records: list[dict[str, Any]] = []
        for file, size in self._files():
            last = newest.get(file.writer) if file.segment is not None else None
            if last is not None and file.order < last.order:
                continue
            if left is not None and left <= 0:
                break
            start = reached.get(file.name, 0)
            data = self._read_lines(file.name, start, size, left) if size > start else b""
            complete = data[: data.rfind(b"\n") + 1]
            records += self._parse(complete)
            # Half a line left by a dead writer must not use up the limit in every call.
            if left is not None and complete:
                left -= len(data)
            if last is not None and last != file:
                del reached[last.name]
            if file.segment is not None:
                newest[file.writer] = file
            reached[file.name] = start + len(complete)
        records.sort(key=lambda record: record["time"])
        return records, reached

    def _files(self) -> list[tuple["_SpoolFile", int]]:
        """The files and their sizes in bytes, each writer's in the order of writing."""
        found = []
        for info in self.folder.list():
            file = _SpoolFile.of(posixpath.basename(info.path))
            if file is not None and info.is_file:
                found.append((file, info.size or 0))
        return sorted(found, key=lambda item: (item[0].writer, item[0].order))

    def _read_lines(self, name: str, start: int, size: int, limit: int | None) -> bytes:
        """Bytes from `start` to the end, or about `limit` bytes, but at least one line."""
        piece = size - start if limit is None else max(limit, _SMALLEST_READ)
        data = b""
        with self.folder.filesystem.open_input_file((self.folder / name).path) as file:
            file.seek(start)
            while b"\n" not in data and start + len(data) < size:
                more = file.read(piece)
                if not more:
                    break
                data += more
        return data

    def _parse(self, lines: bytes) -> list[dict[str, Any]]:
        records = []
        for line in lines.split(b"\n"):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                self.corrupt += 1
                continue
            if _is_record(record):
                records.append(record)
            else:
                self.corrupt += 1
        return records


_LARGEST = 2**63 - 1


def _is_record(value: Any) -> bool:
    """Whether a line's JSON is a valid record; a spool may come from an untrusted source."""
    match value:
        case {"time": int(at), "kind": str(kind)} if abs(at) <= _LARGEST:
            pass
        case _:
            return False
    match kind, value:
        case "metrics", {"images_seen": int(seen), "values": dict(values)}:
            counts = 0 <= seen <= _LARGEST and not isinstance(seen, bool)
            return counts and all(map(_is_number, values.values()))
        case "tags", {"values": dict()}:
            return True
        case "artifact", {"path": str(path)}:
            return is_inside(path)
    return kind not in ("metrics", "tags", "artifact")


def _is_number(value: Any) -> bool:
    try:
        float(value)  # raises OverflowError for huge ints
    except OverflowError:
        return False
    except (TypeError, ValueError):
        return False
    return isinstance(value, int | float)


def is_inside(path: str) -> bool:
    """Whether a relative path stays inside its folder."""
    return not path.startswith("/") and ".." not in path.split("/") and "\0" not in path
