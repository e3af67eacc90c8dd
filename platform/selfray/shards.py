"""Reading Parquet shards: what a folder holds, and the bytes of chosen rows. pyarrow only.

The layout is Hugging Face's: a column of struct<bytes: binary, path: string>, and an integer
`label` column if there are labels. Files written by `datasets` open as they are.
"""

import fnmatch
import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selfray.storage import Location, is_about_the_file, one_line, patiently

TRAIN_NAMES = ("train",)
TEST_NAMES = ("test", "validation", "valid", "val")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
NO_LABEL = -1


@dataclass(frozen=True)
class ShardFile:
    uri: str
    group_rows: tuple[int, ...]
    """Rows of each row group."""

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

    def __hash__(self) -> int:
        # Asked for in each read: not over thousands of files and their row groups.
        return hash((self.uri, self.image_column, len(self.files)))

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def group_rows(self) -> tuple[int, ...]:
        return tuple(rows for file in self.files for rows in file.group_rows)

    @property
    def has_labels(self) -> bool:
        return self.label_column is not None


def parquet_files(path: str | Location) -> list[str]:
    """The Parquet files at a path: a file, a folder (searched whole) or a pattern with * in its
    last part. Hidden files and folders are passed over. Empty where there are none."""
    text = str(path)
    if "*" in text.rpartition("/")[2]:
        folder, _, pattern = text.rpartition("/")
        return [uri for uri in parquet_files(folder or ".") if fnmatch.fnmatch(_name(uri), pattern)]
    location = Location.of(path)
    if location.exists() and not location.is_folder():
        return [location.uri] if location.path.endswith(".parquet") else []
    prefix = len(location.path.rstrip("/")) + 1
    inner = [info.path[prefix:] for info in location.list(recursive=True) if info.is_file]
    return [
        (location / name).uri
        for name in inner
        if name.endswith(".parquet")
        and not any(part.startswith((".", "_")) for part in name.split("/"))
    ]


def split_files(uris: Sequence[str], folder: str | Location) -> tuple[list[str], list[str]]:
    """(train, test) by Hugging Face's convention: `train-00000.parquet` or `test/0.parquet`.

    Where nothing bears such a name, all files are train.
    """
    root = str(folder) if "://" in str(folder) else Location.of(folder).uri
    root = root.rstrip("/")
    train, test, other = [], [], []
    for uri in uris:
        inner = uri[len(root) + 1 :] if uri.startswith(root + "/") else _name(uri)
        words = [part.lower() for part in inner.split("/")]
        if any(_bears(word, TEST_NAMES) for word in words):
            test.append(uri)
        elif any(_bears(word, TRAIN_NAMES) for word in words):
            train.append(uri)
        else:
            other.append(uri)
    if train or other:
        return (train or other), test
    return test, []


def _bears(word: str, names: Sequence[str]) -> bool:
    stem = word.removesuffix(".parquet")
    return any(stem == name or stem.startswith((name + "-", name + "_")) for name in names)


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]


def open_shards(uris: Sequence[str], uri: str, image_column: str | None = None) -> ShardSet:
    """Read the footers of some Parquet files. ValueError names the file that cannot be used."""
    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(_footer, uris))
    schema = footers[0].schema.to_arrow_schema()
    image = image_column or _image_column(schema, uris[0])
    if image not in schema.names:
        raise ValueError(
            f"--data.image-column {image} is not in {uris[0]}, which has {', '.join(schema.names)}"
        )
    label = next(
        (
            n
            for n in LABEL_COLUMNS
            if n in schema.names and pa.types.is_integer(schema.field(n).type)
        ),
        None,
    )
    files = tuple(
        ShardFile(u, tuple(f.row_group(i).num_rows for i in range(f.num_row_groups)))
        for u, f in zip(uris, footers, strict=True)
    )
    shards = ShardSet(uri, files, image, label, _label_names(schema, label))
    if shards.rows == 0:
        raise ValueError(f"{uri} holds no images: all of its {len(files)} Parquet files are empty")
    for u, footer in zip(uris, footers, strict=True):
        missing = {image, label} - set(footer.schema.to_arrow_schema().names) - {None}
        if missing:
            raise ValueError(f"{u} lacks the column {missing.pop()}, which {uris[0]} has")
    return shards


def _footer(uri: str) -> pq.FileMetaData:
    location = Location.of(uri)
    try:
        return patiently(lambda: _metadata(location), location)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{uri} is not a readable Parquet file ({reason}); mend or remove it, "
            "`selfray shards check FOLDER` tests them all"
        ) from None


def _metadata(location: Location) -> pq.FileMetaData:
    with location.filesystem.open_input_file(location.path) as file:
        return pq.ParquetFile(file).metadata


