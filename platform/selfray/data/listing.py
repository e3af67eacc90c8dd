"""Plans a build: lists a folder of images, WebDataset tars or Parquet files as work items.

A plan is data: every shard number belongs to one work item, and a work item's shards follow only
from its inputs and the seed. `make_plan` lists a source.

Skipped silently: files and folders whose name starts with a dot, Thumbs.db, desktop.ini and
__MACOSX; beside Parquet files or tars, all other files. Any other file that is not a sound image
becomes a Quarantined with its reason. Files left out because they belong to no split are reported.
"""

import hashlib
import json
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfray.check import require
from selfray.data import columns, summary
from selfray.data.checksums import footer_is_checked
from selfray.data.files import File, Listing, Quarantined, bare_values, list_source, select
from selfray.data.layout import (
    SPLITS,
    TEST,
    TRAIN,
    UNLABELED,
    VALIDATION,
    LabelRule,
    SourceKind,
    Understood,
    pictures,
    understand,
)
from selfray.data.options import BuildOptions
from selfray.data.rows import Input, Layout, raise_if_outage
from selfray.data.shard_set import NO_LABEL, ShardFile, ShardSet, open_shards, rows_of
from selfray.data.tables import labels_in_tables
from selfray.data.tar_listing import plan_tars
from selfray.storage import Location, one_line

_GROUP_COLUMN = "--group-column"


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
    class_order: str = ""
    """"numbers" if the classes are in another order than that of their names as text, which
    earlier versions took."""

    def identity(self) -> dict[str, Any]:
        """The values that identify a build: two builds with equal values are the same."""
        understood: dict[str, Any] = (
            {"understood": dict(self.understood)} if self.understood else {}
        )
        if self.class_order:
            understood["class_order"] = self.class_order
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
    quarantined, notes, has_folders = list(listing.quarantined), [], False
    shards: ShardSet | None = None
    if kind == "images":
        inputs, layout, notes = _plan_images(listing, files, tables, understood, options)
        quarantined += bare_values(names)
        inputs = [entry for entry in inputs if entry.name not in {q.file for q in quarantined}]
        images_total = len(inputs)
    elif kind == "tar":
        require(
            options.group_column is None,
            f"{_GROUP_COLUMN} {options.group_column}: tars have no columns; --group-by of a run "
            "takes a regular expression for the paths",
        )
        rule, column = options.labels, options.label_column
        tars = plan_tars(listing.root, files, understood, rule, column)
        inputs, layout, understood = tars.inputs, tars.layout, tars.understood
        has_folders = tars.has_folders
    else:
        inputs, layout, broken, shards = _plan_parquet(source, listing, files, understood, options)
        notes = list(shards.notes)
        images_total = sum(entry.rows for entry in inputs)
        quarantined += broken
    split_of = dict(zip(names, understood.splits, strict=True))
    counted = partial(_part, inputs, split_of, layout, set(pictures(names, kind)), shards)
    left_out = understood.left_out
    if kind == "parquet":  # as images, not as files
        left_out = {top: rows_of(_below(listing, names, top)) for top in left_out}
    said = _said(counted, replace(understood, left_out=left_out))
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
        understood=_understood(names, understood, kind, bool(tables), options.labels)
        | ({"inside": True} if has_folders else {}),
        notes=(said[0], *notes, *said[1:]),
        class_order=_class_order(understood.classes or ()),
    )


def _class_order(classes: Sequence[str]) -> str:
    return "" if list(classes) == sorted(classes) else "numbers"


def _below(listing: Listing, names: Sequence[str], top: str) -> list[str]:
    return [listing.uri(name) for name in names if name == top or name.startswith(top)]


def _said(counted: Callable[[Sequence[str]], summary.Part], understood: Understood) -> list[str]:
    """What was understood, and what is odd about it.

    Args:
        counted: tells the images of some splits.
    """
    train, test = counted((TRAIN, UNLABELED)), counted((VALIDATION, TEST))
    unlabeled = counted((UNLABELED,)).images if understood.has_splits else None
    origin = " and ".join(filter(None, (understood.origins.get(s) for s in (VALIDATION, TEST))))
    has_test = test.images is None or test.images > 0
    of_test = test if has_test else None
    line = summary.line(
        train, of_test, origin, unlabeled or 0, understood.left_out, understood.joined
    )
    return [line, *summary.odd(train, of_test)]


