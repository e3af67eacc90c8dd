"""Groups of images, such as those of a patient, a slide or a scene, which a split never divides."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selfray.check import require
from selfray.data.shard_set import ShardSet
from selfray.storage import Location, one_line, patiently

FIELD = "data.group_by"
WITHOUT = None
"""The group of all images without one: they stay together, so that none can leak."""
_READERS = 16


@dataclass(frozen=True)
class Grouped:
    """The rows of a data set, divided by their groups into train and test."""

    order: np.ndarray
    """int64 [rows]: all rows of the data set, in an order that follows from the images' paths and
    groups, not from the order of files."""
    is_test: np.ndarray
    """bool [rows], in that order."""
    groups: int
    test_groups: int
    without: int
    """Images without a group, which are one group together."""

    @property
    def described(self) -> str:
        test = int(self.is_test.sum())
        line = (
            f"{self.groups:,} groups: {self.groups - self.test_groups:,} of them "
            f"({len(self.is_test) - test:,} images) for train, {self.test_groups:,} ({test:,} "
            "images) held out for the test"
        )
        if self.without:
            line += f"; {self.without:,} images have no group and count as one"
        return line


def divided(shards: ShardSet, group_by: str, share: float) -> Grouped:
    """Divide a data set's rows so that no group is on both sides.

    Groups are taken in an order that follows from their names, and each is held out if the held-out
    images stay within the share; if none fits, the smallest one is. Raises ValueError if there are
    no two groups, or the groups cannot be read.
    """
    groups, keys = _read(shards, group_by)
    sizes = Counter(groups)
    require(
        len(sizes) > 1,
        f"{FIELD} {group_by} puts all {len(groups):,} images of {shards.uri} into one group, which "
        "cannot be split: give another column or expression, or test images of their own",
    )
    order = sorted(sizes, key=lambda group: (group is WITHOUT, _digest(f"group {group}")))
    held: set[str | None] = set()
    images = 0
    for group in order:
        if images + sizes[group] <= share * len(groups):
            held.add(group)
            images += sizes[group]
    if not held:
        held = {min(order, key=lambda group: (sizes[group], order.index(group)))}
    is_test = np.array([group in held for group in groups])
    places = np.array(sorted(range(len(groups)), key=lambda row: (_digest(keys[row]), row)))
    return Grouped(places, is_test[places], len(sizes), len(held), sizes.get(WITHOUT, 0))


def shared_groups(train: ShardSet, test: ShardSet, group_by: str) -> str:
    """A line about how many groups of the test images are among those of the train images."""
    of_train, of_test = (
        {group for group in _read(shards, group_by)[0] if group is not None}
        for shards in (train, test)
    )
    both = of_train & of_test
    if not both:
        return f"none of the {len(of_test):,} groups of the test images is among the train images"
    return (
        f"{len(both):,} of the {len(of_test):,} groups of the test images are among the train "
        f"images, such as {min(both)}: numbers on these test images are too good"
    )


def _read(shards: ShardSet, group_by: str) -> tuple[list[str | None], list[str]]:
    """(the group of each row, a text that identifies each row), in the order of the rows."""
    schema = _schema(shards.files[0].uri)
    if group_by in schema.names:
        require(
            group_by not in (shards.label_column, shards.image_column),
            f"{FIELD} {group_by} is the column of the "
            f"{'labels' if group_by == shards.label_column else 'images'}: give one that names "
            "patients, slides or scenes",
        )
        pattern = None
    else:
        pattern = _expression(group_by, shards, schema)
    path = _path_of(schema, shards.image_column)
    require(
        pattern is None or path is not None,
        f"{FIELD} {group_by} is matched with the images' paths, and the column "
        f"{shards.image_column} of {shards.uri} holds none: give a column, of "
        f"{', '.join(schema.names)}",
    )

    def read(uri: str) -> tuple[list[str | None], list[str]]:
        column = group_by if pattern is None else None
        values, paths = _columns(uri, column, path)
        name = uri.rpartition("/")[2]
        keys = [text or f"{name} {row}" for row, text in enumerate(paths)]
        if pattern is None:
            return values, keys
        return [_group_in(pattern, text) for text in paths], keys

    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(read, [file.uri for file in shards.files]))
    groups = [group for own, _ in found for group in own]
    if all(group is WITHOUT for group in groups):
        examples = next((key for _, keys in found for key in keys), "")
        raise ValueError(
            f"{FIELD} {group_by} "
            + ("holds no value" if pattern is None else f"matches no path, such as {examples}")
            + f" in {shards.uri}: give another column or expression"
        )
    return groups, [key for _, keys in found for key in keys]


def _expression(text: str, shards: ShardSet, schema: pa.Schema) -> re.Pattern[str]:
    known = ", ".join(schema.names)
    require(
        re.fullmatch(r"[\w. -]+", text) is None,
        f"{FIELD}: {shards.uri} has no column {text}, only {known}; give one of them, or a regular "
        "expression with a group in parentheses for the images' paths, such as '(patient[0-9]+)'",
    )
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ValueError(f"{FIELD} {text} is no regular expression: {error}") from None
    require(
        pattern.groups > 0,
        f"{FIELD} {text} has no group in parentheses, which names what stays together: write "
        f"'({text})' or similar",
    )
    return pattern


def _group_in(pattern: re.Pattern[str], path: str | None) -> str | None:
    found = pattern.search(path) if path else None
    if found is None:
        return WITHOUT
    return "/".join(part or "" for part in found.groups())


def _schema(uri: str) -> pa.Schema:
    location = Location.of(uri)
    with location.filesystem.open_input_file(location.path) as file:
        return pq.read_schema(file)


def _path_of(schema: pa.Schema, column: str) -> str | None:
    """The column of the images' paths, as Parquet names it."""
    kind = schema.field(column).type
    if pa.types.is_struct(kind):
        return f"{column}.path" if kind.get_field_index("path") >= 0 else None
    return column if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def _columns(
    uri: str, column: str | None, path: str | None
) -> tuple[list[str | None], list[str | None]]:
    """(the values of a column, the paths) of one file's rows; of neither, the bytes are read."""
    location = Location.of(uri)

    def read() -> pa.Table:
        with location.filesystem.open_input_file(location.path) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            names = parquet.schema_arrow.names
            require(
                column is None or column in names,
                f"{FIELD}: {uri} has no column {column}, only {', '.join(names)}",
            )
            wanted = [name for name in (column, path) if name is not None]
            return parquet.read(columns=wanted)

    try:
        table = patiently(read, location)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{FIELD}: {uri} cannot be read ({one_line(error)}); `selfray shards check` tests it"
        ) from None
    nothing: list[str | None] = [None] * table.num_rows
    values = nothing if column is None else list(_texts(table.column(column)))
    if path is None:
        return values, nothing
    name, _, inner = path.rpartition(".") if path.endswith(".path") else (path, "", "")
    paths = table.column(name)
    if inner:
        paths = pa.chunked_array([chunk.field("path") for chunk in paths.chunks], pa.string())
    return values, paths.to_pylist()


def _texts(values: pa.ChunkedArray) -> Iterator[str | None]:
    for value in values.to_pylist():
        yield None if value is None or value == "" else str(value)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
