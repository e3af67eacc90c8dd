"""Images of any origin -> Parquet shards with a manifest, in parallel on Ray.

Sources are a folder of images, WebDataset tars or Parquet files; local, s3:// or gs://. A build is
planned as data first: every shard number belongs to one work item, and a work item's shards follow
from its inputs and the seed alone. So any worker can build any shard, the same source and options
give the same bytes, and an interrupted build goes on where it stopped.

While a build runs, DST/_build holds the plan and one record for each finished shard; manifest.json
is written last and marks the build complete.

What is passed over without a word: files and folders whose name starts with a dot, Thumbs.db,
desktop.ini and __MACOSX; beside Parquet files or tars, every other file. Whatever else is no sound
image is listed in quarantine.jsonl with its reason.
"""

import collections
import dataclasses
import hashlib
import io
import itertools
import json
import os
import posixpath
import random
import re
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.exceptions
from PIL import Image
from pyarrow import fs

from selfray import images
from selfray.shards import LABEL_COLUMNS, NO_LABEL
from selfray.storage import Location
from selfray.views import require

MIB = 2**20
ROW_GROUP_BYTES = 4 * MIB
ROW_GROUP_ROWS = 1024
"""Row groups are small because the reader shuffles by row groups and reads each of them whole."""

MAX_IMAGE_BYTES = 256 * MIB
"""A larger file is quarantined unread: it would take the worker's memory, and is no photograph."""

READ_AHEAD_BYTES = 32 * MIB

TAR_SAMPLE_BYTES = 1024
"""No member of a tar takes less: 512 bytes of header, and its content in blocks of 512."""

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
BUILD_FOLDER = "_build"  # readers of Parquet folders pass over names that start with _
PLAN = "plan.json"

# fmt: off
IMAGE_EXTENSIONS = frozenset({
    "avif", "bmp", "gif", "heic", "jfif", "jp2", "jpe", "jpeg", "jpg",
    "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp",
})
# fmt: on
IGNORED_NAMES = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX"})

LabelRule = Literal["auto", "folders", "none"]
SourceKind = Literal["images", "tar", "parquet"]


# What the caller sees ---------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildOptions:
    max_side: int | None = None
    """Shrink images so that the longer side has at most this many pixels; None keeps the bytes."""
    shard_bytes: int = 128 * MIB
    """Target size of a shard. One task takes about three times this memory: 155 MiB were measured
    for shards of 64 MiB from a folder, 212 MiB from a tar."""
    max_pixels: int = images.MAX_PIXELS
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


@dataclass(frozen=True)
class Progress:
    images_done: int
    """Images that lie in finished shards."""
    images_total: int | None
    """How many there may be at most; None for tars, which have no table of contents."""
    quarantined: int
    shards_done: int
    shards_total: int
    seconds: float
    bytes: int
    """Size of the finished shards."""
    note: str = ""
    """A line for the user when there is something to say, such as that a build is continued."""


@dataclass(frozen=True)
class Shard:
    name: str
    rows: int
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]
    """Rows of each row group."""


@dataclass(frozen=True)
class Labels:
    names: tuple[str, ...] | None
    """names[label] is the class's name; None where the source has integers only."""
    counts: dict[str, int]
    """Images of each class, by name, or by the integer as text where there is no name."""
    unlabelled: int
    """Images with label -1: the source has labels, but none for these."""


@dataclass(frozen=True)
class Spread:
    """Sizes in pixels over all stored images."""

    min: int
    median: int
    max: int


@dataclass(frozen=True)
class QuarantineCount:
    count: int
    reasons: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds; stored as manifest.json."""

    source: str
    options: dict[str, Any]
    images: int
    bytes: int
    labels: Labels | None
    shards: tuple[Shard, ...]
    image_width: Spread
    image_height: Spread
    formats: dict[str, int]
    quarantined: QuarantineCount
    max_side: int | None
    plan: dict[str, Any]
    """files, bytes and fingerprint of the source's listing: tells one build from another."""

    FORMAT = "selfray-shards"
    VERSION = 1

    def to_json(self) -> dict[str, Any]:
        return {"format": self.FORMAT, "version": self.VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> "Manifest":
        """The inverse of to_json. ValueError where this is no manifest or of another version."""
        require(
            isinstance(value, dict) and value.get("format") == cls.FORMAT,
            f'this is no manifest of selfray shards: it lacks "format": "{cls.FORMAT}"',
        )
        require(
            value["version"] == cls.VERSION,
            f"the manifest has version {value['version']}, this selfray reads version "
            f"{cls.VERSION}: use the selfray that built the shards, or build them again",
        )
        fields = {f.name: value[f.name] for f in dataclasses.fields(cls)}
        if (labels := fields["labels"]) is not None:
            names = None if labels["names"] is None else tuple(labels["names"])
            fields["labels"] = Labels(names, labels["counts"], labels["unlabelled"])
        fields["shards"] = tuple(
            Shard(**{**shard, "row_groups": tuple(shard["row_groups"])})
            for shard in fields["shards"]
        )
        fields["image_width"] = Spread(**fields["image_width"])
        fields["image_height"] = Spread(**fields["image_height"])
        fields["quarantined"] = QuarantineCount(**fields["quarantined"])
        return cls(**fields)

    @classmethod
    def load(cls, folder: str | Path | Location) -> "Manifest":
        """Read the manifest of a folder of shards. FileNotFoundError, ValueError name the file."""
        location = Location.of(folder) / MANIFEST
        if not location.exists():
            raise FileNotFoundError(
                f"{location} does not exist: give a folder that `selfray shards build` has finished"
            )
        try:
            return cls.from_json(location.read_json())
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{location} cannot be read: {_one_line(error)}; restore it from a copy, or delete "
                f"{folder} and build the shards again"
            ) from None


