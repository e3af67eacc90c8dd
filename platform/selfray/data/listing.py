"""What shards are made from: a folder of images, WebDataset tars or Parquet files, as a plan.

A plan is data: every shard number belongs to one work item, and a work item's shards follow from
its inputs and the seed alone. `make_plan` lists a source, `read_samples` yields what a work item's
inputs hold.

What is passed over without a word: files and folders whose name starts with a dot, Thumbs.db,
desktop.ini and __MACOSX; beside Parquet files or tars, every other file. Whatever else is no sound
image becomes a Quarantined with its reason.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import posixpath
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from selfray.check import require
from selfray.data.reader import LABEL_COLUMNS, NO_LABEL
from selfray.pixels import codecs
from selfray.storage import Location

MIB = 2**20

MAX_IMAGE_BYTES = 256 * MIB
"""A larger file is quarantined unread: it would take the worker's memory, and is no photograph."""

READ_AHEAD_BYTES = 32 * MIB

TAR_SAMPLE_BYTES = 1024
"""No member of a tar takes less: 512 bytes of header, and its content in blocks of 512."""

# fmt: off
IMAGE_EXTENSIONS = frozenset({
    "avif", "bmp", "gif", "heic", "jfif", "jp2", "jpe", "jpeg", "jpg",
    "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp",
})
# fmt: on
IGNORED_NAMES = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX"})

LabelRule = Literal["auto", "folders", "none"]
SourceKind = Literal["images", "tar", "parquet"]


@dataclass(frozen=True)
class BuildOptions:
    max_side: int | None = None
    """Shrink images so that the longer side has at most this many pixels, as JPEGs of quality 95,
    whatever their format was; None keeps the bytes. Smaller images keep their bytes too."""
    shard_bytes: int = 128 * MIB
    """Target size of a shard. One task takes about three times this memory: 155 MiB were measured
    for shards of 64 MiB from a folder, 212 MiB from a tar."""
    max_pixels: int = codecs.MAX_PIXELS
    """Images with more pixels than this are quarantined before they are decoded."""
    labels: LabelRule = "auto"
    """auto: class folders where every image lies exactly one level down in at least two folders,
    `.cls` members of tars, an integer label column of Parquet. folders: the first folder below the
    source is the class, whatever lies deeper. none: no labels."""
    seed: int = 0
    image_column: str | None = None
    """Parquet sources only: the column that holds the images; None finds it."""

    def __post_init__(self) -> None:
        require(
            self.max_side is None or self.max_side > 0,
            f"max_side must be positive or None, got {self.max_side}",
        )
        require(self.shard_bytes > 0, f"shard_bytes must be positive, got {self.shard_bytes}")
        require(self.max_pixels > 0, f"max_pixels must be positive, got {self.max_pixels}")
        require(
            self.labels in ("auto", "folders", "none"),
            f"labels must be auto, folders or none, got {self.labels!r}",
        )


# The plan ---------------------------------------------------------------------------------------


class Quarantined(NamedTuple):
    file: str
    """Name inside the source: `a/b.jpg`, `archive.tar!member`, `file.parquet#row 17`."""
    reason: str
    message: str


class Input(NamedTuple):
    """A file of the source, or one row group of a Parquet file."""

    name: str
    bytes: int
    rows: int = 1
    """How many rows it may have at most."""
    row_group: int = 0
    first_row: int = 0


@dataclass(frozen=True)
class WorkItem:
    """What one task does: these inputs become these shards (some may stay empty)."""

    first_shard: int
    shards: int
    inputs: tuple[Input, ...]

    @property
    def shard_numbers(self) -> range:
        return range(self.first_shard, self.first_shard + self.shards)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.inputs)


@dataclass(frozen=True)
class Layout:
    """How the source is read, and whether its rows have labels."""

    kind: SourceKind
    has_labels: bool
    label_names: tuple[str, ...] | None = None
    image_column: str = "image"
    label_column: str | None = None


