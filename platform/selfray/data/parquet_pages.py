"""Finds the offsets of single values in a Parquet file, to read one image without its row group.

A shuffled batch needs one photograph from each of many row groups, each of which holds about 40.
Reading whole row groups reads forty times too much: with 16,000 photographs of 100 kB it took 3 to
4 ms per image, more than decoding and augmenting it. Reading single images takes 0.04 ms.

It follows the format's specification (https://parquet.apache.org/docs/file-format/data-pages/). If
a column is not plain (compressed, with a dictionary, nulls or pages of version 2), its values have
no offsets, and the column is read as a whole.
"""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq

Read = Callable[[int, int], bytes]
"""(offset, length) -> those bytes of the file."""

_HEADER_ROOMS = (256, 65_536)
"""A data page's header takes 20 to 40 bytes, and more only with statistics of long values."""
_SMALL_VALUES = 16_384
"""If values are shorter than this on average, a whole page is read to find them; otherwise only the
length before each value."""
_DATA_PAGE, _PLAIN, _RLE = 0, 0, 3
_TYPE, _PAGE_BYTES, _CHECKSUM, _DATA_PAGE_HEADER = 1, 3, 4, 5
_VALUES, _ENCODING, _LEVEL_ENCODING = 1, 2, 3


def value_places(
    read: Read,
    footer: pq.FileMetaData,
    group: int,
    column: str,
    at_once: bool = False,
    checked: bool = False,
) -> np.ndarray | None:
    """(offset, length) of each value of a row group's binary column: int64 [rows, 2].

    Args:
        column: the path of the column, such as "image.bytes".
        at_once: fetch the whole column in one read, for storage with slow requests.
        checked: each value has its own checksum. If not, pages with a checksum are left to pyarrow,
            which verifies them: a single value cannot verify its page.

    Returns:
        None if the values have no offsets.
    """
    chunks = footer.row_group(group)
    for index in range(chunks.num_columns):
        chunk = chunks.column(index)
        if chunk.path_in_schema == column:
            plain = chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
            if not plain or chunk.physical_type != "BYTE_ARRAY":
                return None
            kind = footer.schema.column(index)
            if kind.max_repetition_level:
                return None
            end = chunk.data_page_offset + chunk.total_compressed_size
            read = _inside(read, chunk.data_page_offset, end)
            if at_once:
                read = _buffered(read, chunk.data_page_offset, end)
            try:
                has_levels = kind.max_definition_level > 0
                return _in_pages(
                    read, chunk.data_page_offset, end, chunk.num_values, has_levels, checked
                )
            except _DAMAGE:
                return None  # pyarrow will say what is wrong with it
    return None


class _UnsupportedPage(Exception):  # noqa: N818 - not an error: such a column is read as a whole
    """Raised for a page of a kind that this module does not read."""


_DAMAGE = (
    *(_UnsupportedPage, LookupError, ValueError, TypeError, AttributeError, ArithmeticError),
    *(RecursionError, struct.error),
)
"""Exceptions that reading damaged page headers can raise."""


def _inside(read: Read, start: int, end: int) -> Read:
    """Limit reads to a column's bytes, so that damaged lengths cannot request gigabytes."""

    def checked(at: int, length: int) -> bytes:
        if length < 0 or at < start or at + length > end:
            raise _UnsupportedPage
        return read(at, length)

    return checked


def _in_pages(
    read: Read, start: int, end: int, count: int, has_levels: bool, checked: bool
) -> np.ndarray:
    places: list[tuple[int, int]] = []
    while len(places) < count:
        header, length = _page_header(read, start, end)
        page = header.get(_DATA_PAGE_HEADER, {})
        if header.get(_TYPE) != _DATA_PAGE or page.get(_ENCODING) != _PLAIN:
            raise _UnsupportedPage
        if _CHECKSUM in header and not checked:
            raise _UnsupportedPage
        first, start = start + length, start + length + header[_PAGE_BYTES]
        if not first <= start <= end:
            raise _UnsupportedPage
        if has_levels:
            if page.get(_LEVEL_ENCODING) != _RLE:
                raise _UnsupportedPage
            # The levels need not be decoded: nulls take no bytes, so the values of a page with
            # nulls do not end at its end, and the check in _in_values fails.
            first += 4 + struct.unpack("<I", read(first, 4))[0]
        places += _in_values(read, first, start, page[_VALUES])
    if len(places) != count:
        raise _UnsupportedPage
    return np.array(places, np.int64)


def _page_header(read: Read, start: int, end: int) -> tuple[dict[int, Any], int]:
    for room in _HEADER_ROOMS[:-1]:
        try:
            return _structure(read(start, min(room, end - start)), 0)
        except IndexError:
            continue
    return _structure(read(start, min(_HEADER_ROOMS[-1], end - start)), 0)


def _in_values(read: Read, first: int, end: int, count: int) -> list[tuple[int, int]]:
    if end - first < count * _SMALL_VALUES:
        read = _buffered(read, first, end)
    places, position = [], first
    for _ in range(count):
        length = struct.unpack("<I", read(position, 4))[0]
        places.append((position + 4, length))
        position += 4 + length
    if position != end:
        raise _UnsupportedPage
    return places


def _buffered(read: Read, start: int, end: int) -> Read:
    data = read(start, end - start)
    return lambda at, length: data[at - start : at - start + length]


# Thrift's compact protocol, as far as needed for page headers


def _structure(data: bytes, position: int) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    field = 0
    while data[position] != 0:
        delta, kind = data[position] >> 4, data[position] & 15
        position += 1
        if delta:
            field += delta
        else:
            field, position = _signed(data, position)
        fields[field], position = _value(data, position, kind)
    return fields, position + 1


def _value(data: bytes, position: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, position
    if kind in (4, 5, 6):
        return _signed(data, position)
    if kind == 8:
        length, position = _varint(data, position)
        return data[position : position + length], position + length
    if kind == 12:
        return _structure(data, position)
    raise _UnsupportedPage


def _signed(data: bytes, position: int) -> tuple[int, int]:
    value, position = _varint(data, position)
    return (value >> 1) ^ -(value & 1), position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
