"""Parquet shards as one data set: its files, its row groups and its columns.

The layout is Hugging Face's: a column of struct<bytes: binary, path: string>, and an integer
`label` column if there are labels. Files written by `datasets` open as they are.
"""

import fnmatch
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from selfray.storage import Location, patiently

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


def only(shards: ShardSet, file: ShardFile) -> ShardSet:
    """The data set cut down to one of its files."""
    return replace(shards, files=(file,))
