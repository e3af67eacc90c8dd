"""Writes shards: Parquet files of verified images, and a record of each.

A shard's record lies in DST/_build until the build is complete; all records add up to the Manifest.
"""

import collections
import contextlib
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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selfray.check import require
from selfray.data.checksums import checksum, labels_written, write_footer_checksum, written
from selfray.data.destination import finish, intact, open_destination, refuse_other_plan, start
from selfray.data.files import Quarantined
from selfray.data.listing import Plan, WorkItem
from selfray.data.manifest import BUILD_FOLDER, PLAN, Manifest, ShardRecord, shard_name
from selfray.data.measured import Measuring, are_alike, channels_of
from selfray.data.options import BuildOptions
from selfray.data.rows import GROUP, MIB, Layout, Row, Sample
from selfray.data.samples import read_samples
from selfray.data.shard_set import NO_LABEL
from selfray.pixels import codecs
from selfray.pixels.deep import ValueCounts, raws_of
from selfray.pixels.intake import Taken, take
from selfray.storage import Location, one_line

ROW_GROUP_BYTES = 4 * MIB
ROW_GROUP_ROWS = 1024
"""Row groups are small because the reader shuffles by row groups and reads each of them whole."""


def schema_of(layout: Layout) -> pa.Schema:
    """Hugging Face's image layout, with the metadata of features that `datasets` reads."""
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    fields = [pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    if layout.has_labels:
        fields.append(pa.field("label", pa.int64()))
        features["label"] = {"dtype": "int64", "_type": "Value"}
        if layout.label_names is not None:
            features["label"] = {"names": list(layout.label_names), "_type": "ClassLabel"}
    if layout.group_column is not None:
        fields.append(pa.field(GROUP, pa.string()))
        features[GROUP] = {"dtype": "string", "_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema(fields, metadata=metadata)


class _ParquetShard:
    """Builds a Parquet file in memory; closes each row group as soon as it is full."""

    def __init__(self, layout: Layout) -> None:
        self._schema = schema_of(layout)
        self._file = io.BytesIO()
        has_labels = "label" in self._schema.names
        self._labels: collections.Counter[int] | None = (
            collections.Counter() if has_labels else None
        )
        # JPEGs do not compress further: on 300 photographs (32 MB) ZSTD saved 0.6 %, SNAPPY 0.3 %,
        # and reading was a fifth slower. A dictionary of distinct images halves the speed of
        # writing, and statistics of image bytes are useless.
        self._parquet = pq.ParquetWriter(
            self._file,
            self._schema,
            compression="NONE",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        self._checksums: list[int] = []
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
        if self._labels is not None:
            self._labels.update(row.label for row in rows)
            columns.append(pa.array([row.label for row in rows], pa.int64()))
        if GROUP in self._schema.names:
            columns.append(pa.array([row.group for row in rows], pa.string()))
        self._parquet.write_table(pa.table(columns, schema=self._schema))
        self._checksums += [checksum(row.data) for row in rows]
        self.row_groups.append(len(rows))

    def finish(self) -> bytes:
        if self._rows:
            self._close_row_group()
        self._parquet.add_key_value_metadata(written(self._checksums))
        if self._labels is not None:
            self._parquet.add_key_value_metadata(labels_written(dict(sorted(self._labels.items()))))
        self._parquet.close()
        write_footer_checksum(self._file)
        return self._file.getvalue()


class ShardBuilder:
    """Verifies samples, shrinks them if asked, and collects the counts for the manifest."""

    def __init__(
        self,
        layout: Layout,
        options: BuildOptions,
        shuffle_seed: str | None = None,
        window: tuple[float, float] | None = None,
        channels: int | None = None,
    ) -> None:
        """`window`, of the whole data set, and `channels` are those of the job."""
        self._options = options
        self._intake = options.intake
        if window is not None:
            self._intake = dataclasses.replace(self._intake, window=window, window_of="fixed")
        self._channels = channels
        self._measuring = Measuring()
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
        """A row of the source: an image, or several where its file has pages."""
        if isinstance(row, Quarantined):
            self.quarantined.append(row)
            return
        options = self._options

        def broken(page: int, error: codecs.BrokenImage) -> None:
            self._refuse(_of_page(row, page).name, error)

        try:
            for taken in take(row.data, self._intake, options.max_pixels, options.max_side, broken):
                own = row if taken.page is None else _of_page(row, taken.page)
                self._add_image(own._replace(data=taken.data), taken)
        except codecs.BrokenImage as error:
            self._refuse(row.name, error)

    def _refuse(self, name: str, error: codecs.BrokenImage) -> None:
        self.quarantined.append(Quarantined(name, error.reason, one_line(error)))

    def _add_image(self, row: Sample, taken: Taken) -> None:
        try:
            info, pixels = codecs.checked(row.data, self._options.max_pixels)
            width, height, kind = info.width, info.height, info.format
            channels = channels_of(pixels)
            if self._channels is not None and not are_alike(channels, self._channels):
                said = "--channels is" if self._options.channels else "most of the data set have"
                raise codecs.BrokenImage(
                    "channels", f"the image has {channels}, and {said} {self._channels}"
                )
            max_side = self._options.max_side
            if max_side is not None and max(width, height) > max_side:
                row = row._replace(data=codecs.shrink(row.data, max_side))
                pixels = codecs.decode(row.data)
                (height, width), kind = pixels.shape[:2], "JPEG"
        except codecs.BrokenImage as error:
            self._refuse(row.name, error)
            return
        self._measuring.add(pixels, channels, taken.described)
        self._widths[str(width)] += 1
        self._heights[str(height)] += 1
        self._formats[kind] += 1
        if self._has_labels:
            self._labels[str(row.label)] += 1
        if self._shuffle_seed is None:
            self._shard.add(row)
        else:
            self._waiting.append(row)

    def write(self, destination: Location, number: int, split: str = "") -> ShardRecord:
        """Write the shard and then its record: a shard without a record does not count."""
        if self._shuffle_seed is not None:
            random.Random(self._shuffle_seed).shuffle(self._waiting)
        while self._waiting:
            self._shard.add(self._waiting.pop())  # pop: never two copies in memory
        data = self._shard.finish()
        name, rows = shard_name(number, split), sum(self._shard.row_groups)
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
            measured=self._measuring.result(),
            quarantined=tuple(self.quarantined),
        )
        (destination / BUILD_FOLDER / f"{name}.json").write_json(dataclasses.asdict(record))
        return record


def _of_page(row: Sample, page: int) -> Sample:
    return row._replace(name=f"{row.name}#page {page}", path=row.path and f"{row.path}#page {page}")


def _sorted_counts(counts: collections.Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


# A work item's shards ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Settings shared by all tasks of a build."""

    source: Location
    destination: Location
    layout: Layout
    options: BuildOptions
    window: tuple[float, float] | None = None
    """The values that become black and white, where percentiles of all images gave them."""
    channels: int | None = None
    """Images of others are quarantined; None where it is not known what most images have."""
    left_out: frozenset[str] = frozenset()
    """Names of rows that are not written."""


def build_item(job: Job, item: WorkItem, finished: frozenset[int]) -> list[ShardRecord]:
    """Build the missing shards of a work item; runs as a Ray task.

    It holds in memory the rows of one shard, their Parquet file and some images read ahead, but
    never a whole source file.
    """
    _require_shared_storage(job)
    records = []
    by_shard = itertools.groupby(
        _cut(item, read_samples(job.source, job.layout, item.inputs)), lambda r: r[0]
    )
    for number, rows in by_shard:
        if number in finished:
            continue
        # Files of a folder were shuffled by the plan; rows of tars and Parquet are shuffled here.
        shuffle_seed = None if job.layout.kind == "images" else f"{job.options.seed} shard {number}"
        builder = ShardBuilder(job.layout, job.options, shuffle_seed, job.window, job.channels)
        for _, row in rows:
            if not (isinstance(row, Sample) and row.name in job.left_out):
                builder.add(row)
        records.append(builder.write(job.destination, number, item.split))
    for number in set(item.shard_numbers) - finished - {record.number for record in records}:
        empty = ShardBuilder(job.layout, job.options)
        records.append(empty.write(job.destination, number, item.split))
    return records


def values_of_item(job: Job, item: WorkItem) -> tuple[np.ndarray, np.ndarray]:
    """The values of a work item's deep images, as (codes int64, counts int64): see ValueCounts.
    Runs as a Ray task."""
    counts = ValueCounts()
    for row in read_samples(job.source, job.layout, item.inputs):
        if isinstance(row, Sample):
            with contextlib.suppress(codecs.BrokenImage):  # the build will name it
                for raw in raws_of(row.data, job.options.max_pixels) or ():
                    counts.add(raw.values)
    return counts.pairs()


def _cut(item: WorkItem, rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
    """Assign a shard number to each row, by bytes read, so that broken images do not matter."""
    share = item.bytes / item.shards
    number, read = 0, 0
    for row in rows:
        if number < item.shards - 1 and read >= share * (number + 1):
            number += 1
        if isinstance(row, Sample):
            read += len(row.data)
        yield item.first_shard + number, row


def _require_shared_storage(job: Job) -> None:
    """Raise FileNotFoundError if this node cannot see source and destination. A local folder exists
    only on one node: others would find no images and write their shards to their own disks."""
    for location in (job.source, job.destination / BUILD_FOLDER / PLAN):
        if not location.exists():
            raise FileNotFoundError(
                f"{location} does not exist on the node {os.uname().nodename}: source and "
                "destination must be on storage that every node reaches, such as s3:// or NFS"
            )


# Without Ray -------------------------------------------------------------------------------------


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

    `images` are encoded files (JPEG, PNG, ...), `names` their paths; the manifest records `source`
    as their origin. The same call a second time returns the existing result. Raises ValueError if
    an image is broken, lengths differ, or the folder holds something else.
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
    state = open_destination(destination)
    if state.plan is not None:
        refuse_other_plan(destination, state, plan)
    if state.manifest is not None:
        shards = dict(enumerate(state.manifest.shards))
        if len(intact(destination, shards)) == len(shards):
            return state.manifest
    builders = []
    for first in range(0, len(images), rows_per_shard):
        builder = ShardBuilder(plan.layout, options)
        for index in range(first, min(first + rows_per_shard, len(images))):
            label = NO_LABEL if labels is None else int(labels[index])
            builder.add(Sample(names[index], images[index], label))
        if builder.quarantined:
            broken = builder.quarantined[0]
            raise ValueError(f"image {broken.file} is broken: {broken.message}; leave it out")
        builders.append(builder)
    start(destination, plan)
    records = [builder.write(destination, number) for number, builder in enumerate(builders)]
    return finish(destination, plan, records)
