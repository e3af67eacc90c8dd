"""Reads a row group with its pages verified, and takes images and labels of chosen rows."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selfray.data.beside import read_beside
from selfray.data.checksums import checksum, checksums_in, of_group
from selfray.data.columns import labels_of, plain_or_none
from selfray.data.shard_set import NO_LABEL, ShardFile, ShardSet
from selfray.storage import one_line


class Taken(NamedTuple):
    """Chosen rows of a row group."""

    images: list[bytes]
    """The n encoded images; empty bytes for none."""
    labels: np.ndarray
    """int64 [n]; -1 for none."""
    faults: dict[int, str]
    """Why the image of a row is damaged or cannot be reached, by index among the n rows."""


class HeldGroup(NamedTuple):
    """A whole row group in memory."""

    table: pa.Table
    faults: dict[int, str]
    """Why a row's image is damaged, by row."""


def read_group(
    stream: pa.NativeFile,
    parquet: pq.ParquetFile,
    group: int,
    image: str,
    label: str | None,
    is_checked: bool,
) -> HeldGroup:
    """Read a row group and verify its pages. If a page is damaged and images have their own
    checksums, the sound images of the group are kept."""
    wanted = [image] if label is None else [image, label]
    rows = parquet.metadata.row_group(group).num_rows
    faults: dict[int, str] = {}
    try:
        table = parquet.read_row_group(group, columns=wanted)
    except (OSError, pa.ArrowException):
        checksums = checksums_in(parquet.metadata) if is_checked else None
        if checksums is None:
            raise
        unverified = pq.ParquetFile(stream, metadata=parquet.metadata)
        table = unverified.read_row_group(group, columns=[image])
        if table.num_rows != rows:
            raise
        column = table.column(image)
        bytes_of = column.flatten()[0] if pa.types.is_struct(column.type) else column
        images = [value.as_py() or b"" for value in bytes_of]
        faults = damaged(images, np.arange(rows), of_group(parquet.metadata, checksums, group))
        if label is not None:
            table = table.append_column(label, parquet.read_row_group(group, [label]).column(0))
    if table.num_rows != rows:
        raise pa.ArrowInvalid(f"{table.num_rows} rows where its footer has {rows}")
    if label is not None:  # converted, because not every type supports `take`
        place = table.column_names.index(label)
        table = table.set_column(place, label, plain_or_none(table.column(label)))
    return HeldGroup(table, faults)


def damaged(images: list[bytes], rows: np.ndarray, checksums: np.ndarray | None) -> dict[int, str]:
    """The images whose checksum is wrong, by index, with the reason and the way to repair them."""
    if checksums is None:
        return {}
    wanted = checksums[rows].tolist()
    return {
        index: DAMAGED
        for index, (data, right) in enumerate(zip(images, wanted, strict=True))
        if checksum(data) != right
    }


DAMAGED = (
    "damaged: its bytes are not those that were written (checksum); `selfray shards check` finds "
    "the shard, and building again repairs it"
)


def rows_of(read: HeldGroup, shards: ShardSet, file: ShardFile, rows: np.ndarray) -> Taken:
    faults = {
        index: read.faults[row] for index, row in enumerate(rows.tolist()) if row in read.faults
    }
    images = images_of(read.table.column(shards.image_column), file, rows, faults)
    if shards.label_column is None or file.classes is None:
        return Taken(images, np.full(len(rows), NO_LABEL, dtype=np.int64), faults)
    chosen = read.table.select([shards.label_column]).take(rows)
    return Taken(images, labels_of(chosen.column(0), file.classes), faults)


def images_of(
    column: pa.ChunkedArray, file: ShardFile, rows: np.ndarray, faults: dict[int, str]
) -> list[bytes]:
    """The image bytes of chosen rows. Rows in `faults` (by index) are left out; new faults are
    added.
    """
    paths = None
    if pa.types.is_struct(column.type):
        # flatten, not field: the bytes of a null struct are meaningless.
        names = [column.type.field(i).name for i in range(column.type.num_fields)]
        parts = column.flatten()
        paths = parts[names.index("path")] if "path" in names else None
        if "bytes" not in names:
            column = pa.chunked_array([pa.nulls(len(column))])
        else:
            column = parts[names.index("bytes")]
    images = []
    # One by one: a window's rows are spread over many row groups, and for a single row `take` and
    # `to_pylist` take 12 us, this loop 2 us.
    for index, row in enumerate(rows.tolist()):
        value = b"" if index in faults else column[row].as_py()
        path = value if isinstance(value, str) else None
        if path or (value is None and paths is not None):
            try:
                path = path or (paths[row].as_py() if paths is not None else None)
                value = read_beside(file.uri, path) if path else b""
            except (FileNotFoundError, PermissionError, ValueError) as error:
                faults[index] = one_line(error)
        images.append(value if isinstance(value, bytes) else b"")
    return images
