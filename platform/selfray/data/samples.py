"""Reads the inputs of a shard: image files, members of tars, rows of Parquet files.

Everything that is not a sound image becomes a Quarantined with its reason.
"""

import collections
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfray.data.beside import MAX_IMAGE_BYTES, read_beside
from selfray.data.columns import NO_LABEL, is_label_number, labels_of
from selfray.data.files import Quarantined
from selfray.data.rows import MIB, Input, Layout, Row, Sample, raise_if_outage, too_large
from selfray.data.tar import read_tar
from selfray.storage import Location, one_line

READ_AHEAD_BYTES = 32 * MIB


def _read_files(root: Location, inputs: Iterable[Input]) -> Iterator[Row]:
    def read(entry: Input) -> Row:
        name = entry.name
        if entry.bytes > MAX_IMAGE_BYTES:
            return too_large(name, entry.bytes)
        try:
            data = (root / name).read_bytes()
        except OSError as error:
            raise_if_outage(error, root)
            return Quarantined(name, "unreadable", one_line(error))
        return Sample(name, data, entry.label, group=entry.group)

    # Read ahead: object stores and network disks are slow per request, but serve many in parallel.
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


def _read_row_groups(root: Location, layout: Layout, inputs: Iterable[Input]) -> Iterator[Row]:
    for entry in inputs:
        columns = [layout.image_column]
        if layout.label_column and entry.classes is not None:
            columns.append(layout.label_column)
        if layout.group_column is not None:
            columns.append(layout.group_column)
        location = root / entry.name
        row = entry.first_row
        try:
            with location.filesystem.open_input_file(location.path) as stream:
                parquet = pq.ParquetFile(stream, page_checksum_verification=True)
                # Few rows at a time: row groups of other writers may be as large as a shard.
                for batch in parquet.iter_batches(
                    batch_size=64, row_groups=[entry.row_group], columns=columns
                ):
                    pictures = batch.column(layout.image_column).to_pylist()
                    labels = [entry.label] * len(pictures)
                    if layout.label_column and entry.classes is not None:
                        labels = labels_of(
                            batch.column(layout.label_column), entry.classes
                        ).tolist()
                    groups: list[Any] = [None] * len(pictures)
                    if layout.group_column is not None:
                        groups = batch.column(layout.group_column).to_pylist()
                    for picture, label, group in zip(pictures, labels, groups, strict=True):
                        found = _row_of(location, f"{entry.name}#row {row}", picture, label)
                        if isinstance(found, Sample) and group is not None:
                            found = found._replace(group=str(group))
                        yield found
                        row += 1
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise_if_outage(error, root)
            message = f"rows from {row} on in row group {entry.row_group}: {one_line(error)}"
            yield Quarantined(entry.name, "unreadable", message)


def _row_of(file: Location, name: str, picture: Any, label: int) -> Row:
    data, path = picture, ""
    if isinstance(picture, dict):
        data, path = picture.get("bytes"), picture.get("path") or ""
    elif isinstance(picture, str):
        data, path = None, picture
    if data is None and path:
        try:
            data = read_beside(file.uri, path)
        except (OSError, ValueError) as error:
            raise_if_outage(error, file)
            message = f"the row has no bytes, only the path {path}: {one_line(error)}"
            return Quarantined(name, "no image", message)
    if data is None:
        return Quarantined(name, "no image", "the row has no image")
    if len(data) > MAX_IMAGE_BYTES:
        return too_large(name, len(data))
    return Sample(name, data, label, path)


def read_samples(root: Location, layout: Layout, inputs: Iterable[Input]) -> Iterator[Row]:
    """The rows of some inputs of a source, in order."""
    if layout.kind == "images":
        return _read_files(root, inputs)
    if layout.kind == "tar":
        return _read_tars(root, layout, inputs)
    return _read_row_groups(root, layout, inputs)


def _read_tars(root: Location, layout: Layout, inputs: Iterable[Input]) -> Iterator[Row]:
    place = {name: label for label, name in enumerate(layout.label_names or ())}
    for entry in inputs:
        folders = None if entry.folders is None else dict(entry.folders)
        for row in read_tar(root, entry.name, layout.label_column, folders=folders):
            if isinstance(row, Sample):
                folder = entry.label if row.label == NO_LABEL else row.label
                row = row._replace(label=_label_of(row.text, folder, layout, place), text=None)
            yield row


def _label_of(text: str | None, folder: int, layout: Layout, place: dict[str, int]) -> int:
    if folder != NO_LABEL or not layout.has_labels or text is None:
        return folder
    if layout.label_names is not None:
        return place.get(text, NO_LABEL)
    return int(text) if is_label_number(text) else NO_LABEL
