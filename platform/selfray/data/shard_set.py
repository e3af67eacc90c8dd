"""Parquet shards as one data set: its files, its row groups, its columns and its classes.

The layout is Hugging Face's: a column of struct<bytes: binary, path: string>, and a label column
if there are labels. Files written by `datasets` can be opened directly.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from selfray.data import columns
from selfray.data.beside import require_images_beside
from selfray.data.checksums import footer_is_checked, labels_in
from selfray.data.columns import NO_LABEL, Classes, LabelColumn, NoClassesError, Value
from selfray.storage import Location, one_line, patiently


@dataclass(frozen=True)
class ShardFile:
    uri: str
    group_rows: tuple[int, ...]
    """Rows of each row group."""
    classes: Classes | None = field(default=None, compare=False, repr=False)
    """How values of its label column become labels; None without a usable label column."""
    label: int = field(default=NO_LABEL, compare=False)
    """The label of all its rows, if a folder named like `label=cat` gives one."""
    labelled: int = field(default=0, compare=False)
    """Number of rows with a label."""

    @property
    def rows(self) -> int:
        return sum(self.group_rows)


@dataclass(frozen=True)
class ShardSet:
    """Parquet files that make one data set, in a fixed order."""

    uri: str
    files: tuple[ShardFile, ...]
    image_column: str
    label_column: str | None = None
    label_names: tuple[str, ...] | None = None
    """label_names[label] is the class; None without labels."""
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Notes for the user about its columns, one line each."""

    def __hash__(self) -> int:
        # Each read needs the hash, and there may be thousands of files: hash only their number.
        return hash((self.uri, self.image_column, len(self.files)))

    @property
    def digest(self) -> str:
        """32 hex digits that identify the files, by their names and rows."""
        text = "\n".join(f"{file.uri} {file.group_rows}" for file in self.files)
        return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:32]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def group_rows(self) -> tuple[int, ...]:
        return tuple(rows for file in self.files for rows in file.group_rows)

    @property
    def has_labels(self) -> bool:
        return self.label_names is not None

    @property
    def labelled(self) -> "ShardSet":
        """The data set with only those files that have labels."""
        files = tuple(file for file in self.files if file.labelled)
        return self if len(files) == len(self.files) else replace(self, files=files)


def open_shards(
    uris: Sequence[str],
    uri: str,
    image_column: str | None = None,
    label_column: str | None = None,
    folder_labels: Mapping[str, str] | None = None,
) -> ShardSet:
    """Open Parquet files as one data set: read their footers and their labels.

    Args:
        uris: the files.
        uri: the data set, for messages.
        image_column, label_column: None finds them.
        folder_labels: the class of all rows of a file, by its URI, if folders are classes.

    Raises:
        ValueError: a file cannot be used; the message names it, the reason and the way out.
    """
    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(_footer, uris))
        first = next((i for i, f in enumerate(footers) if f.metadata.num_rows), None)
        if first is None:
            raise ValueError(
                f"{uri} holds no images: all of its {len(uris)} Parquet files are empty"
            )
        schema = footers[first].schema
        image = columns.image_column(schema, uris[first], image_column)
        for u, (_, found, _) in zip(uris, footers, strict=True):
            if found.names.count(image) != 1:
                raise ValueError(f"{u} lacks the column {image}, which {uris[first]} has")
        require_images_beside(uris[first], schema, image)
        label = columns.label_column(schema, uris[first], label_column)
        for u, (_, other, _) in zip(uris, footers, strict=True):
            if label.name is None and not other.equals(schema):
                label = columns.label_column(other, u, None)
        scans = [_Labels()] * len(uris)
        if label.name is not None and not folder_labels:
            scan = _scanner(label.name)
            scans = list(pool.map(scan, uris, footers))
    files = [
        ShardFile(u, tuple(f.row_group(i).num_rows for i in range(f.num_row_groups)))
        for u, (f, _, _) in zip(uris, footers, strict=True)
    ]
    if folder_labels:
        names = tuple(sorted(set(folder_labels.values()), key=columns.natural))
        files = [
            replace(f, label=names.index(folder_labels[f.uri]), labelled=f.rows)
            if f.uri in folder_labels
            else f
            for f in files
        ]
        return ShardSet(uri, tuple(files), image, None, names)
    return _with_classes(ShardSet(uri, tuple(files), image), label, scans)


@dataclass(frozen=True)
class _Labels:
    """The content of one file's label column."""

    names: tuple[str, ...] | None = None
    counts: Mapping[Value, int] = field(default_factory=dict)
    refused: str = ""


