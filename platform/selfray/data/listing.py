"""What shards are made from: a folder of images, WebDataset tars or Parquet files, as a plan.

A plan is data: every shard number belongs to one work item, and a work item's shards follow from
its inputs and the seed alone. `make_plan` lists a source.

What is passed over without a word: files and folders whose name starts with a dot, Thumbs.db,
desktop.ini and __MACOSX; beside Parquet files or tars, every other file. Whatever else is no sound
image becomes a Quarantined with its reason.
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from selfray.check import require
from selfray.data.files import IMAGE_EXTENSIONS, File, Quarantined, extension, list_source
from selfray.data.layout import Layout, SourceKind
from selfray.data.samples import MIB, Input, Sample, raise_if_outage, read_tar
from selfray.data.shard_set import LABEL_COLUMNS, NO_LABEL
from selfray.pixels import codecs
from selfray.storage import Location, one_line

TAR_SAMPLE_BYTES = 1024
"""No member of a tar takes less: 512 bytes of header, and its content in blocks of 512."""

LabelRule = Literal["auto", "folders", "none"]


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


def make_plan(source: Location, options: BuildOptions) -> Plan:
    """List a source and divide it into work items; reads names, sizes and Parquet footers only.

    FileNotFoundError where the source does not exist; ValueError where it holds nothing to build.
    """
    root, files, quarantined = list_source(source)
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


def _select(source: Location, files: list[File]) -> tuple[SourceKind, list[File]]:
    """(what kind of source this is, the files that belong to it)."""
    by_kind: dict[SourceKind, list[File]] = {"images": [], "tar": [], "parquet": []}
    for file in files:
        suffix = extension(file.name)
        if suffix in IMAGE_EXTENSIONS:
            by_kind["images"].append(file)
        elif suffix == "tar":
            by_kind["tar"].append(file)
        elif suffix == "parquet":
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
    source: Location, files: Sequence[File], rule: LabelRule
) -> tuple[str, ...] | None:
    """The sorted names of the folders that are classes; None where folders are no classes."""
    pictures = [f.name.split("/") for f in files if extension(f.name) in IMAGE_EXTENSIONS]
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


def _tars_have_labels(root: Location, files: Sequence[File]) -> bool:
    """Whether the first image that can be read has a label."""
    for file in files:
        for sample in read_tar(root, file.name):
            if isinstance(sample, Sample):
                return sample.label != NO_LABEL
    return False


def _plan_parquet(
    source: Location, root: Location, files: Sequence[File], options: BuildOptions
) -> tuple[list[Input], Layout, int, list[Quarantined]]:
    """(one input for each row group, the layout by the first sound file, rows, broken files)."""

    def schema_and_groups(file: File) -> tuple[pa.Schema, list[Input]] | Quarantined:
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
