"""The meaning of a Parquet file's columns: which holds the images, which the labels, and the
classes.

Labels may be integers of any size and with gaps, whole floats, text, bools, or a dictionary of
these. A class's label is its index among the sorted values, 0..C-1. Negative, empty, null and NaN
values mean no label.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from selfray.data.layout import natural

NO_LABEL = -1
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls", "category")
MOST_CLASSES = 100_000
"""A column with more distinct values holds names or numbers of images, not classes."""
SMALLEST_IMAGE = 64
"""Values of fixed size below this many bytes are digests or ids."""
HOW_TO_CHOOSE = "--data.image-column (--image-column of selfray's commands)"

Value = int | str
# Its functions are generated at import, so type checkers do not know them.
pc: Any = pyarrow.compute


# Images ------------------------------------------------------------------------------------------


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_fixed_size_binary(kind):
        return kind.byte_width >= SMALLEST_IMAGE
    return (
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(f.name == "bytes" and _holds_bytes(f.type) for f in kind.fields)
    return _holds_bytes(kind)


def _is_list_of_images(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ) and _holds_images(kind.value_type)


def described(schema: pa.Schema) -> str:
    """Names and types of the first ten columns, for a message."""
    shown = [f"{f.name}: {f.type}" for f in list(schema)[:10]]
    return ", ".join([*shown, *(["..."] if len(schema) > 10 else [])]) or "no columns"


def image_column(schema: pa.Schema, file: object, wanted: str | None) -> str:
    """The name of the image column. Raises ValueError if there is none or the choice is
    ambiguous."""
    columns = described(schema)
    candidates = [f.name for f in schema if _holds_images(f.type)]
    if wanted is not None and schema.names.count(wanted) != 1:
        what = "is not in" if wanted not in schema.names else "is the name of several columns of"
        raise ValueError(f"--data.image-column {wanted} {what} {file}, which has {columns}")
    lists = [f for f in schema if _is_list_of_images(f.type)]
    several = [f for f in lists if f.name == wanted or (wanted is None and not candidates)]
    if several:
        raise ValueError(
            f"{file}: its column {several[0].name} holds several images in a row "
            f"({several[0].type}): write one row for each image, as explode of pandas does"
        )
    if wanted is not None:
        if wanted not in candidates and not _holds_paths(schema.field(wanted).type):
            raise ValueError(f"--data.image-column {wanted} holds no images in {file}: {columns}")
        return wanted
    if not candidates:
        named = [f.name for f in schema if f.name in _IMAGE_NAMES and _holds_paths(f.type)]
        if len(named) == 1:
            return named[0]
        raise ValueError(
            f"{file} has no image column (binary, or struct<bytes, path>); its columns are "
            f"{columns}; name one with {HOW_TO_CHOOSE}, or give the folder of the images"
        )
    usual = [name for name in _IMAGE_NAMES if candidates.count(name) == 1]
    if usual:
        return usual[0]
    if len(candidates) > 1:
        raise ValueError(
            f"{file} has several columns that may hold images ({', '.join(candidates)}): choose "
            f"one with {HOW_TO_CHOOSE}"
        )
    return candidates[0]


_IMAGE_NAMES = ("image", "img", "file_name", "image_path", "path", "file")


def _holds_paths(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(f.name == "path" and _is_text(f.type) for f in kind.fields)
    return _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


# Labels ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classes:
    """How the values of one file's label column become labels."""

    values: tuple[Value | None, ...] = field(repr=False)
    """values[label] is the value of a class in this file; None for a class that it does not
    have."""

    def __post_init__(self) -> None:
        # Computed once: each read needs the hash, and there may be thousands of names.
        object.__setattr__(self, "_hash", hash(self.values))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        return Classes, (self.values,)  # hash(str) differs between processes


@dataclass(frozen=True)
class LabelColumn:
    """The label column of a data set, or the reason why no column can be used."""

    name: str | None
    names: tuple[str, ...] | None = None
    """Names of the integers 0, 1, ..., if the file's metadata has them."""
    refused: str = ""
    """For a column that has a usual label name but cannot be used: the column and the reason."""