def _with_classes(shards: ShardSet, column: LabelColumn, scans: Sequence[_Labels]) -> ShardSet:
    """Add the classes of all files to the data set."""
    reasons = [scan.refused for scan in scans if scan.refused]
    notes = [f"{column.refused}: it is not used"] if column.refused else []
    notes += [f"{reason}: its images have no labels" for reason in reasons[:1]]
    used = [scan for scan in scans if scan.counts or scan.names]
    found = columns.class_names([(scan.names, scan.counts) for scan in used]) if used else ()
    reason = columns.too_many_classes(len(found))
    if reason:
        notes = [f"the column {column.name} of {shards.uri} {reason}: it is not used as labels"]
    if column.name is not None and not reasons and not any(scan.counts for scan in scans):
        notes = [f"the column {column.name} of {shards.uri} holds no label: all are missing or -1"]
    if reason or not any(scan.counts for scan in used):
        return replace(shards, notes=tuple(notes))
    files, known = [], {}
    for file, scan in zip(shards.files, scans, strict=True):
        if not scan.counts:
            files.append(file)
            continue
        key = (scan.names, tuple(scan.counts) if scan.names is None else None)
        classes = known.setdefault(key, columns.coded(scan.names, scan.counts, found))
        usable = set(classes.values)
        labelled = sum(count for value, count in scan.counts.items() if value in usable)
        files.append(replace(file, classes=classes, labelled=labelled))
    return replace(
        shards,
        files=tuple(files),
        label_column=column.name,
        label_names=found,
        notes=tuple(notes),
    )


def with_common_classes(train: ShardSet, test: ShardSet) -> tuple[ShardSet, ShardSet]:
    """Recode the labels of two data sets to common classes: the union of both, by name."""
    if not (train.has_labels and test.has_labels) or train.label_names == test.label_names:
        return train, test
    names = tuple(dict.fromkeys([*(train.label_names or ()), *(test.label_names or ())]))
    return _recoded(train, names), _recoded(test, names)


def _recoded(shards: ShardSet, names: tuple[str, ...]) -> ShardSet:
    before = shards.label_names or ()
    place = {name: index for index, name in enumerate(names)}
    known: dict[Classes, Classes] = {}
    files = []
    for file in shards.files:
        classes, label = file.classes, file.label
        if classes is not None:
            if classes not in known:
                own = dict(zip(before, classes.values, strict=True))
                known[classes] = Classes(tuple(own.get(name) for name in names))
            classes = known[classes]
        if label != NO_LABEL:
            label = place[before[label]]
        files.append(replace(file, classes=classes, label=label))
    return replace(shards, files=tuple(files), label_names=names)


# Reading footers and label columns ---------------------------------------------------------------


class _Footer(NamedTuple):
    metadata: pq.FileMetaData
    schema: pa.Schema
    is_checked: bool
    """Whether it has a valid checksum, which only selfray writes."""


def _footer(uri: str) -> _Footer:
    location = Location.of(uri)
    try:
        return patiently(lambda: _metadata(location), location)
    # For damaged bytes pyarrow raises many types, of its own and of Thrift's.
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{uri} is not a readable Parquet file ({reason}); repair or remove it, "
            "`selfray shards check FOLDER` tests them all"
        ) from None


def _metadata(location: Location) -> _Footer:
    with location.filesystem.open_input_file(location.path) as file:
        is_checked = footer_is_checked(file)
        footer = pq.ParquetFile(file).metadata
        return _Footer(footer, footer.schema.to_arrow_schema(), is_checked)


def _scanner(column: str) -> Callable[[str, _Footer], _Labels]:
    def scan(uri: str, footer: _Footer) -> _Labels:
        metadata, schema, is_checked = footer
        if column not in schema.names or not metadata.num_rows:
            return _Labels()
        try:
            names = columns.label_column(schema, uri, column).names
        except ValueError as error:
            return _Labels(refused=str(error).partition(" of ")[2].partition(";")[0])
        written = labels_in(metadata) if is_checked and column == "label" else None
        if written is not None:
            return _Labels(names, {label: n for label, n in written.items() if label >= 0})
        location = Location.of(uri)
        try:
            counts = patiently(lambda: label_counts(location, column), location)
        except NoClassesError as error:
            return _Labels(refused=f"the column {column} of {uri} {error}")
        except (pa.ArrowException, OSError) as error:
            return _Labels(
                refused=f"the column {column} of {uri} cannot be read ({one_line(error)})"
            )
        return _Labels(names, counts)

    return scan


def label_counts(location: Location, column: str) -> Counter[Value]:
    """The values of a file's label column and the number of rows of each.

    Raises NoClassesError if they are not classes, OSError or ArrowException if they cannot be read.
    """
    counts: Counter[Value] = Counter()
    with location.filesystem.open_input_file(location.path) as stream:
        parquet = pq.ParquetFile(stream, page_checksum_verification=True)
        for group in range(parquet.metadata.num_row_groups):
            table = parquet.read_row_group(group, columns=[column])
            try:
                counts.update(columns.distinct(table.column(column)))
            except UnicodeError as error:
                raise NoClassesError("holds text that is not UTF-8") from error
            if reason := columns.too_many_classes(len(counts)):
                raise NoClassesError(reason)
    return counts


def rows_of(uris: Sequence[str]) -> int:
    """The number of rows of those files that can be read."""

    def rows(uri: str) -> int:
        try:
            return _footer(uri).metadata.num_rows
        except ValueError:
            return 0

    with ThreadPoolExecutor(16) as pool:
        return sum(pool.map(rows, uris))


def only(shards: ShardSet, file: ShardFile) -> ShardSet:
    """The data set reduced to one of its files."""
    return replace(shards, files=(file,))
