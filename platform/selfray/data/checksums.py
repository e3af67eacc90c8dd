"""What Parquet's own checksums leave out: one of each image, and one of the footer.

Parquet has checksums of pages, of which one holds many images: reading one image does not tell
whether its page is whole. So the footer holds one of each image. CRC-32 of 100 kB takes 0.025 ms,
decoding them 1 ms or more.

The footer, which says where everything lies, has none at all, and pyarrow ends the process over
some that are damaged. So 12 bytes in front of it, which no reader of Parquet looks at, hold its
own. Only a footer with it is believed: whoever writes the rows otherwise may copy the metadata.
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
"""In the key-value metadata of the file: uint32 [rows], little-endian, in base64."""

checksum = zlib.crc32


LABELS_KEY = b"selfray.labels"
"""In the key-value metadata: label -> rows, so that nobody has to read the label column for it."""
_MARK = b"selfray#"
_END = b"PAR1"


def written(checksums: Sequence[int]) -> dict[str, str]:
    """The entry of the footer."""
    data = np.array(checksums, dtype="<u4").tobytes()
    return {KEY.decode(): base64.b64encode(data).decode()}


def checksums_in(footer: pq.FileMetaData) -> np.ndarray | None:
    """uint32 [rows], or None where the file has none, or not one for each row."""
    text = (footer.metadata or {}).get(KEY)
    if text is None:
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
    return np.frombuffer(data, "<u4") if len(data) == 4 * footer.num_rows else None


def of_group(footer: pq.FileMetaData, checksums: np.ndarray, group: int) -> np.ndarray:
    """Those of a row group's images, of a file's."""
    first = sum(footer.row_group(i).num_rows for i in range(group))
    return checksums[first : first + footer.row_group(group).num_rows]


def write_footer_checksum(file: io.BytesIO) -> None:
    """Put the checksum of a whole Parquet file's footer in front of it."""
    size = file.seek(0, io.SEEK_END)
    file.seek(size - 8)
    start = size - 8 - struct.unpack("<I", file.read(4))[0]
    file.seek(start)
    tail = file.read()
    file.seek(start)
    file.write(_MARK + struct.pack("<I", checksum(tail[:-8])) + tail)


def footer_is_checked(stream: pa.NativeFile) -> bool:
    """Whether an open file's footer has a checksum, and is whole. ArrowInvalid where it is not."""
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
    """The entry of the footer for a shard's labels."""
    return {LABELS_KEY.decode(): json.dumps({str(label): n for label, n in counts.items()})}


def labels_in(footer: pq.FileMetaData) -> dict[int, int] | None:
    """label -> rows of a checked footer; None where it does not say."""
    text = (footer.metadata or {}).get(LABELS_KEY)
    return None if text is None else {int(label): n for label, n in json.loads(text).items()}
