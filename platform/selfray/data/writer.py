"""How shards are written: Parquet files of verified images, a record of each, and the manifest.

A shard's record lies in DST/_build until the build is complete; what all records add up to is the
Manifest.
"""

import collections
import dataclasses
import hashlib
import io
import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from selfray.check import require
from selfray.data.listing import (
    MIB,
    BuildOptions,
    Layout,
    Plan,
    Quarantined,
    Row,
    Sample,
    WorkItem,
    one_line,
    read_samples,
)
from selfray.data.reader import NO_LABEL
from selfray.pixels import codecs
from selfray.storage import Location

ROW_GROUP_BYTES = 4 * MIB
ROW_GROUP_ROWS = 1024
"""Row groups are small because the reader shuffles by row groups and reads each of them whole."""

MANIFEST = "manifest.json"
BUILD_FOLDER = "_build"  # readers of Parquet folders pass over names that start with _
PLAN = "plan.json"


# The manifest -----------------------------------------------------------------------------------


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
                f"{location} cannot be read: {one_line(error)}; restore it from a copy, or delete "
                f"{folder} and build the shards again"
            ) from None


# A shard and its record -------------------------------------------------------------------------


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


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"


def shard_number(name: str) -> int:
    return int(name.removeprefix("shard-").removesuffix(".parquet"))


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
        self._rows: list[Sample] = []
        self._bytes = 0
        self.row_groups: list[int] = []

    def add(self, row: Sample) -> None:
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


class ShardBuilder:
    """Verifies samples, shrinks them where asked, and counts what the manifest tells."""

    def __init__(
        self, layout: Layout, options: BuildOptions, shuffle_seed: str | None = None
    ) -> None:
        self._options = options
        self._shuffle_seed = shuffle_seed
        self._shard = _ParquetShard(layout)
        self._waiting: list[Sample] = []
        self._has_labels = layout.has_labels
        self._labels: collections.Counter[str] = collections.Counter()
        self._widths: collections.Counter[str] = collections.Counter()
        self._heights: collections.Counter[str] = collections.Counter()
        self._formats: collections.Counter[str] = collections.Counter()
        self.quarantined: list[Quarantined] = []

    def add(self, row: Row) -> None:
        if isinstance(row, Quarantined):
            self.quarantined.append(row)
            return
        try:
            info = codecs.check(row.data, self._options.max_pixels)
            width, height, kind = info.width, info.height, info.format
            max_side = self._options.max_side
            if max_side is not None and max(width, height) > max_side:
                row = row._replace(data=codecs.shrink(row.data, max_side))
                with Image.open(io.BytesIO(row.data)) as image:  # reads the header only
                    (width, height), kind = image.size, image.format or kind
        except codecs.BrokenImage as error:
            self.quarantined.append(Quarantined(row.name, error.reason, one_line(error)))
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
        name, rows = shard_name(number), sum(self._shard.row_groups)
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


# A work item's shards ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What the tasks of one build have in common."""

    source: Location
    destination: Location
    layout: Layout
    options: BuildOptions


def build_item(job: Job, item: WorkItem, finished: frozenset[int]) -> list[ShardRecord]:
    """Build the shards of a work item that are not there yet; runs as a Ray task.

    Memory: the rows of one shard and their Parquet file, some images read ahead; never a source
    file as a whole.
    """
    _require_shared_storage(job)
    records = []
    by_shard = itertools.groupby(
        _cut(item, read_samples(job.source, job.layout, item.inputs)), lambda r: r[0]
    )
    for number, rows in by_shard:
        if number in finished:
            continue
        # A folder's files come in shuffled order; what lies in one file is shuffled here.
        shuffle_seed = None if job.layout.kind == "images" else f"{job.options.seed} shard {number}"
        builder = ShardBuilder(job.layout, job.options, shuffle_seed)
        for _, row in rows:
            builder.add(row)
        records.append(builder.write(job.destination, number))
    for number in set(item.shard_numbers) - finished - {record.number for record in records}:
        empty = ShardBuilder(job.layout, job.options)
        records.append(empty.write(job.destination, number))
    return records


def _cut(item: WorkItem, rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
    """Name the shard of each row. By bytes read, so that it does not depend on what is sound."""
    share = item.bytes / item.shards
    number, read = 0, 0
    for row in rows:
        if number < item.shards - 1 and read >= share * (number + 1):
            number += 1
        if isinstance(row, Sample):
            read += len(row.data)
        yield item.first_shard + number, row


def _require_shared_storage(job: Job) -> None:
    """A local folder exists on one node only: without this, the others would find every image
    missing, and write their shards where nobody looks."""
    for location in (job.source, job.destination / BUILD_FOLDER / PLAN):
        if not location.exists():
            raise FileNotFoundError(
                f"{location} is not there on the node {os.uname().nodename}: source and "
                "destination must be on storage that every node reaches, such as s3:// or NFS"
            )


# All records together ---------------------------------------------------------------------------


def manifest_of(
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
