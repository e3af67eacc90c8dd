"""Reads labels from a table beside images, as in Hugging Face's ImageFolder: metadata.csv, .jsonl
or .parquet."""

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfray.data.columns import LABEL_COLUMNS
from selfray.data.files import File
from selfray.storage import Location, one_line

NAME_COLUMNS = ("file_name", "filename", "file", "path", "image_path", "image")
"""Possible names of the column of image paths, which are relative to the table's folder."""


def labels_in_tables(
    root: Location, tables: Sequence[File], label_column: str | None
) -> tuple[dict[str, str], list[str]]:
    """(label by the image's name in the data set, notes for the user).

    Raises ValueError if a table lacks the requested `label_column`.
    """
    labels: dict[str, str] = {}
    notes: list[str] = []
    for table in tables:
        folder = posixpath.dirname(table.name)
        try:
            for row in _rows(root / table.name):
                name = _value(row, NAME_COLUMNS)
                label = _value(row, (label_column,) if label_column else LABEL_COLUMNS)
                if label_column is not None and label_column not in row:
                    raise ValueError(
                        f"--data.label-column {label_column} is not in {root / table.name}, which "
                        f"has {', '.join(map(str, list(row)[:10]))}"
                    )
                if name and label and not label.startswith("-"):
                    labels[posixpath.normpath(posixpath.join(folder, name))] = label
        except (OSError, pa.ArrowException, UnicodeError, csv.Error, json.JSONDecodeError) as error:
            notes.append(
                f"{root / table.name} cannot be read ({one_line(error)}): its labels from there on "
                "are not used"
            )
    if not labels and not notes:
        notes.append(f"{root / tables[0].name} has no column {' or '.join(LABEL_COLUMNS[:2])}")
    return labels, notes


def _rows(location: Location) -> Iterator[dict[str, Any]]:
    if location.path.endswith(".parquet"):
        with location.filesystem.open_input_file(location.path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        return
    with (
        location.filesystem.open_input_stream(location.path) as stream,
        io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text,
    ):
        if location.path.endswith(".csv"):
            yield from csv.DictReader(text)
            return
        for line in text:
            row = json.loads(line) if line.strip() else None
            if isinstance(row, dict):
                yield row


def _value(row: dict[str, Any], columns: Sequence[str]) -> str:
    """A row's entry, as text, in the first of the columns that has one; empty if none has."""
    lower = {str(key).lower(): value for key, value in row.items()}
    for column in columns:
        value = row.get(column, lower.get(column.lower()))
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str | int) and str(value).strip():
            return str(value).strip()
    return ""
