"""Plans a build: lists a folder of images, WebDataset tars or Parquet files as work items.

A plan is data: every shard number belongs to one work item, and a work item's shards follow only
from its inputs and the seed. `make_plan` lists a source.

Skipped silently: files and folders whose name starts with a dot, Thumbs.db, desktop.ini and
__MACOSX; beside Parquet files or tars, all other files. Any other file that is not a sound image
becomes a Quarantined with its reason. Files left out because they belong to no split are reported.
"""

import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfray.check import require
from selfray.data import columns
from selfray.data.checksums import footer_is_checked
from selfray.data.files import File, Listing, Quarantined, list_source, select
from selfray.data.layout import SPLITS, LabelRule, SourceKind, Understood, pictures, understand
from selfray.data.rows import MIB, Input, Layout, Sample, raise_if_outage
from selfray.data.shard_set import NO_LABEL, ShardFile, ShardSet, open_shards
from selfray.data.tables import labels_in_tables
from selfray.data.tar import read_tar
from selfray.pixels import codecs
from selfray.storage import Location, one_line

TAR_SAMPLE_BYTES = 1024
"""Smallest size of a member of a tar: 512 bytes of header, and content in blocks of 512."""
TAR_LABELS_LOOKED_AT = 100
"""Number of samples of a tar that are read to see whether labels are text."""


@dataclass(frozen=True)
class BuildOptions:
    max_side: int | None = None
    """Shrink larger images so that the longer side has this many pixels, and store them as JPEGs of
    quality 95; None shrinks none. Other images keep their bytes."""
    shard_bytes: int = 128 * MIB
    """Target size of a shard in bytes. One task takes about three times this memory: measured 155
    MiB for shards of 64 MiB from a folder, 212 MiB from a tar."""
    max_pixels: int = codecs.MAX_PIXELS
    """Images with more pixels than this are quarantined before they are decoded."""
    labels: LabelRule = "auto"
    """Where labels come from. auto: class folders, a metadata table beside images, `.cls` or
    `.json` members of tars, a label column of Parquet files. folders: the first folder below the
    source or split is the class, deeper ones are ignored. none: no labels."""
    seed: int = 0
    image_column: str | None = None
    """The column that holds the images (only for Parquet sources); None finds it."""
    label_column: str | None = None
    """The label column of Parquet files, of a metadata table beside images, or the label's key in
    `.json` members of tars; None finds it."""

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

    def to_json(self) -> dict[str, Any]:
        """The JSON stored in manifests; a field added later is left out at its default."""
        values = dataclasses.asdict(self)
        if self.label_column is None:
            del values["label_column"]
        return values


# The plan ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkItem:
    """The work of one task: these inputs become these shards (some may stay empty)."""

    first_shard: int
    shards: int
    inputs: tuple[Input, ...]
    split: str = ""
    """One of SPLITS, used in the shards' names; empty if the source has no splits."""

    @property
    def shard_numbers(self) -> range:
        return range(self.first_shard, self.first_shard + self.shards)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.inputs)


@dataclass(frozen=True)
class Plan:
    source: Location
    """The folder to which the names of inputs are relative."""
    source_uri: str
    """The path that the user gave."""
    layout: Layout
    options: BuildOptions
    items: tuple[WorkItem, ...]
    quarantined: tuple[Quarantined, ...]
    """Files that could not be listed or opened."""
    images_total: int | None
    files: int
    bytes: int
    fingerprint: str
    understood: Mapping[str, Any] = field(default_factory=dict)
    """The meaning of the names, if it is more than classes one folder down: `origins` of splits,
    files `left_out`, whether there are `tables`, whether classes lie `deeper`."""
    notes: tuple[str, ...] = ()
    """Notes for the user, one line each."""

    def identity(self) -> dict[str, Any]:
        """The values that identify a build: two builds with equal values are the same."""
        understood = {"understood": dict(self.understood)} if self.understood else {}
        return {
            "source": self.source_uri,
            "options": self.options.to_json(),
            "files": self.files,
            "bytes": self.bytes,
            "fingerprint": self.fingerprint,
            **understood,
        }


def make_plan(source: Location, options: BuildOptions) -> Plan:
    """List a source and divide it into work items. Reads names, sizes and Parquet footers, and
    labels if they are not in names.

    Raises FileNotFoundError if the source does not exist, ValueError if there is nothing to build.
    """
    listing = list_source(source)
    kind, files, tables = select(source, listing.files)
    digest = hashlib.sha256(json.dumps(options.to_json(), sort_keys=True).encode())
    for file in [*files, *tables]:
        digest.update(json.dumps(file).encode())

    require(
        options.labels != "folders" or kind == "images",
        f'labels "folders" needs a folder of images, but {source} holds {kind} files: use "auto"',
    )
    names = [file.name for file in files]
    understood = understand(names, kind, options.labels, source)
    images_total: int | None = None
    quarantined, notes = list(listing.quarantined), []
    if kind == "images":
        inputs, layout, notes = _plan_images(listing, files, tables, understood, options)
        images_total = len(inputs)
    elif kind == "tar":
        inputs, layout = _plan_tars(listing.root, files, understood, options)
    else:
        inputs, layout, broken, notes = _plan_parquet(source, listing, files, understood, options)
        images_total = sum(entry.rows for entry in inputs)
        quarantined += broken
    split_of = dict(zip(names, understood.splits, strict=True))
    return Plan(
        source=listing.root,
        source_uri=source.uri,
        layout=layout,
        options=options,
        items=tuple(_items(inputs, split_of, understood.has_splits, options)),
        quarantined=tuple(quarantined),
        images_total=images_total,
        files=len(files),
        bytes=sum(file.bytes for file in files),
        fingerprint=digest.hexdigest(),
        understood=_understood(names, understood, kind, bool(tables), options.labels),
        notes=tuple(notes),
    )


def says_more(
    names: Sequence[str], understood: Understood, kind: SourceKind, has_tables: bool
) -> bool:
    """Whether names mean more than classes one folder down, which is all that the first version of
    selfray understood."""
    if understood.has_splits or has_tables:
        return True
    if kind != "images" or understood.classes is None:
        return False
    seen = set(pictures(names, kind))
    return any(
        name in seen and (label is None or name.count("/") != 1)
        for name, label in zip(names, understood.labels, strict=True)
    )


def _understood(
    names: Sequence[str],
    understood: Understood,
    kind: SourceKind,
    has_tables: bool,
    rule: LabelRule,
) -> dict[str, Any]:
    if not says_more(names, understood, kind, has_tables):
        return {}
    said: dict[str, Any] = {"tables": True} if has_tables else {}
    if understood.has_splits:
        said |= {"origins": dict(understood.origins), "left_out": dict(understood.left_out)}
    return said or ({"deeper": True} if rule == "auto" else {})


def _items(
    inputs: Sequence[Input],
    split_of: Mapping[str, str | None],
    has_splits: bool,
    options: BuildOptions,
) -> Iterator[WorkItem]:
    """Work items, split by split, with consecutive shard numbers."""
    first = 0
    for split in SPLITS:
        own = [entry for entry in inputs if split_of[entry.name] == split]
        random.Random(f"{options.seed} inputs").shuffle(own)
        for item in _pack(own, options.shard_bytes, first, split if has_splits else ""):
            first = item.shard_numbers.stop
            yield item


def _pack(inputs: Iterable[Input], shard_bytes: int, first: int, split: str) -> Iterator[WorkItem]:
    """Group inputs into items near the target size; a large input gets several shards."""
    gathered: list[Input] = []

    def close() -> WorkItem:
        rows = sum(entry.rows for entry in gathered)
        shards = round(sum(entry.bytes for entry in gathered) / shard_bytes)
        return WorkItem(first, max(1, min(shards, rows)), tuple(gathered), split)

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


# Each kind of source ------------------------------------------------------------------------------


def _plan_images(
    listing: Listing,
    files: Sequence[File],
    tables: Sequence[File],
    understood: Understood,
    options: BuildOptions,
) -> tuple[list[Input], Layout, list[str]]:
    labels: Sequence[str | None] = understood.labels
    names, notes = understood.classes, []
    if tables and options.labels == "auto":
        found, notes = labels_in_tables(listing.root, tables, options.label_column)
        if found:
            labels = [found.get(file.name) for file in files]
            known = {label for label in labels if label is not None}
            names = tuple(sorted(known, key=columns.natural)) if known else None
            if lost := len(found.keys() - {file.name for file in files}):
                notes.append(f"{lost:,} images named in {tables[0].name} do not exist")
    elif options.label_column is not None:
        notes = [f"--data.label-column {options.label_column}: a folder of images has no columns"]
    place = {name: index for index, name in enumerate(names or ())}
    inputs = [
        Input(file.name, file.bytes, label=NO_LABEL if label is None else place[label])
        for file, label, split in zip(files, labels, understood.splits, strict=True)
        if split is not None
    ]
    return inputs, Layout("images", names is not None, names), notes


