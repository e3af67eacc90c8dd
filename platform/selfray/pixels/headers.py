"""Headers of JPEG, PNG and WebP files: the declared size and the data needed to decode the rest.

Each header is parsed once, here. Pillow takes 20 us to open an image that OpenCV decodes in 17 us.
"""

import struct
from typing import NamedTuple

import numpy as np

from selfray.pixels.compiled import compiled

i64 = np.int64

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_START = b"\xff\xd8"
_PNG_GRAY, _PNG_RGB = 0, 2
# Chunks that change the pixels in other ways: transparency, animation, orientation.
_PNG_SPECIAL_CHUNKS = (b"tRNS", b"acTL", b"eXIf")


class Header(NamedTuple):
    """The header of an image that OpenCV decodes as Pillow would."""

    format: str
    """"JPEG" or "PNG"."""
    width: int
    height: int
    """In pixels, as stored: before the EXIF orientation is applied."""
    frame: int | None = None
    """Byte offset of a JPEG's frame header (its 0xFF)."""
    progressive: bool = False
    exif: bytes | None = None
    """A JPEG's EXIF segment; b"" if it has several, because decoders choose differently."""
    segments: np.ndarray | None = None
    """A JPEG's segments: see read_segments."""
    stack: int = 0
    """Channels of a multispectral image that selfray stored as a PNG: see STACK_KEY."""


def plain_header(data: bytes) -> Header | None:
    """The header of an image that OpenCV decodes as Pillow would; None for any other bytes."""
    if data.startswith(JPEG_START):
        return _jpeg_header(data)
    if data.startswith(PNG_SIGNATURE):
        return _png_header(data)
    return None


# JPEG

MARKER, START, END = range(3)
"""Columns of a segment: its marker's second byte, and the byte offsets where its content starts and
ends."""
MAX_SEGMENTS = 64
"""Cameras and encoders never write more tables and frames than this."""
SCAN = 0xDA
"""The marker after whose segment the Huffman codes start."""
DEFINE_HUFFMAN, DEFINE_QUANTISATION, RESTART_INTERVAL, ADOBE = 0xC4, 0xDB, 0xDD, 0xEE
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
"""Frames with Huffman codes that OpenCV's libjpeg reads."""
LAST_FRAME = 0xCF
_NO_FRAMES = (DEFINE_HUFFMAN, 0xC8, 0xCC)
_EXIF = 0xE1


def read_segments(source: np.ndarray) -> np.ndarray:
    """The segments of a JPEG, uint8 [n], that matter for its pixels, up to the first scan's.

    int64 [segments, 3] in the columns MARKER, START, END: frames, tables, restart interval, EXIF
    and Adobe's. The last one is the first scan's, with marker SCAN, unless the file is damaged.
    """
    segments = np.empty((MAX_SEGMENTS, 3), np.int64)
    return segments[: _read_segments(source, segments)]


@compiled
def two_bytes(source, place):
    """A big-endian 16-bit number of uint8 [n]."""
    return i64(source[place]) << 8 | i64(source[place + 1])


@compiled
def _read_segments(source, segments):
    """Fill `segments` and return how many there are."""
    size, position, count = len(source), 2, 0
    while position + 4 <= size and count < MAX_SEGMENTS:
        marker = source[position + 1]
        if source[position] != 0xFF:
            return count
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            position += 2
            continue
        if marker < 0xC0 or marker == 0xD9:  # not a segment: decoders differ on where to continue
            return count
        start, end = position + 4, position + 2 + two_bytes(source, position + 2)
        matters = marker <= LAST_FRAME or marker in (DEFINE_QUANTISATION, SCAN)
        matters |= marker in (RESTART_INTERVAL, ADOBE)
        if marker == _EXIF and start + 4 <= size:  # "Exif"
            matters |= two_bytes(source, start) == 0x4578 and two_bytes(source, start + 2) == 0x6966
        if matters:
            segments[count, MARKER] = marker
            segments[count, START], segments[count, END] = start, end
            count += 1
        if marker == SCAN or not start <= end <= size:
            return count
        position = end
    return count


def _jpeg_header(data: bytes) -> Header | None:
    segments = read_segments(np.frombuffer(data, np.uint8))
    exif = None
    for marker, start, end in segments.tolist():
        if marker == _EXIF:
            exif = data[start:end] if exif is None else b""
        elif marker == SCAN:
            return None
        elif marker <= LAST_FRAME and marker not in _NO_FRAMES:
            # A frame header whose first component is cut off is left to Pillow, which reports it.
            if start + 6 >= len(data):
                return None
            precision, height, width, channels = struct.unpack_from(">BHHB", data, start)
            if marker > PROGRESSIVE or precision != 8 or channels not in (1, 3):
                return None  # CMYK, lossless, arithmetic coding or 12 bits
            progressive = marker == PROGRESSIVE
            return Header("JPEG", width, height, start - 4, progressive, exif, segments)
    return None


