"""Checksums that Parquet lacks: one for each image, and one for the footer.

Parquet has one checksum per page, and a page holds many images, so reading a single image cannot
verify it. Therefore the footer holds a checksum of each image. CRC-32 of 100 kB takes 0.025 ms;
decoding them takes 1 ms or more.

The footer, which holds all offsets, has no checksum in Parquet, and pyarrow crashes the process on
some damaged footers. Therefore the 12 bytes before it, which Parquet readers ignore, hold its
checksum. Image checksums count only with a verified footer, because other programs may copy the
metadata while they rewrite the rows.
"""

import base64
import binascii
import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KEY = b"selfray.crc32"
"""Key in the file's metadata; the value is uint32 [rows], little-endian, in base64."""

checksum = zlib.crc32


LABELS_KEY = b"selfray.labels"
"""Key in the file's metadata; the value is JSON of label -> rows, which saves reading the
column."""
_MARK = b"selfray#"
_END = b"PAR1"


def written(checksums: Sequence[int]) -> dict[str, str]:
    """The footer's metadata entry for image checksums."""
    data = np.array(checksums, dtype="<u4").tobytes()
    return {KEY.decode(): base64.b64encode(data).decode()}


def checksums_in(footer: pq.FileMetaData) -> np.ndarray | None:
    """Image checksums uint32 [rows]; None if the file has none, or not one per row."""
    text = (footer.metadata or {}).get(KEY)
    if text is None:
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
    return np.frombuffer(data, "<u4") if len(data) == 4 * footer.num_rows else None


def of_group(footer: pq.FileMetaData, checksums: np.ndarray, group: int) -> np.ndarray:
    """The checksums of one row group's images, out of the whole file's."""
    first = sum(footer.row_group(i).num_rows for i in range(group))
    return checksums[first : first + footer.row_group(group).num_rows]


def write_footer_checksum(file: io.BytesIO) -> None:
    """Insert the footer's checksum before the footer of a complete Parquet file."""
    size = file.seek(0, io.SEEK_END)
    file.seek(size - 8)
    start = size - 8 - struct.unpack("<I", file.read(4))[0]
    file.seek(start)
    tail = file.read()
    file.seek(start)
    file.write(_MARK + struct.pack("<I", checksum(tail[:-8])) + tail)


def footer_is_checked(stream: pa.NativeFile) -> bool:
    """Whether an open file's footer has a valid checksum. Raises ArrowInvalid if it does not
    match."""
    size = stream.size()
    if size < 8 + len(_MARK) + 4:
        return False
    length, end = struct.unpack("<I4s", stream.read_at(8, size - 8))
    start = size - 8 - length - len(_MARK) - 4
    if end != _END or start < 0:
        return False
    found = stream.read_at(len(_MARK) + 4 + length, start)
    if not found.startswith(_MARK):
        return False
    if struct.unpack_from("<I", found, len(_MARK))[0] != checksum(found[len(_MARK) + 4 :]):
        raise pa.ArrowInvalid("its footer is damaged (checksum)")
    return True


def labels_written(counts: Mapping[int, int]) -> dict[str, str]:
    """The footer's metadata entry for label counts."""
    return {LABELS_KEY.decode(): json.dumps({str(label): n for label, n in counts.items()})}


def labels_in(footer: pq.FileMetaData) -> dict[int, int] | None:
    """label -> rows, from a verified footer; None if it has no such entry."""
    text = (footer.metadata or {}).get(LABELS_KEY)
    return None if text is None else {int(label): n for label, n in json.loads(text).items()}