def _plan_tars(
    root: Location, files: Sequence[File], understood: Understood, options: BuildOptions
) -> tuple[list[Input], Layout]:
    used = [f for f, split in zip(files, understood.splits, strict=True) if split is not None]
    folders = dict(zip((f.name for f in files), understood.labels, strict=True))
    names = understood.classes
    place = {name: index for index, name in enumerate(names or ())}
    inputs = []
    for file in used:
        label = folders[file.name]
        rows = file.bytes // TAR_SAMPLE_BYTES
        own = NO_LABEL if label is None else place[label]
        inputs.append(Input(file.name, file.bytes, rows, label=own))
    if names is not None or options.labels == "none":
        return inputs, Layout("tar", names is not None, names)

    def texts(file: File, most: int | None = None) -> set[str]:
        rows = read_tar(root, file.name, options.label_column, only_labels=True)
        sound = (row for row in rows if isinstance(row, Sample))
        return {row.text for row in itertools.islice(sound, most) if row.text is not None}

    first: set[str] = set()
    for file in used:
        first = texts(file, TAR_LABELS_LOOKED_AT)
        if first:
            break
    if all(columns.is_label_number(text) for text in first):
        return inputs, Layout("tar", bool(first), label_column=options.label_column)
    with ThreadPoolExecutor(8) as pool:
        found = set().union(*pool.map(texts, used))
    names = tuple(sorted(found, key=columns.natural))
    return inputs, Layout("tar", True, names, label_column=options.label_column)


def _plan_parquet(
    source: Location,
    listing: Listing,
    files: Sequence[File],
    understood: Understood,
    options: BuildOptions,
) -> tuple[list[Input], Layout, list[Quarantined], list[str]]:
    """(one input for each row group, the layout of the first sound file, broken files, notes)."""

    def footer(file: File) -> tuple[pq.FileMetaData, pa.Schema] | Quarantined:
        location = listing.root / file.name
        try:
            with location.filesystem.open_input_file(location.path) as stream:
                footer_is_checked(stream)
                metadata = pq.ParquetFile(stream).metadata
                return metadata, metadata.schema.to_arrow_schema()
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            raise_if_outage(error, listing.root)
            return Quarantined(file.name, "unreadable", one_line(error))

    used = [f for f, split in zip(files, understood.splits, strict=True) if split is not None]
    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(footer, used))
    broken = [found for found in footers if isinstance(found, Quarantined)]
    sound = [
        (file, *found)
        for file, found in zip(used, footers, strict=True)
        if not isinstance(found, Quarantined)
    ]
    require(
        bool(sound),
        f"none of the {len(used)} Parquet files of {source} can be read; "
        + (f"{broken[0].file}: {broken[0].message}" if broken else ""),
    )
    first, _, schema = next((entry for entry in sound if entry[1].num_rows), sound[0])
    image = columns.image_column(schema, listing.uri(first.name), options.image_column)
    lacking = {file.name for file, _, found in sound if found.names.count(image) != 1}
    broken += [
        Quarantined(name, "unreadable", f"the file lacks the column {image}")
        for name in sorted(lacking)
    ]
    sound = [entry for entry in sound if entry[0].name not in lacking]
    rows = sum(metadata.num_rows for _, metadata, _ in sound)
    require(rows > 0, f"{source} holds no image: its {len(used)} Parquet files have no rows")
    folders = dict(zip((file.name for file in files), understood.labels, strict=True))
    shards = open_shards(
        [listing.uri(file.name) for file, _, _ in sound],
        source.uri,
        image,
        options.label_column,
        {listing.uri(name): label for name, label in folders.items() if label is not None},
    )
    by_uri = {file.uri: file for file in shards.files}
    inputs = []
    for file, metadata, _ in sound:
        inputs += _row_groups(file.name, metadata, by_uri[listing.uri(file.name)])
    names = shards.label_names if options.labels != "none" else None
    # Plain numbers without names are kept as numbers.
    counted = names is not None and names == tuple(str(i) for i in range(len(names)))
    layout = Layout(
        "parquet",
        names is not None,
        None if counted and not _names_are_given(shards, sound[0][2]) else names,
        image,
        shards.label_column if names is not None else None,
    )
    return inputs, layout, broken, list(shards.notes)


def _names_are_given(shards: ShardSet, schema: pa.Schema) -> bool:
    if shards.label_column is None:
        return True
    return columns.label_column(schema, shards.uri, None).names is not None


def _row_groups(name: str, metadata: pq.FileMetaData, shard: ShardFile) -> list[Input]:
    inputs, first_row = [], 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        rows = group.num_rows
        if rows:
            size = group.total_byte_size
            place = (index, first_row, shard.label, shard.classes)
            inputs.append(Input(name, size, rows, *place))
        first_row += rows
    return inputs