def least_bytes(data: bytes, width: int, height: int) -> int:
    """About the fewest bytes in which a JPEG or PNG of this size in pixels can be encoded.

    A file that has fewer is cut off or a decompression bomb. 0 for other formats, and for kinds of
    JPEG that have no such bound.
    """
    if data.startswith(PNG_SIGNATURE) and len(data) >= 26:
        _, _, bits, colour = struct.unpack_from(">IIBB", data, 16)
        samples = {_PNG_GRAY: 1, _PNG_RGB: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
        return height * (1 + width * samples * bits // 8) // _MOST_DEFLATED
    if not data.startswith(JPEG_START):
        return 0
    for marker, start, end in read_segments(np.frombuffer(data, np.uint8)).tolist():
        if marker in (BASELINE, EXTENDED, PROGRESSIVE) and end <= len(data) and end - start >= 6:
            components = data[start + 6 : min(end, start + 6 + 3 * data[start + 5])]
            sampling = [(value >> 4, value & 15) for value in components[1::3]]
            across = max((a for a, _ in sampling), default=0)
            down = max((d for _, d in sampling), default=0)
            if across == 0 or down == 0:
                return 0
            blocks = sum(
                (width * a // (8 * across)) * (height * d // (8 * down)) for a, d in sampling
            )
            # A block takes a bit for DC. Where scans are not progressive, it also takes one for the
            # end of the block.
            return blocks * (1 if marker == PROGRESSIVE else 2) // 8
    return 0


_MOST_DEFLATED = 1032
"""Bytes that one byte of deflated data can stand for."""


# EXIF orientation

MIRRORED, UPSIDE_DOWN, TRANSPOSED = 1, 2, 4
"""Bits of a turn: a stored image becomes upright if it is first transposed, then turned upside down
(its rows reversed) and then mirrored (its columns reversed)."""
TURNS = (0, 0, 1, 3, 2, 4, 5, 7, 6)
"""The turn of each EXIF orientation; 0, which no standard defines, means 1: upright as stored."""
_ORIENTATION_TAG, _SHORT = 0x0112, 3


def turn_of(exif: bytes | None) -> int | None:
    """The turn that an EXIF segment asks for; None if decoders would not agree on it."""
    if exif is None:
        return 0
    tiff, found = exif[6:], []
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        version, first = struct.unpack_from(order + "HI", tiff, 2)
        (entries,) = struct.unpack_from(order + "H", tiff, first)
        for entry in range(entries):
            values = struct.unpack_from(order + "HHIH", tiff, first + 2 + 12 * entry)
            if values[0] == _ORIENTATION_TAG:
                found.append(values[1:])
    except (KeyError, struct.error):
        return None
    if version != 42 or len(found) > 1:
        return None
    kind, count, value = found[0] if found else (_SHORT, 1, 1)
    # Decoders differ on other types.
    plain = (kind, count) == (_SHORT, 1) and value < len(TURNS)
    return TURNS[value] if plain else None


# PNG and WebP

STACK_KEY = b"selfray:channels"
"""Keyword of a PNG's text chunk whose text is the number of an image's channels. They lie one below
the other in a gray PNG, which any program can open."""


def _png_header(data: bytes) -> Header | None:
    if len(data) < 33 or data[12:16] != b"IHDR":
        return None
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    if bits not in (8, 16) or colour not in (_PNG_GRAY, _PNG_RGB):
        return None
    position, stack = 33, 0
    while position + 8 <= len(data):
        kind = data[position + 4 : position + 8]
        end = position + 8 + int.from_bytes(data[position : position + 4])
        if kind == b"IDAT":
            is_plain = (bits == 8 or stack > 0) and _chunks_fit(data, position)
            return Header("PNG", width, height, stack=stack) if is_plain else None
        if kind in _PNG_SPECIAL_CHUNKS:
            return None
        if kind == b"tEXt" and data.startswith(STACK_KEY + b"\0", position + 8):
            text = data[position + 9 + len(STACK_KEY) : end]
            stack = int(text) if text.isdigit() and len(text) <= 2 and colour == _PNG_GRAY else 0
        position = end + 4
    return None


def _chunks_fit(data: bytes, position: int) -> bool:
    """Whether each chunk of a PNG from here on ends within the file.

    OpenCV allocates and clears what a chunk declares, up to 2 GB, before it looks for its bytes.
    """
    while position + 8 <= len(data):
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position += 12 + int.from_bytes(data[position : position + 4])
        if position > len(data):
            return False
    return True


def webp_size(data: bytes) -> tuple[int, int] | None:
    """The canvas (width, height) of a WebP file; None for any other bytes.

    Pillow allocates the canvas as soon as it opens the file, so its size is checked before.
    """
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    if data[12:16] == b"VP8X":
        return (
            int.from_bytes(data[24:27], "little") + 1,
            int.from_bytes(data[27:30], "little") + 1,
        )
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF
