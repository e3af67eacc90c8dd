"""Reading what a shard is built from: image files, the members of tars, the rows of Parquet files.

Whatever is no sound image becomes a Quarantined with its reason.
"""

import collections
import itertools
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from selfray.data.files import IMAGE_EXTENSIONS, Quarantined, extension, is_ignored
from selfray.data.layout import Layout
from selfray.data.shard_set import NO_LABEL
from selfray.storage import Location, is_about_the_file, one_line

MIB = 2**20

MAX_IMAGE_BYTES = 256 * MIB
"""A larger file is quarantined unread: it would take the worker's memory, and is no photograph."""

READ_AHEAD_BYTES = 32 * MIB


class Input(NamedTuple):
    """A file of the source, or one row group of a Parquet file."""

    name: str
    bytes: int
    rows: int = 1
    """How many rows it may have at most."""
    row_group: int = 0
    first_row: int = 0


class Sample(NamedTuple):
    name: str
    data: bytes
    label: int = NO_LABEL
    path: str = ""
    """What the row's `path` says, where that is not the name."""


Row = Sample | Quarantined


def raise_if_outage(error: Exception, location: Location) -> None:
    """Raise what is a fault of the storage, not of one file: a build can go on after it, while
    quarantine would throw away sound images."""
    if isinstance(error, OSError) and not location.is_local and not is_about_the_file(error):
        raise error


def _read_files(root: Location, layout: Layout, inputs: Iterable[Input]) -> Iterator[Row]:
    labels = {name: label for label, name in enumerate(layout.label_names or ())}

    def read(entry: Input) -> Row:
        name = entry.name
        if entry.bytes > MAX_IMAGE_BYTES:
            return _too_large(name, entry.bytes)
        try:
            data = (root / name).read_bytes()
        except OSError as error:
            raise_if_outage(error, root)
            return Quarantined(name, "unreadable", one_line(error))
        folder, slash, _ = name.partition("/")
        return Sample(name, data, labels.get(folder, NO_LABEL) if slash else NO_LABEL)

    # Some files are read ahead: object stores and network disks answer slowly, but many at once.
    ahead: collections.deque[tuple[int, Future[Row]]] = collections.deque()
    bytes_ahead = 0
    with ThreadPoolExecutor(8) as pool:
        for entry in inputs:
            while ahead and (len(ahead) >= 16 or bytes_ahead + entry.bytes > READ_AHEAD_BYTES):
                size, oldest = ahead.popleft()
                bytes_ahead -= size
                yield oldest.result()
            ahead.append((entry.bytes, pool.submit(read, entry)))
            bytes_ahead += entry.bytes
        while ahead:
            yield ahead.popleft()[1].result()


def _too_large(name: str, size: int) -> Quarantined:
    message = f"the file has {size:,} bytes, more than the {MAX_IMAGE_BYTES:,} of the largest image"
    return Quarantined(name, "too large", message)


class _StrictTarInfo(tarfile.TarInfo):
    """Makes a damaged or missing header an error; tarfile takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "tarfile.TarInfo":  # type: ignore[override]
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the archive's regular end
                raise
            raise tarfile.ReadError(
                f"{error or 'no header'} at byte {tarfile_.offset}: truncated or damaged"
            ) from None


def read_tar(root: Location, name: str) -> Iterator[Row]:
    """The samples of a WebDataset tar: one for each key, in one pass over the file."""
    location = root / name
    key: str | None = None
    members: dict[str, bytes] = {}
    try:
        with (
            location.filesystem.open_input_stream(location.path) as stream,
            tarfile.open(
                fileobj=stream,  # type: ignore[arg-type]
                mode="r|",
                bufsize=MIB,
                tarinfo=_StrictTarInfo,
            ) as archive,
        ):
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every member; a tar may have millions
                if member.isdir() or is_ignored(member.name):
                    continue
                folder, base = posixpath.split(member.name)
                member_key = posixpath.join(folder, base.partition(".")[0])
                if member_key != key:
                    yield from _sample_of(name, key, members)
                    key, members = member_key, {}
                if extension(base) not in IMAGE_EXTENSIONS and not base.endswith(".cls"):
                    members.setdefault(
                        member.name, b""
                    )  # known to be there; its bytes are not used
                elif member.size > MAX_IMAGE_BYTES:
                    yield _too_large(f"{name}!{member.name}", member.size)
                elif (content := archive.extractfile(member)) is None:
                    message = "the member is a link or a device, not a file"
                    yield Quarantined(f"{name}!{member.name}", "unreadable", message)
                else:
                    members[member.name] = content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise_if_outage(error, root)
        yield from _sample_of(name, key, members)
        yield Quarantined(name, "unreadable", one_line(error))
    else:
        yield from _sample_of(name, key, members)


def _sample_of(archive: str, key: str | None, members: dict[str, bytes]) -> Iterator[Row]:
    if key is None or not members:
        return
    pictures = [name for name in members if extension(name) in IMAGE_EXTENSIONS]
    if not pictures:
        found = ", ".join(posixpath.basename(name) for name in members)
        yield Quarantined(f"{archive}!{key}", "no image", f"the sample has only {found}")
        return
    label = NO_LABEL
    for name, content in members.items():
        text = content.strip()
        if name.endswith(".cls") and text.isdigit():
            label = int(text)
    # `0001.jpg` before `0001.mask.png`
    first, *others = sorted(pictures, key=lambda name: posixpath.basename(name).count("."))
    yield Sample(f"{archive}!{first}", members[first], label)
    for name in others:
        message = f"the sample already has {posixpath.basename(first)}"
        yield Quarantined(f"{archive}!{name}", "second image", message)


def _read_row_groups(root: Location, layout: Layout, inputs: Iterable[Input]) -> Iterator[Row]:
    columns = [layout.image_column, *([layout.label_column] if layout.label_column else [])]
    for entry in inputs:
        location = root / entry.name
        row = entry.first_row
        try:
            with location.filesystem.open_input_file(location.path) as stream:
                parquet = pq.ParquetFile(stream)
                # Few rows at a time: the row groups of others are as large as a whole shard.
                for batch in parquet.iter_batches(
                    batch_size=64, row_groups=[entry.row_group], columns=columns
                ):
                    pictures = batch.column(layout.image_column).to_pylist()
                    labels: list[int | None] = [None] * len(pictures)
                    if layout.label_column:
                        labels = batch.column(layout.label_column).to_pylist()
                    for picture, label in zip(pictures, labels, strict=True):
                        yield _row_of(f"{entry.name}#row {row}", picture, label)
                        row += 1
        except (pa.ArrowException, OSError) as error:
            raise_if_outage(error, root)
            message = f"rows from {row} on in row group {entry.row_group}: {one_line(error)}"
            yield Quarantined(entry.name, "unreadable", message)


def _row_of(name: str, picture: Any, label: int | None) -> Row:
    data, path = (
        (picture, "")
        if not isinstance(picture, dict)
        else (
            picture["bytes"],
            picture.get("path") or "",
        )
    )
    if data is None:
        message = f"the row has no bytes, only the path {path}" if path else "the row has no image"
        return Quarantined(name, "no image", message)
    if len(data) > MAX_IMAGE_BYTES:
        return _too_large(name, len(data))
    return Sample(name, data, NO_LABEL if label is None else label, path)


def read_samples(root: Location, layout: Layout, inputs: Iterable[Input]) -> Iterator[Row]:
    if layout.kind == "images":
        return _read_files(root, layout, inputs)
    if layout.kind == "tar":
        return itertools.chain.from_iterable(read_tar(root, entry.name) for entry in inputs)
    return _read_row_groups(root, layout, inputs)