@dataclass(frozen=True)
class CheckReport:
    destination: str
    shards: int
    images: int
    bytes: int
    problems: tuple[str, ...]
    """One line each: the file, what is wrong with it, and the way out."""

    @property
    def ok(self) -> bool:
        return not self.problems


def build(
    source: str | Path | Location,
    destination: str | Path | Location,
    options: BuildOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Convert images to Parquet shards on the running Ray; on a second call, finish the build.

    Shards are named by numbers, which may have gaps: a shard of broken images only is not written.

    Broken images go to DST/quarantine.jsonl and stop nothing. A complete build of the same plan is
    returned at once; shards missing from it are built again. FileNotFoundError where the source
    does not exist; ValueError where there is nothing to build, or where the destination cannot be
    written or holds something else; OSError where storage fails on the way (run it again to go on).
    """
    options = options or BuildOptions()
    source, destination = Location.of(source), Location.of(destination)
    _refuse_overlap(source, destination)
    state = _open_destination(destination)
    plan = make_plan(source, options)
    if state.plan is not None:
        _refuse_other_plan(destination, state, plan)

    numbers = {number for item in plan.items for number in item.shard_numbers}
    tally = _Tally(on_progress, plan.images_total, len(numbers))
    if state.manifest is not None:
        return _mend(destination, plan, state.manifest, numbers, tally)
    if state.plan is None:
        _start(destination, plan)
    records = _intact(destination, _read_records(destination))
    tally.quarantined = len(plan.quarantined)
    for record in records.values():
        tally.add(record)
    tally.report(f"going on: {len(records)} of {len(numbers)} shards are there" if records else "")
    records |= _build_missing(destination, plan, set(records), tally)
    return _finish(destination, plan, [records[number] for number in sorted(records)])


def check(
    destination: str | Path | Location,
    on_progress: Callable[[Progress], None] | None = None,
    deep: bool = False,
) -> CheckReport:
    """Compare every shard with the manifest: existence, size, sha256, Parquet structure, rows.

    `deep` also decodes every image. FileNotFoundError where there is no such folder.
    """
    destination = Location.of(destination)
    if not destination.is_folder():
        raise FileNotFoundError(f"{destination} does not exist: give a folder of shards")
    if not (destination / MANIFEST).exists():
        unfinished = (destination / BUILD_FOLDER / PLAN).exists()
        problem = (
            "the build was interrupted: run the same `selfray shards build` again to finish it"
            if unfinished
            else "there is no manifest: make shards with `selfray shards build`"
        )
        return CheckReport(destination.uri, 0, 0, 0, (f"{destination / MANIFEST}: {problem}",))
    try:
        manifest = Manifest.load(destination)
    except ValueError as error:
        return CheckReport(destination.uri, 0, 0, 0, (str(error),))

    problems = _leftovers(destination, manifest)
    max_pixels = manifest.options.get("max_pixels", images.MAX_PIXELS)
    tally = _Tally(on_progress, manifest.images, len(manifest.shards))
    tally.quarantined = manifest.quarantined.count
    has_labels = manifest.labels is not None
    work = [
        (shard.name, (destination, shard, has_labels, max_pixels if deep else None))
        for shard in manifest.shards
    ]
    for shard, found in _in_parallel(_check_shard, work):
        problems += found
        tally.add(shard)
        tally.report()
    return CheckReport(
        destination.uri,
        len(manifest.shards),
        manifest.images,
        manifest.bytes,
        tuple(sorted(problems)),
    )


def write_arrays(
    destination: str | Path | Location,
    images: Sequence[bytes],
    labels: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    rows_per_shard: int = 4096,
    source: str = "memory",
) -> Manifest:
    """Write a small data set from memory, without Ray and in the given order.

    `images` are encoded files (JPEG, PNG, ...), `names` their paths, `source` says in the manifest
    where they come from. The same call a second time finds its result and returns it. ValueError
    where an image is broken, lengths differ, or the folder holds something else.
    """
    destination = Location.of(destination)
    require(len(images) > 0, "images is empty: give at least one encoded image")
    require(rows_per_shard > 0, f"rows_per_shard must be positive, got {rows_per_shard}")
    for name, values in (("labels", labels), ("names", names)):
        require(
            values is None or len(values) == len(images),
            f"{name} must have one entry for each of the {len(images)} images",
        )
    if names is None:
        names = [f"{index:06d}" for index in range(len(images))]
    classes = None if label_names is None else tuple(label_names)
    digest = hashlib.sha256(json.dumps([rows_per_shard, classes]).encode())
    for index, data in enumerate(images):
        label = None if labels is None else int(labels[index])
        digest.update(json.dumps([names[index], label, len(data)]).encode() + data)
    options = BuildOptions(labels="none" if labels is None else "auto")
    plan = Plan(
        source=destination,
        source_uri=source,
        layout=Layout("images", labels is not None, classes),
        options=options,
        items=(),
        quarantined=(),
        images_total=len(images),
        files=len(images),
        bytes=sum(map(len, images)),
        fingerprint=digest.hexdigest(),
    )
    state = _open_destination(destination)
    if state.plan is not None:
        _refuse_other_plan(destination, state, plan)
    if state.manifest is not None:
        shards = dict(enumerate(state.manifest.shards))
        if len(_intact(destination, shards)) == len(shards):
            return state.manifest
    builders = []
    for first in range(0, len(images), rows_per_shard):
        builder = _ShardBuilder(plan.layout, options)
        for index in range(first, min(first + rows_per_shard, len(images))):
            label = NO_LABEL if labels is None else int(labels[index])
            builder.add(_Sample(names[index], images[index], label))
        if builder.quarantined:
            broken = builder.quarantined[0]
            raise ValueError(f"image {broken.file} is broken: {broken.message}; leave it out")
        builders.append(builder)
    _start(destination, plan)
    records = [builder.write(destination, number) for number, builder in enumerate(builders)]
    return _finish(destination, plan, records)


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
                    quarantined.append(Quarantined(name, "unreadable", _one_line(error)))

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
            if isinstance(sample, _Sample):
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
            _raise_if_outage(error, root)
            return Quarantined(file.name, "unreadable", _one_line(error))
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


class _Sample(NamedTuple):
    name: str
    data: bytes
    label: int = NO_LABEL
    path: str = ""
    """What the row's `path` says, where that is not the name."""


_Row = _Sample | Quarantined


def _raise_if_outage(error: Exception, location: Location) -> None:
    """Raise what is a fault of the storage, not of one file: a build can go on after it, while
    quarantine would throw away sound images."""
    about_the_file = isinstance(error, FileNotFoundError | PermissionError) or (
        "ACCESS_DENIED" in str(error)
    )
    if isinstance(error, OSError) and not location.is_local and not about_the_file:
        raise error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _read_files(root: Location, layout: Layout, inputs: Iterable[Input]) -> Iterator[_Row]:
    labels = {name: label for label, name in enumerate(layout.label_names or ())}

    def read(entry: Input) -> _Row:
        name = entry.name
        if entry.bytes > MAX_IMAGE_BYTES:
            return _too_large(name, entry.bytes)
        try:
            data = (root / name).read_bytes()
        except OSError as error:
            _raise_if_outage(error, root)
            return Quarantined(name, "unreadable", _one_line(error))
        folder, slash, _ = name.partition("/")
        return _Sample(name, data, labels.get(folder, NO_LABEL) if slash else NO_LABEL)

    # Some files are read ahead: object stores and network disks answer slowly, but many at once.
    ahead: collections.deque[tuple[int, Future[_Row]]] = collections.deque()
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


def _read_tar(root: Location, name: str) -> Iterator[_Row]:
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
        _raise_if_outage(error, root)
        yield from _sample_of(name, key, members)
        yield Quarantined(name, "unreadable", _one_line(error))
    else:
        yield from _sample_of(name, key, members)


def _sample_of(archive: str, key: str | None, members: dict[str, bytes]) -> Iterator[_Row]:
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
    yield _Sample(f"{archive}!{first}", members[first], label)
    for name in others:
        message = f"the sample already has {posixpath.basename(first)}"
        yield Quarantined(f"{archive}!{name}", "second image", message)


def _read_row_groups(root: Location, layout: Layout, inputs: Iterable[Input]) -> Iterator[_Row]:
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
            _raise_if_outage(error, root)
            message = f"rows from {row} on in row group {entry.row_group}: {_one_line(error)}"
            yield Quarantined(entry.name, "unreadable", message)


def _row_of(name: str, picture: Any, label: int | None) -> _Row:
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
    return _Sample(name, data, NO_LABEL if label is None else label, path)


def _read(root: Location, layout: Layout, inputs: Iterable[Input]) -> Iterator[_Row]:
    if layout.kind == "images":
        return _read_files(root, layout, inputs)
    if layout.kind == "tar":
        return itertools.chain.from_iterable(_read_tar(root, entry.name) for entry in inputs)
    return _read_row_groups(root, layout, inputs)


# Writing shards ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardRecord:
    """What a finished shard adds to the manifest; stored beside it until the build is complete."""

    number: int
    name: str
    rows: int
    """0 where nothing sound was left: there is no file then."""
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]
    labels: dict[str, int]
    widths: dict[str, int]
    heights: dict[str, int]
    formats: dict[str, int]
    quarantined: tuple[Quarantined, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ShardRecord":
        value["row_groups"] = tuple(value["row_groups"])
        value["quarantined"] = tuple(Quarantined(*entry) for entry in value["quarantined"])
        return cls(**value)


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"


def _number(shard_name: str) -> int:
    return int(shard_name.removeprefix("shard-").removesuffix(".parquet"))


def schema_of(layout: Layout) -> pa.Schema:
    """Hugging Face's image layout, with the features where `datasets` looks for them."""
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    fields = [pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    if layout.has_labels:
        fields.append(pa.field("label", pa.int64()))
        features["label"] = {"dtype": "int64", "_type": "Value"}
        if layout.label_names is not None:
            features["label"] = {"names": list(layout.label_names), "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema(fields, metadata=metadata)


class _ParquetShard:
    """A Parquet file in memory; a row group is closed as soon as it is full."""

    def __init__(self, layout: Layout) -> None:
        self._schema = schema_of(layout)
        self._file = io.BytesIO()
        # JPEG does not compress: on 300 photographs (32 MB) ZSTD saved 0.6 %, SNAPPY 0.3 %, and
        # reading was a fifth slower. A dictionary of images that are all different halves the
        # speed of writing; statistics of image bytes serve no query.
        self._parquet = pq.ParquetWriter(
            self._file,
            self._schema,
            compression="NONE",
            use_dictionary=False,
            write_statistics=False,
        )
        self._rows: list[_Sample] = []
        self._bytes = 0
        self.row_groups: list[int] = []

    def add(self, row: _Sample) -> None:
        full = len(self._rows) >= ROW_GROUP_ROWS or self._bytes + len(row.data) > ROW_GROUP_BYTES
        if self._rows and full:
            self._close_row_group()
        self._rows.append(row)
        self._bytes += len(row.data)

    def _close_row_group(self) -> None:
        rows, self._rows, self._bytes = self._rows, [], 0
        data = pa.array([row.data for row in rows], pa.binary())
        paths = pa.array([row.path or row.name for row in rows], pa.string())
        columns: list[pa.Array] = [pa.StructArray.from_arrays([data, paths], ["bytes", "path"])]
        if "label" in self._schema.names:
            columns.append(pa.array([row.label for row in rows], pa.int64()))
        self._parquet.write_table(pa.table(columns, schema=self._schema))
        self.row_groups.append(len(rows))

    def finish(self) -> bytes:
        if self._rows:
            self._close_row_group()
        self._parquet.close()
        return self._file.getvalue()


class _ShardBuilder:
    """Verifies samples, shrinks them where asked, and counts what the manifest tells."""

    def __init__(
        self, layout: Layout, options: BuildOptions, shuffle_seed: str | None = None
    ) -> None:
        self._options = options
        self._shuffle_seed = shuffle_seed
        self._shard = _ParquetShard(layout)
        self._waiting: list[_Sample] = []
        self._has_labels = layout.has_labels
        self._labels: collections.Counter[str] = collections.Counter()
        self._widths: collections.Counter[str] = collections.Counter()
        self._heights: collections.Counter[str] = collections.Counter()
        self._formats: collections.Counter[str] = collections.Counter()
        self.quarantined: list[Quarantined] = []

    def add(self, row: _Row) -> None:
        if isinstance(row, Quarantined):
            self.quarantined.append(row)
            return
        try:
            info = images.check(row.data, self._options.max_pixels)
            width, height, kind = info.width, info.height, info.format
            max_side = self._options.max_side
            if max_side is not None and max(width, height) > max_side:
                row = row._replace(data=images.shrink(row.data, max_side))
                with Image.open(io.BytesIO(row.data)) as image:  # reads the header only
                    (width, height), kind = image.size, image.format or kind
        except images.BrokenImage as error:
            self.quarantined.append(Quarantined(row.name, error.reason, _one_line(error)))
            return
        self._widths[str(width)] += 1
        self._heights[str(height)] += 1
        self._formats[kind] += 1
        if self._has_labels:
            self._labels[str(row.label)] += 1
        if self._shuffle_seed is None:
            self._shard.add(row)
        else:
            self._waiting.append(row)

    def write(self, destination: Location, number: int) -> ShardRecord:
        """Write the shard and then its record: a shard without a record does not count."""
        if self._shuffle_seed is not None:
            random.Random(self._shuffle_seed).shuffle(self._waiting)
        while self._waiting:
            self._shard.add(self._waiting.pop())  # popped: one shard's bytes in memory, not two
        data = self._shard.finish()
        name, rows = _shard_name(number), sum(self._shard.row_groups)
        if rows:
            (destination / name).write_bytes(data)
        record = ShardRecord(
            number=number,
            name=name,
            rows=rows,
            bytes=len(data) if rows else 0,
            sha256=hashlib.sha256(data).hexdigest() if rows else "",
            row_groups=tuple(self._shard.row_groups),
            labels=_sorted_counts(self._labels),
            widths=_sorted_counts(self._widths),
            heights=_sorted_counts(self._heights),
            formats=dict(sorted(self._formats.items())),
            quarantined=tuple(self.quarantined),
        )
        (destination / BUILD_FOLDER / f"{name}.json").write_json(dataclasses.asdict(record))
        return record


def _sorted_counts(counts: collections.Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


@dataclass(frozen=True)
class _Job:
    """What the tasks of one build have in common."""

    source: Location
    destination: Location
    layout: Layout
    options: BuildOptions


def _build_item(job: _Job, item: WorkItem, finished: frozenset[int]) -> list[ShardRecord]:
    """Build the shards of a work item that are not there yet; runs as a Ray task.

    Memory: the rows of one shard and their Parquet file, some images read ahead; never a source
    file as a whole.
    """
    _require_shared_storage(job)
    records = []
    by_shard = itertools.groupby(
        _cut(item, _read(job.source, job.layout, item.inputs)), lambda r: r[0]
    )
    for number, rows in by_shard:
        if number in finished:
            continue
        # A folder's files come in shuffled order; what lies in one file is shuffled here.
        shuffle_seed = None if job.layout.kind == "images" else f"{job.options.seed} shard {number}"
        builder = _ShardBuilder(job.layout, job.options, shuffle_seed)
        for _, row in rows:
            builder.add(row)
        records.append(builder.write(job.destination, number))
    for number in set(item.shard_numbers) - finished - {record.number for record in records}:
        empty = _ShardBuilder(job.layout, job.options)
        records.append(empty.write(job.destination, number))
    return records


def _cut(item: WorkItem, rows: Iterable[_Row]) -> Iterator[tuple[int, _Row]]:
    """Name the shard of each row. By bytes read, so that it does not depend on what is sound."""
    share = item.bytes / item.shards
    number, read = 0, 0
    for row in rows:
        if number < item.shards - 1 and read >= share * (number + 1):
            number += 1
        if isinstance(row, _Sample):
            read += len(row.data)
        yield item.first_shard + number, row


def _require_shared_storage(job: _Job) -> None:
    """A local folder exists on one node only: without this, the others would find every image
    missing, and write their shards where nobody looks."""
    for location in (job.source, job.destination / BUILD_FOLDER / PLAN):
        if not location.exists():
            raise FileNotFoundError(
                f"{location} is not there on the node {os.uname().nodename}: source and "
                "destination must be on storage that every node reaches, such as s3:// or NFS"
            )


# The destination --------------------------------------------------------------------------------


_OF_A_BUILD = re.compile(
    r"(manifest\.json|quarantine\.jsonl|shard-\d{5,}\.parquet)(\.\d+\.tmp)?|" + BUILD_FOLDER
)


@dataclass(frozen=True)
class _State:
    """What a destination holds at the start: nothing, a part of a build, or a whole one."""

    plan: dict[str, Any] | None = None
    manifest: Manifest | None = None


def _refuse_overlap(source: Location, destination: Location) -> None:
    if source.is_local and destination.is_local:
        outer, inner = os.path.realpath(source.path), os.path.realpath(destination.path)
    elif source.filesystem == destination.filesystem:
        outer, inner = source.path.rstrip("/"), destination.path.rstrip("/")
    else:
        return
    require(
        inner != outer and not inner.startswith(outer.rstrip("/") + "/"),
        f"the destination {destination} lies inside the source {source}: give one outside",
    )


def _open_destination(destination: Location) -> _State:
    """ValueError where the folder holds anything that no build has put there."""
    try:
        names = [posixpath.basename(info.path) for info in destination.list()]
    except OSError as error:
        raise ValueError(
            f"the destination {destination} cannot be listed: {_one_line(error)}; give a folder"
        ) from None
    if MANIFEST in names:
        manifest = Manifest.load(destination)
        return _State(
            {"source": manifest.source, "options": manifest.options, **manifest.plan}, manifest
        )
    plan_file = destination / BUILD_FOLDER / PLAN
    plan = plan_file.read_json() if BUILD_FOLDER in names and plan_file.exists() else None
    known = _OF_A_BUILD if plan else re.compile(BUILD_FOLDER)
    foreign = [name for name in names if not known.fullmatch(name)]
    require(
        not foreign,
        f"the destination {destination} holds other files ({', '.join(foreign[:3])}"
        f"{', ...' if len(foreign) > 3 else ''}): give an empty or a new folder",
    )
    return _State(plan)


def _refuse_other_plan(destination: Location, state: _State, plan: Plan) -> None:
    then, now = state.plan or {}, plan.identity()
    old, new = then["options"], now["options"]
    changes = [
        f"{name} was {old.get(name)}, now {new.get(name)}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if then["source"] != now["source"]:
        changes.insert(0, f"source was {then['source']}, now {now['source']}")
    elif not changes and then["fingerprint"] != now["fingerprint"]:
        changes.append(
            f"the source had {then['files']} files of {then['bytes']:,} bytes, "
            f"now {now['files']} of {now['bytes']:,}"
        )
        if (then["files"], then["bytes"]) == (now["files"], now["bytes"]):
            changes = ["files of the source have changed since"]
    what = "a complete" if state.manifest else "an unfinished"
    require(
        not changes,
        f"{destination} holds {what} build of something else ({'; '.join(changes)}): "
        f"give another destination, or delete {destination}",
    )


def _start(destination: Location, plan: Plan) -> None:
    try:
        (destination / BUILD_FOLDER).make_folder()
        (destination / BUILD_FOLDER / PLAN).write_json(plan.identity())
    except OSError as error:
        raise ValueError(
            f"the destination {destination} cannot be written: {_one_line(error)}; "
            "give a folder that you may write to"
        ) from None


def _read_records(destination: Location) -> dict[int, ShardRecord]:
    names = [info.path for info in (destination / BUILD_FOLDER).list()]
    files = [
        destination / BUILD_FOLDER / posixpath.basename(name)
        for name in names
        if name.endswith(".parquet.json")
    ]
    with ThreadPoolExecutor(16) as pool:
        records = pool.map(lambda file: ShardRecord.from_json(file.read_json()), files)
        return {record.number: record for record in records}


_Stored = TypeVar("_Stored", Shard, ShardRecord)


def _intact(destination: Location, shards: dict[int, _Stored]) -> dict[int, _Stored]:
    """Those whose file is there in full size; contents are the business of `check`."""
    sizes = {posixpath.basename(info.path): info.size for info in destination.list()}
    return {
        number: shard
        for number, shard in shards.items()
        if shard.rows == 0 or sizes.get(shard.name) == shard.bytes
    }


def _finish(destination: Location, plan: Plan, records: Sequence[ShardRecord]) -> Manifest:
    quarantined = [*plan.quarantined, *(entry for r in records for entry in r.quarantined)]
    if not any(record.rows for record in records):
        (destination / BUILD_FOLDER).delete_folder()
        examples = "; ".join(f"{q.file}: {q.message}" for q in quarantined[:3])
        raise ValueError(
            f"{plan.source_uri} holds no readable image: all {len(quarantined)} files were refused "
            f"({examples}); give a folder that holds images"
        )
    manifest = _manifest(plan, records, quarantined)
    lines = "".join(json.dumps(entry._asdict()) + "\n" for entry in quarantined)
    (destination / QUARANTINE).write_bytes(lines.encode())
    _delete_temporary_files(destination)
    (destination / MANIFEST).write_json(manifest.to_json())
    (destination / BUILD_FOLDER).delete_folder()
    return manifest


def _delete_temporary_files(destination: Location) -> None:
    """What a killed task has left."""
    for info in destination.list():
        if info.path.endswith(".tmp"):
            destination.filesystem.delete_file(info.path)


def _manifest(
    plan: Plan, records: Sequence[ShardRecord], quarantined: Sequence[Quarantined]
) -> Manifest:
    def merged(name: str) -> dict[str, int]:
        total: collections.Counter[str] = collections.Counter()
        for record in records:
            total.update(getattr(record, name))
        return dict(sorted(total.items()))

    labels = None
    if plan.layout.has_labels:
        names, counts = plan.layout.label_names, merged("labels")
        unlabelled = counts.pop(str(NO_LABEL), 0)
        if names is None:
            by_name = dict(sorted(counts.items(), key=lambda item: int(item[0])))
        else:
            by_name = {name: counts.pop(str(index), 0) for index, name in enumerate(names)} | counts
        labels = Labels(names, by_name, unlabelled)
    identity = plan.identity()
    return Manifest(
        source=identity.pop("source"),
        options=identity.pop("options"),
        images=sum(record.rows for record in records),
        bytes=sum(record.bytes for record in records),
        labels=labels,
        shards=tuple(
            Shard(r.name, r.rows, r.bytes, r.sha256, r.row_groups) for r in records if r.rows
        ),
        image_width=_spread(merged("widths")),
        image_height=_spread(merged("heights")),
        formats=merged("formats"),
        quarantined=QuarantineCount(
            len(quarantined),
            dict(sorted(collections.Counter(q.reason for q in quarantined).items())),
        ),
        max_side=plan.options.max_side,
        plan=identity,
    )


def _spread(counts: dict[str, int]) -> Spread:
    sizes = {int(size): count for size, count in sorted(counts.items(), key=lambda c: int(c[0]))}
    total, seen = sum(sizes.values()), 0
    median = 0
    for size, count in sizes.items():
        seen += count
        if seen * 2 >= total:
            median = size
            break
    return Spread(min(sizes), median, max(sizes))


def _mend(
    destination: Location, plan: Plan, manifest: Manifest, numbers: set[int], tally: "_Tally"
) -> Manifest:
    """Build again what is lost from a complete build; the manifest changes only where another
    version of a library writes the same rows as other bytes."""
    shards = {_number(shard.name): shard for shard in manifest.shards}
    intact = _intact(destination, shards)
    lost = set(shards) - set(intact)
    tally.quarantined = manifest.quarantined.count
    for shard in intact.values():
        tally.add(shard)
    tally.shards_done = len(numbers) - len(lost)  # some numbers have no shard: nothing was sound
    note = f"{destination} is complete: nothing to do"
    if lost:
        note = f"{destination} has lost {len(lost)} of {len(shards)} shards: building them again"
        _start(destination, plan)
    tally.report(note)
    for number, record in _build_missing(destination, plan, numbers - lost, tally).items():
        shards[number] = Shard(
            record.name, record.rows, record.bytes, record.sha256, record.row_groups
        )
    mended = dataclasses.replace(
        manifest,
        shards=tuple(shards.values()),
        bytes=sum(shard.bytes for shard in shards.values()),
    )
    _delete_temporary_files(destination)
    if mended != manifest:
        (destination / MANIFEST).write_json(mended.to_json())
    (destination / BUILD_FOLDER).delete_folder()
    return mended


# Checking ---------------------------------------------------------------------------------------

_WAY_OUT = "delete it and run the same build again: only lost shards are built anew"


def _leftovers(destination: Location, manifest: Manifest) -> list[str]:
    """Problems of what lies around the shards."""
    names = {posixpath.basename(info.path) for info in destination.list()}
    known = {shard.name for shard in manifest.shards}
    problems = []
    for name in sorted(names - known):
        path = destination / name
        if name.endswith(".tmp"):
            problems.append(f"{path}: left by a killed task; delete it")
        elif name.endswith(".parquet"):
            problems.append(f"{path}: not in the manifest, but readers would take it; delete it")
        elif name == BUILD_FOLDER:
            problems.append(f"{path}: left by a killed build; run the same build again")
    path = destination / QUARANTINE
    lines = path.read_bytes().count(b"\n") if path.exists() else 0
    if lines != manifest.quarantined.count:
        problems.append(
            f"{path}: {lines} entries instead of {manifest.quarantined.count}; restore it from a "
            f"copy, or delete {destination} and build again"
        )
    return problems


def _check_shard(
    destination: Location, shard: Shard, has_labels: bool, max_pixels: int | None
) -> tuple[Shard, list[str]]:
    """The problems of one shard; decodes its images where max_pixels is given. A Ray task."""
    path = destination / shard.name
    info = path.info()
    if info.type == fs.FileType.NotFound:
        return shard, [
            f"{path}: missing; run the same build again: only lost shards are built anew"
        ]
    if info.size != shard.bytes:
        return shard, [f"{path}: {info.size} bytes instead of {shard.bytes}; {_WAY_OUT}"]
    try:
        with path.filesystem.open_input_stream(path.path) as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(4 * MIB):
                digest.update(chunk)
        if digest.hexdigest() != shard.sha256:
            return shard, [f"{path}: its sha256 is not the manifest's; {_WAY_OUT}"]
        with path.filesystem.open_input_file(path.path) as stream:
            parquet = pq.ParquetFile(stream)
            problems = _check_structure(path, parquet, shard, has_labels)
            if max_pixels is not None and not problems:
                problems = _check_images(path, parquet, max_pixels)
    except (OSError, pa.ArrowException) as error:
        problems = [f"{path}: cannot be read ({_one_line(error)}); {_WAY_OUT}"]
    return shard, problems


def _check_structure(
    path: Location, parquet: pq.ParquetFile, shard: Shard, has_labels: bool
) -> list[str]:
    metadata = parquet.metadata
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    if groups != shard.row_groups or sum(groups) != shard.rows:
        return [f"{path}: row groups of {groups} rows instead of {shard.row_groups}; {_WAY_OUT}"]
    schema = schema_of(Layout("images", has_labels))
    if not parquet.schema_arrow.equals(schema):
        found = ", ".join(f"{f.name}: {f.type}" for f in parquet.schema_arrow)
        return [f"{path}: its columns are {found}; {_WAY_OUT}"]
    return []


def _check_images(path: Location, parquet: pq.ParquetFile, max_pixels: int) -> list[str]:
    problems, row = [], 0
    for group in range(parquet.metadata.num_row_groups):
        for picture in parquet.read_row_group(group, columns=["image"]).column(0).to_pylist():
            try:
                images.check(picture["bytes"] or b"", max_pixels)
            except images.BrokenImage as error:
                problems.append(f"{path}#row {row}: {_one_line(error)}; {_WAY_OUT}")
            row += 1
    return problems


# Ray --------------------------------------------------------------------------------------------


class _Tally:
    """Counts for the user's progress line."""

    def __init__(
        self,
        on_progress: Callable[[Progress], None] | None,
        images_total: int | None,
        shards_total: int,
    ) -> None:
        self._on_progress = on_progress
        self._images_total = images_total
        self._shards_total = shards_total
        self._started = time.monotonic()
        self.images_done = self.quarantined = self.shards_done = self.bytes = 0

    def add(self, shard: Shard | ShardRecord) -> None:
        self.images_done += shard.rows
        self.bytes += shard.bytes
        self.shards_done += 1
        if isinstance(shard, ShardRecord):
            self.quarantined += len(shard.quarantined)

    def report(self, note: str = "") -> None:
        if self._on_progress is not None:
            self._on_progress(
                Progress(
                    images_done=self.images_done,
                    images_total=self._images_total,
                    quarantined=self.quarantined,
                    shards_done=self.shards_done,
                    shards_total=self._shards_total,
                    seconds=time.monotonic() - self._started,
                    bytes=self.bytes,
                    note=note,
                )
            )


def _build_missing(
    destination: Location, plan: Plan, done: set[int], tally: _Tally
) -> dict[int, ShardRecord]:
    """Build every shard that is not done, in parallel."""
    job = ray.put(_Job(plan.source, destination, plan.layout, plan.options))
    work = [
        (
            f"{_shard_name(item.first_shard)} ({item.inputs[0].name} to {item.inputs[-1].name})",
            (job, item, frozenset(done & set(item.shard_numbers))),
        )
        for item in plan.items
        if not done.issuperset(item.shard_numbers)
    ]
    built: dict[int, ShardRecord] = {}
    try:
        for records in _in_parallel(_build_item, work):
            for record in records:
                built[record.number] = record
                tally.add(record)
            tally.report()
    except OSError as error:
        raise OSError(
            f"the build of {destination} stopped: {error}; finished shards are kept, run the same "
            "build again to go on"
        ) from error
    return built


_Result = TypeVar("_Result")


def _in_parallel(
    function: Callable[..., _Result], work: Iterable[tuple[str, tuple[Any, ...]]]
) -> Iterator[_Result]:
    """Results of function(*arguments) for each (name, arguments), in the order they are ready.

    One CPU for each task. Few more tasks than CPUs are in flight, since the arguments of all would
    fill the object store; more than CPUs, so that an autoscaler sees demand.
    """
    task = ray.remote(num_cpus=1)(function)
    waiting = iter(work)
    running: dict[ray.ObjectRef, str] = {}
    try:
        while True:
            free = 2 * max(1, int(ray.cluster_resources().get("CPU", 1))) - len(running)
            for name, arguments in itertools.islice(waiting, free):
                running[task.remote(*arguments)] = name
            if not running:
                return
            (ready,), _ = ray.wait(list(running), num_returns=1)
            name = running.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, OSError):  # storage: the traceback tells users nothing
                    raise error.cause from None
                raise
            except ray.exceptions.RayError as error:
                raise OSError(f"the worker of {name} died: {_one_line(error)}") from None
            yield result
    finally:
        for reference in running:
            ray.cancel(reference)