def _part(
    inputs: Sequence[Input],
    split_of: Mapping[str, str | None],
    layout: Layout,
    seen: Collection[str],
    shards: ShardSet | None,
    splits: Sequence[str],
) -> summary.Part:
    """The images of some splits, as far as they are known before they are read."""
    own = [entry for entry in inputs if (entry.split or split_of[entry.name]) in splits]
    if shards is not None:
        # The sound files, in the order of the inputs' names.
        order = dict.fromkeys(entry.name for entry in inputs)
        used = {entry.name for entry in own}
        files = [f for f in shards.files if f.rows]
        chosen = tuple(f for name, f in zip(order, files, strict=True) if name in used)
        return summary.part_of(replace(shards, files=chosen))
    names = layout.label_names or ()
    if layout.kind == "images":
        own = [entry for entry in own if entry.name in seen]
        labels = [entry.label for entry in own]
    elif all(entry.folders is not None for entry in own):
        labels = [label for entry in own for _, label in entry.folders or ()]
    else:
        return summary.Part(None, None if layout.has_labels else 0, names, len(own))
    known = tuple(names[label] for label in sorted(set(labels) - {NO_LABEL}))
    images = sum(entry.rows for entry in own)
    labelled: int | None = sum(label != NO_LABEL for label in labels)
    if layout.kind == "tar" and labelled:
        labelled = images if NO_LABEL not in labels else None
    elif layout.kind == "tar" and layout.has_labels:
        return summary.Part(images, None, names)
    return summary.Part(images, labelled, known)


def says_more(
    names: Sequence[str], understood: Understood, kind: SourceKind, has_tables: bool
) -> bool:
    """Whether names mean more than classes one folder down, which is all that the first version of
    selfray understood."""
    if understood.has_splits or understood.left_out or has_tables:
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
    if understood.has_splits or understood.left_out:
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
        own = [entry for entry in inputs if (entry.split or split_of[entry.name]) == split]
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
            there = {file.name for file in files}
            if lost := sum(not {n, n.replace("\\", "/")} & there for n in found):
                notes.append(f"{lost:,} images named in {tables[0].name} do not exist")
    elif options.label_column is not None:
        notes = [f"--data.label-column {options.label_column}: a folder of images has no columns"]
    place = {name: index for index, name in enumerate(names or ())}
    groups: dict[str, str] = {}
    if options.group_column is not None:
        require(
            bool(tables),
            f"{_GROUP_COLUMN} {options.group_column}: {listing.root} has no table of columns, such "
            "as metadata.csv; --group-by of a run takes a regular expression for the paths",
        )
        column = options.group_column
        groups, more = labels_in_tables(listing.root, tables, column, _GROUP_COLUMN)
        notes += [note for note in more if note not in notes]
    inputs = [
        Input(
            file.name,
            file.bytes,
            label=NO_LABEL if label is None else place[label],
            group=groups.get(file.name),
        )
        for file, label, split in zip(files, labels, understood.splits, strict=True)
        if split is not None
    ]
    layout = Layout("images", names is not None, names, group_column=options.group_column)
    return inputs, layout, notes


def _plan_parquet(
    source: Location,
    listing: Listing,
    files: Sequence[File],
    understood: Understood,
    options: BuildOptions,
) -> tuple[list[Input], Layout, list[Quarantined], ShardSet]:
    """(one input for each row group, the layout by the first sound file, broken files, the sound
    ones)."""

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
    group = options.group_column
    for file, _, found in sound:
        require(
            group is None or group in found.names,
            f"{_GROUP_COLUMN} {group} is not in {listing.uri(file.name)}, which has "
            f"{', '.join(found.names)}",
        )
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
        options.group_column,
    )
    return inputs, layout, broken, shards if names is not None else shards.without_labels


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