@dataclass(frozen=True)
class Plan:
    source: Location
    """The folder that inputs are named from."""
    source_uri: str
    """What the user asked for."""
    layout: Layout
    options: BuildOptions
    items: tuple[WorkItem, ...]
    quarantined: tuple[Quarantined, ...]
    """What could not even be listed or opened."""
    images_total: int | None
    files: int
    bytes: int
    fingerprint: str

    def identity(self) -> dict[str, Any]:
        """What must be equal for two builds to be the same build."""
        return {
            "source": self.source_uri,
            "options": dataclasses.asdict(self.options),
            "files": self.files,
            "bytes": self.bytes,
            "fingerprint": self.fingerprint,
        }


class _File(NamedTuple):
    name: str
    bytes: int
    modified_ns: int


def make_plan(source: Location, options: BuildOptions) -> Plan:
    """List a source and divide it into work items; reads names, sizes and Parquet footers only.

    FileNotFoundError where the source does not exist; ValueError where it holds nothing to build.
    """
    root, files, quarantined = _list_source(source)
    kind, files = _select(source, files)
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(options), sort_keys=True).encode())
    for file in files:
        digest.update(json.dumps(file).encode())

    require(
        options.labels != "folders" or kind == "images",
        f'labels "folders" needs a folder of images, but {source} holds {kind} files: use "auto"',
    )
    images_total: int | None = None
    if kind == "images":
        inputs = [Input(file.name, file.bytes) for file in files]
        names = _class_folders(source, files, options.labels)
        layout = Layout(kind, names is not None, names)
        images_total = len(files)
    elif kind == "tar":
        inputs = [Input(file.name, file.bytes, file.bytes // TAR_SAMPLE_BYTES) for file in files]
        layout = Layout(kind, options.labels != "none" and _tars_have_labels(root, files))
    else:
        inputs, layout, images_total, broken = _plan_parquet(source, root, files, options)
        quarantined += broken
    random.Random(f"{options.seed} inputs").shuffle(inputs)
    return Plan(
        source=root,
        source_uri=source.uri,
        layout=layout,
        options=options,
        items=tuple(_pack(inputs, options.shard_bytes)),
        quarantined=tuple(quarantined),
        images_total=images_total,
        files=len(files),
        bytes=sum(file.bytes for file in files),
        fingerprint=digest.hexdigest(),
    )


def _pack(inputs: Iterable[Input], shard_bytes: int) -> Iterator[WorkItem]:
    """Gather inputs until the next one would lead away from the target; a large one is divided."""
    first = 0
    gathered: list[Input] = []

    def close() -> WorkItem:
        rows = sum(entry.rows for entry in gathered)
        shards = round(sum(entry.bytes for entry in gathered) / shard_bytes)
        return WorkItem(first, max(1, min(shards, rows)), tuple(gathered))

    total = 0
    for entry in inputs:
        if gathered and total + entry.bytes / 2 > shard_bytes:
            item = close()
            yield item
            first, total = first + item.shards, 0
            gathered.clear()
        gathered.append(entry)
        total += entry.bytes
    if gathered:
        yield close()


def _list_source(source: Location) -> tuple[Location, list[_File], list[Quarantined]]:
    """(the folder that names count from, files sorted by name, what could not be listed)."""
    info = source.info()
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(
            f"{source} does not exist: give a folder of images, or .tar or .parquet files"
        )
    if info.type == fs.FileType.File:
        kinds = (".tar", ".parquet")
        require(
            source.path.endswith(kinds),
            f"{source} is a file, but neither .tar nor .parquet: give a folder of images, "
            "a .tar or a .parquet file",
        )
        parent = Location(
            source.filesystem, posixpath.dirname(source.path), posixpath.dirname(source.uri)
        )
        return parent, [_File(source.name, info.size or 0, info.mtime_ns or 0)], []
    if source.is_local:
        files, quarantined = _walk(source.path)
    else:
        prefix = len(source.path.rstrip("/")) + 1
        listed = source.list(recursive=True)
        files = [
            _File(info.path[prefix:], info.size or 0, info.mtime_ns or 0)
            for info in listed
            if info.is_file
        ]
        quarantined = []
    files = sorted(file for file in files if not _is_ignored(file.name))
    require(bool(files or quarantined), f"{source} is empty: give a folder that holds images")
    return source, files, quarantined


def _walk(root: str) -> tuple[list[_File], list[Quarantined]]:
    """All files below a local folder.

    pyarrow's own listing follows links in a circle, giving each image forty times, leaves dangling
    links out and gives up at the first folder that it may not open.
    """
    files: list[_File] = []
    quarantined: list[Quarantined] = []

    def visit(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            message = "this link leads back to a folder above it"
            quarantined.append(Quarantined(prefix.rstrip("/"), "unreadable", message))
            return
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = prefix + entry.name
                if _is_ignored(name):
                    continue
                try:
                    name.encode()
                    if entry.is_dir():
                        visit(entry.path, name + "/", above | {identity})
                    elif not entry.is_file():
                        kind = "a link to nowhere" if entry.is_symlink() else "no regular file"
                        quarantined.append(Quarantined(name, "unreadable", f"this is {kind}"))
                    else:
                        status = entry.stat()
                        files.append(_File(name, status.st_size, status.st_mtime_ns))
                except UnicodeEncodeError:
                    shown = name.encode(errors="backslashreplace").decode()
                    message = "the file name is not UTF-8: rename the file"
                    quarantined.append(Quarantined(shown, "unreadable", message))
                except OSError as error:
                    quarantined.append(Quarantined(name, "unreadable", one_line(error)))

    visit(root, "", frozenset())
    return files, quarantined


def _is_ignored(name: str) -> bool:
    return any(
        part in IGNORED_NAMES or (part.startswith(".") and part not in (".", ".."))
        for part in name.split("/")
    )


def _extension(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()


def _select(source: Location, files: list[_File]) -> tuple[SourceKind, list[_File]]:
    """(what kind of source this is, the files that belong to it)."""
    by_kind: dict[SourceKind, list[_File]] = {"images": [], "tar": [], "parquet": []}
    for file in files:
        extension = _extension(file.name)
        if extension in IMAGE_EXTENSIONS:
            by_kind["images"].append(file)
        elif extension == "tar":
            by_kind["tar"].append(file)
        elif extension == "parquet":
            by_kind["parquet"].append(file)
    present: list[SourceKind] = [kind for kind, found in by_kind.items() if found]
    if len(present) > 1:
        found = ", ".join(f"{len(by_kind[kind])} {kind}" for kind in present)
        raise ValueError(
            f"{source} holds files of several kinds ({found}): give a folder of one kind"
        )
    if present in (["tar"], ["parquet"]):
        return present[0], by_kind[present[0]]
    # Not by_kind["images"]: an image may have no extension or a wrong one, and what is no image
    # is to be reported.
    return "images", files


def _class_folders(
    source: Location, files: Sequence[_File], rule: LabelRule
) -> tuple[str, ...] | None:
    """The sorted names of the folders that are classes; None where folders are no classes."""
    pictures = [f.name.split("/") for f in files if _extension(f.name) in IMAGE_EXTENSIONS]
    folders = tuple(sorted({parts[0] for parts in pictures if len(parts) > 1}))
    if rule == "none":
        return None
    if rule == "folders":
        outside = next((parts[0] for parts in pictures if len(parts) == 1), None)
        require(
            outside is None and bool(folders),
            f'labels "folders" needs every image in a class folder, but {source} '
            + (f"holds {outside} itself" if outside else "has no folder with images")
            + ': move it, or use labels "none"',
        )
        return folders
    return folders if len(folders) >= 2 and all(len(parts) == 2 for parts in pictures) else None


def _tars_have_labels(root: Location, files: Sequence[_File]) -> bool:
    """Whether the first image that can be read has a label."""
    for file in files:
        for sample in _read_tar(root, file.name):
            if isinstance(sample, Sample):
                return sample.label != NO_LABEL
    return False


def _plan_parquet(
    source: Location, root: Location, files: Sequence[_File], options: BuildOptions
) -> tuple[list[Input], Layout, int, list[Quarantined]]:
    """(one input for each row group, the layout by the first sound file, rows, broken files)."""

    def schema_and_groups(file: _File) -> tuple[pa.Schema, list[Input]] | Quarantined:
        location = root / file.name
        try:
            with location.filesystem.open_input_file(location.path) as stream:
                metadata = pq.ParquetFile(stream).metadata
        except (pa.ArrowException, OSError) as error:
            raise_if_outage(error, root)
            return Quarantined(file.name, "unreadable", one_line(error))
        inputs, first_row = [], 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            rows = group.num_rows
            inputs.append(Input(file.name, group.total_byte_size, rows, index, first_row))
            first_row += rows
        return metadata.schema.to_arrow_schema(), inputs

    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(schema_and_groups, files))
    broken, sound = [], []
    for file, footer in zip(files, footers, strict=True):
        if isinstance(footer, Quarantined):
            broken.append(footer)
        else:
            sound.append((file.name, *footer))
    require(
        bool(sound),
        f"none of the {len(files)} Parquet files of {source} can be read; "
        + (f"{broken[0].file}: {broken[0].message}" if broken else ""),
    )
    first_name, first_schema, _ = sound[0]
    layout = _parquet_layout(root / first_name, first_schema, options)
    inputs: list[Input] = []
    for name, schema, groups in sound:
        lacking = sorted(
            {layout.image_column, layout.label_column or layout.image_column} - set(schema.names)
        )
        if lacking:
            message = f"the file lacks the column {', '.join(lacking)}"
            broken.append(Quarantined(name, "unreadable", message))
        else:
            inputs += [group for group in groups if group.rows]
    rows = sum(group.rows for group in inputs)
    require(rows > 0, f"{source} holds no image: its {len(files)} Parquet files have no rows")
    return inputs, layout, rows, broken


def _parquet_layout(file: Location, schema: pa.Schema, options: BuildOptions) -> Layout:
    def holds_images(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return any(f.name == "bytes" and holds_images(f.type) for f in kind.fields)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    columns = ", ".join(f"{f.name}: {f.type}" for f in schema)
    candidates = [f.name for f in schema if holds_images(f.type)]
    wanted = options.image_column
    if wanted is not None:
        require(
            wanted in candidates,
            f"image_column {wanted} holds no images in {file}, whose columns are {columns}",
        )
        image = wanted
    else:
        require(
            bool(candidates),
            f"{file} has no image column (binary, or struct<bytes, path>): it has {columns}",
        )
        image = next((name for name in ("image", "img") if name in candidates), candidates[0])
        require(
            image in ("image", "img") or len(candidates) == 1,
            f"{file} has several columns that may hold images ({', '.join(candidates)}): "
            "choose one with image_column",
        )
    if options.labels == "none":
        return Layout("parquet", False, image_column=image)
    label = next(
        (
            n
            for n in LABEL_COLUMNS
            if n in schema.names and pa.types.is_integer(schema.field(n).type)
        ),
        None,
    )
    names = None
    if label is not None and b"huggingface" in (schema.metadata or {}):
        info = json.loads(schema.metadata[b"huggingface"])
        feature = info.get("info", info).get("features", {}).get(label, {})
        names = tuple(feature["names"]) if feature.get("names") else None
    return Layout("parquet", label is not None, names, image, label)


# Reading a work item ----------------------------------------------------------------------------


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
    about_the_file = isinstance(error, FileNotFoundError | PermissionError) or (
        "ACCESS_DENIED" in str(error)
    )
    if isinstance(error, OSError) and not location.is_local and not about_the_file:
        raise error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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


def _read_tar(root: Location, name: str) -> Iterator[Row]:
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
                if member.isdir() or _is_ignored(member.name):
                    continue
                folder, base = posixpath.split(member.name)
                member_key = posixpath.join(folder, base.partition(".")[0])
                if member_key != key:
                    yield from _sample_of(name, key, members)
                    key, members = member_key, {}
                if _extension(base) not in IMAGE_EXTENSIONS and not base.endswith(".cls"):
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
    pictures = [name for name in members if _extension(name) in IMAGE_EXTENSIONS]
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
        return itertools.chain.from_iterable(_read_tar(root, entry.name) for entry in inputs)
    return _read_row_groups(root, layout, inputs)