def label_column(schema: pa.Schema, file: object, wanted: str | None) -> LabelColumn:
    """The label column. Raises ValueError if the `wanted` one is missing or unusable."""
    features = _features(schema)
    if wanted is not None:
        reason = _why_unusable(schema, wanted)
        if reason:
            raise ValueError(
                f"--data.label-column {wanted} of {file} {reason}; its columns are "
                f"{described(schema)}"
            )
        return LabelColumn(wanted, _names(features, wanted))
    lower = {name.lower(): name for name in reversed(schema.names)}
    usual = [lower[name] for name in LABEL_COLUMNS if name in lower]
    classes = [n for n, f in features.items() if isinstance(f, dict) and _is_class_label(f)]
    refused = ""
    for name in [*usual, *(n for n in classes if n in schema.names and len(classes) == 1)]:
        reason = _why_unusable(schema, name)
        if not reason:
            return LabelColumn(name, _names(features, name))
        refused = refused or f"the column {name} of {file} {reason}"
    return LabelColumn(None, refused=refused)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The features that Hugging Face's `datasets` stores in the schema's metadata, by column."""
    try:
        info: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except ValueError:  # bad metadata; the columns can be read without it
        return {}
    for key in ("info", "features"):
        info = info.get(key, info if key == "info" else None) if isinstance(info, dict) else None
    return info if isinstance(info, dict) else {}


def _is_class_label(feature: dict[str, Any]) -> bool:
    return feature.get("_type") == "ClassLabel"


def _names(features: dict[str, Any], column: str) -> tuple[str, ...] | None:
    feature = features.get(column)
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not names:
        return None
    texts = tuple(str(name) for name in names)
    return texts if len(set(texts)) == len(texts) else None


def _why_unusable(schema: pa.Schema, name: str) -> str:
    """Why a column cannot hold labels, as the end of a sentence; empty if it can."""
    count = schema.names.count(name)
    if count != 1:
        return "exists more than once" if count else "is missing"
    kind = schema.field(name).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_null(kind):
        return "is empty"
    if pa.types.is_nested(kind):
        return f"holds {kind} and not one value for each image"
    usable = (
        _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        or pa.types.is_floating(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    )  # fmt: skip
    return "" if usable else f"holds {kind}, which cannot be classes"


class NoClassesError(ValueError):
    """Raised for a label column whose values are not classes; the message ends a sentence."""


def plain_values(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Label values as int64 or text [n], null for none. Raises NoClassesError for other values."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    kind = array.type
    if pa.types.is_dictionary(kind):
        # take, not cast: a cast would read out of bounds if indices are damaged.
        array = array.dictionary.take(array.indices)
        kind = array.type
    try:
        if pa.types.is_floating(kind):
            array = pc.if_else(pc.is_nan(array), pa.scalar(None, kind), array)
            return _not_negative(array.cast(pa.int64()))
        if pa.types.is_uint64(kind) and len(array) and (pc.max(array).as_py() or 0) >= 2**63:
            return array.cast(pa.string())
        if pa.types.is_integer(kind):
            return _not_negative(array.cast(pa.int64()))
        text = array.cast(pa.string())
    except pa.ArrowInvalid as error:
        what = "numbers that are not whole" if pa.types.is_floating(kind) else "bytes, not text"
        raise NoClassesError(f"holds {what}") from error
    text = pc.utf8_trim_whitespace(text)
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def _not_negative(array: pa.Array) -> pa.Array:
    return pc.if_else(pc.less(array, 0), pa.scalar(None, pa.int64()), array)


def plain_or_none(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Like `plain_values`, but nulls for a part whose values are not classes, such as one that was
    added after the classes were listed."""
    try:
        return plain_values(column)
    except NoClassesError:
        return pa.nulls(len(column), pa.int64())


def labels_of(column: pa.ChunkedArray | pa.Array, classes: Classes) -> np.ndarray:
    """Labels int64 [n]; -1 for a row without label or with a value that is not among the
    classes."""
    values = plain_or_none(column)
    if pa.types.is_int64(values.type) and _counts_from_zero(classes):
        found = values.fill_null(NO_LABEL).to_numpy(zero_copy_only=False)
        return np.where(found < len(classes.values), found, NO_LABEL)
    wanted = _value_set(classes, values.type)
    return (
        pc.index_in(values, wanted, skip_nulls=True)
        .fill_null(NO_LABEL)
        .to_numpy(zero_copy_only=False)
        .astype(np.int64)
    )


@lru_cache(maxsize=64)
def _counts_from_zero(classes: Classes) -> bool:
    return classes.values == tuple(range(len(classes.values)))


@lru_cache(maxsize=64)
def _value_set(classes: Classes, kind: pa.DataType) -> pa.Array:
    if pa.types.is_int64(kind):
        return pa.array([v if isinstance(v, int) else _as_int(v) for v in classes.values], kind)
    return pa.array([None if v is None else str(v) for v in classes.values], pa.string())


def _as_int(value: str | None) -> int | None:
    return int(value) if value is not None and is_label_number(value) else None


def is_label_number(text: str) -> bool:
    """Whether a label's text is a non-negative number that fits into int64."""
    return text.isascii() and text.isdigit() and len(text) < 20 and int(text) < 2**63


def distinct(column: pa.ChunkedArray | pa.Array) -> dict[Value, int]:
    """The distinct values of a label column and the number of rows of each."""
    values = plain_values(column).drop_null()
    return {row["values"]: row["counts"] for row in pc.value_counts(values).to_pylist()}


def class_names(
    columns: Sequence[tuple[tuple[str, ...] | None, Iterable[Value]]],
) -> tuple[str, ...]:
    """The classes of a data set, from (names of 0, 1, ..., found values) of each file.

    If all files give the same names, these are the classes, even those without images.
    """
    given = {names for names, _ in columns}
    if len(given) == 1 and (names := next(iter(given))) is not None:
        return names
    found: set[str] = set()
    for names, values in columns:
        if names is not None:
            found.update(names)
        else:
            found.update(str(value) for value in values)
    return tuple(sorted(found, key=natural))


def coded(
    names: tuple[str, ...] | None, values: Iterable[Value], classes: tuple[str, ...]
) -> Classes:
    """How a file encodes the `classes`: by its own names of 0, 1, ..., or by its values."""
    if names is not None:
        own: dict[str, Value] = {name: index for index, name in enumerate(names)}
    else:
        own = {str(value): value for value in values}
    return Classes(tuple(own.get(name) for name in classes))


def too_many_classes(count: int) -> str:
    return "" if count <= MOST_CLASSES else f"has more than {MOST_CLASSES:,} values"
