"""Reads labels from a table beside images, as in Hugging Face's ImageFolder: metadata.csv, .jsonl
or .parquet."""

import csv
import io
import itertools
import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfray.data.columns import LABEL_COLUMNS
from selfray.data.files import File
from selfray.storage import Location, one_line

NAME_COLUMNS = (
    "file_name", "filename", "file", "path", "image_path", "image", "file_names", "images",
)  # fmt: skip
"""Possible names of the column of image paths, which are relative to the table's folder. An entry
may be a list: all of its images have the row's label."""


def labels_in_tables(
    root: Location,
    tables: Sequence[File],
    label_column: str | None,
    flag: str = "--data.label-column",
) -> tuple[dict[str, str], list[str]]:
    """(label by the image's name in the data set, notes for the user).

    Raises ValueError, which names the flag, if a table lacks the requested `label_column`.
    """
    labels: dict[str, str] = {}
    notes: list[str] = []
    for table in tables:
        folder = posixpath.dirname(table.name)
        try:
            for row in _rows(root / table.name):
                label = _value(row, (label_column,) if label_column else LABEL_COLUMNS)
                if label_column is not None and label_column not in row:
                    raise ValueError(
                        f"{flag} {label_column} is not in {root / table.name}, which "
                        f"has {', '.join(map(str, list(row)[:10]))}"
                    )
                if not label or label.startswith("-"):
                    continue
                for name in _values(row, NAME_COLUMNS):
                    labels[posixpath.normpath(posixpath.join(folder, name))] = label
                    if "\\" in name:  # as Windows writes paths
                        other = name.replace("\\", "/")
                        labels[posixpath.normpath(posixpath.join(folder, other))] = label
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
        io.TextIOWrapper(stream, encoding=_encoding(location), newline="") as text,
    ):
        if location.path.endswith(".csv"):
            first = text.readline()
            delimiter = max(",;\t", key=first.count)  # of the column names
            yield from csv.DictReader(itertools.chain([first], text), delimiter=delimiter)
            return
        for line in text:
            row = json.loads(line) if line.strip() else None
            if isinstance(row, dict):
                yield row


def _encoding(location: Location) -> str:
    """By the mark at the beginning: spreadsheets write UTF-16."""
    with location.filesystem.open_input_stream(location.path) as stream:
        return "utf-16" if stream.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _value(row: dict[str, Any], columns: Sequence[str]) -> str:
    """A row's entry, as text, in the first of the columns that has one; empty if none has."""
    return next(iter(_values(row, columns)), "")


def _values(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """A row's entries, as text, in the first of the columns that has any: several of a list, of
    Hugging Face's images their paths."""
    lower = {str(key).lower(): value for key, value in row.items()}
    for column in columns:
        value = row.get(column, lower.get(column.lower()))
        entries = [_text(entry) for entry in (value if isinstance(value, list) else [value])]
        if found := list(filter(None, entries)):
            return found
    return []


def _text(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("path")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() if isinstance(value, str | int) else ""