def _image_column(schema: pa.Schema, uri: str) -> str:
    def holds_images(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    candidates = [field.name for field in schema if holds_images(field.type)]
    for name in ("image", "img", *candidates):
        if name in candidates:
            return name
    raise ValueError(
        f"{uri} has no image column (binary, or struct<bytes, path>); its columns are "
        f"{', '.join(f'{f.name}: {f.type}' for f in schema)}; name one with --data.image-column, "
        "or make shards with `selfray shards build`"
    )


def _label_names(schema: pa.Schema, label: str | None) -> tuple[str, ...] | None:
    """Class names as Hugging Face's `datasets` keeps them in the schema's metadata."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    if label is None or metadata is None:
        return None
    info = json.loads(metadata)
    feature = info.get("info", info).get("features", {}).get(label, {})
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(names) if names else None


class UnreadableShard(OSError):  # noqa: N818 - it names the file, not the fault
    """A shard, or a row group of one, that is lost or damaged: `name` says which, `reason` why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class RowGroupCache:
    """The row groups that this process read last, up to a number of bytes.

    Units of one window share its row groups; a worker process that works on several units of a
    window then reads each row group once. What cannot be read is remembered too, for a while.
    """

    FORGET_SECONDS = 300.0
    """How long a lost shard is not asked for again: each asking may wait for the storage."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._tables: OrderedDict[tuple[str, int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._unreadable: dict[tuple[str, int | None], tuple[float, UnreadableShard]] = {}

    def read(self, shards: ShardSet, file: ShardFile, group: int) -> pa.Table:
        """One row group's columns. UnreadableShard where the file is lost or damaged; OSError
        where its storage fails for longer than it is waited for."""
        columns = [shards.image_column, *([shards.label_column] if shards.label_column else [])]
        key = (file.uri, group, tuple(columns))
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        for known in ((file.uri, None), (file.uri, group)):
            until, error = self._unreadable.get(known, (0.0, None))
            if error is not None and time.monotonic() < until:
                raise error
        try:
            table = self._read(file, group, columns)
        except UnreadableShard as error:
            whole = error.name == file.uri
            until = time.monotonic() + self.FORGET_SECONDS
            self._unreadable[file.uri, None if whole else group] = (until, error)
            raise
        self._tables[key] = table
        while (
            sum(t.nbytes for t in self._tables.values()) > self.limit_bytes
            and len(self._tables) > 1
        ):
            self._tables.popitem(last=False)
        return table

    @staticmethod
    def _read(file: ShardFile, group: int, columns: list[str]) -> pa.Table:
        location = Location.of(file.uri)
        name = file.uri

        def read() -> pa.Table:
            nonlocal name
            with location.filesystem.open_input_file(location.path) as stream:
                parquet = pq.ParquetFile(stream)
                found = parquet.metadata.num_row_groups
                if found != len(file.group_rows):
                    raise pa.ArrowInvalid(
                        f"{found} row groups where there were {len(file.group_rows)} at the start"
                    )
                name = f"{file.uri} row group {group}"
                rows = parquet.metadata.row_group(group).num_rows
                if rows != file.group_rows[group]:
                    raise pa.ArrowInvalid(
                        f"{rows} rows where there were {file.group_rows[group]} at the start"
                    )
                return parquet.read_row_group(group, columns=columns)

        try:
            return patiently(read, location)
        except pa.ArrowException as error:
            raise UnreadableShard(name, one_line(error)) from error
        except OSError as error:
            if not location.is_local and not is_about_the_file(error):
                raise  # the store is away, for longer than it was waited for: no fault of the file
            raise UnreadableShard(name, _reason(error)) from error


def _reason(error: OSError) -> str:
    return "the file is gone" if isinstance(error, FileNotFoundError) else one_line(error)


CACHE = RowGroupCache(limit_bytes=256 * 2**20)


@dataclass(frozen=True)
class ChosenRows:
    """Some rows of a data set, in the order in which they were asked for."""

    images: list[bytes]
    """Empty where the row has no bytes or its shard cannot be read."""
    labels: np.ndarray
    """int64 [n]; -1 where there is none."""
    unreadable: dict[int, UnreadableShard]
    """Why a row's shard could not be read, by its place among the rows."""


def read_chosen(
    shards: ShardSet, groups: np.ndarray, rows: np.ndarray, cache: RowGroupCache = CACHE
) -> ChosenRows:
    """The chosen rows. A lost or damaged shard costs its own rows only; OSError where the storage
    fails for longer than it is waited for."""
    chosen = ChosenRows([b""] * len(rows), np.full(len(rows), NO_LABEL, dtype=np.int64), {})
    where = _group_index(shards)
    for group in np.unique(groups):
        wanted = np.flatnonzero(groups == group)
        try:
            table = cache.read(shards, *where[int(group)])
        except UnreadableShard as error:
            chosen.unreadable.update(dict.fromkeys(wanted.tolist(), error))
            continue
        taken = table.take(pa.array(rows[wanted]))
        column = taken.column(shards.image_column)
        if pa.types.is_struct(column.type):
            # flatten, not field: a struct that is null has bytes that mean nothing.
            names = [column.type.field(i).name for i in range(column.type.num_fields)]
            column = column.flatten()[names.index("bytes")]
        for index, value in zip(wanted, column.to_pylist(), strict=True):
            chosen.images[index] = value or b""
        if shards.label_column:
            # Unsigned integers have no room for -1.
            values = taken.column(shards.label_column).cast(pa.int64()).fill_null(NO_LABEL)
            chosen.labels[wanted] = values.to_numpy()
    return chosen


def read_rows(
    shards: ShardSet, groups: np.ndarray, rows: np.ndarray, cache: RowGroupCache = CACHE
) -> tuple[list[bytes], np.ndarray]:
    """(image bytes, labels int64 [n]) of chosen rows, in their order; the label is -1 where there
    is none, the bytes are empty where the row has none or its shard cannot be read."""
    chosen = read_chosen(shards, groups, rows, cache)
    return chosen.images, chosen.labels


@lru_cache(maxsize=8)
def _group_index(shards: ShardSet) -> list[tuple[ShardFile, int]]:
    return [(file, i) for file in shards.files for i in range(len(file.group_rows))]


def sample_rows(shards: ShardSet, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(groups, rows) of some rows spread over the data set, the same ones for the same seed."""
    starts = np.concatenate([[0], np.cumsum(shards.group_rows)])
    chosen = np.random.default_rng(seed).permutation(shards.rows)[:count]
    groups = np.searchsorted(starts, chosen, side="right") - 1
    return groups.astype(np.int64), (chosen - starts[groups]).astype(np.int64)


def only(shards: ShardSet, file: ShardFile) -> ShardSet:
    """The data set cut down to one of its files."""
    return replace(shards, files=(file,))
