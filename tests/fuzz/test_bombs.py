"""Small files that declare large images: PNG, WebP, TIFF, GIF and BMP of any declared size.

Each gives its picture or is refused with a reason, in the memory that pixels/limits.py promises.
FUZZ_MUTATIONS says how many of each kind; the first mutations are always the same ones.
"""

import os
import struct
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from test_image_bytes import PHOTO, REASONS, refusal, saved, with_right_checksums

from selfray.pixels.codecs import check, decode
from selfray.pixels.intake import Intake, take
from selfray.pixels.limits import MAX_MEMORY

MUTATIONS = int(os.environ.get("FUZZ_MUTATIONS", "500"))
SIZES = (0, 1, 2, 57, 75, 16_383, 32_767, 65_535, 2**24, 2**31 - 1, 2**32 - 1)
"""Two of them make a small image or one that is refused, hardly one that takes seconds."""


def size(rng: np.random.Generator, most: int) -> int:
    return min(most, SIZES[int(rng.integers(len(SIZES)))])


def png(rng: np.random.Generator) -> bytes:
    """A PNG of any size, depth, colour and interlacing, with pixels that unpack to gigabytes."""
    depth, colour = (int(rng.choice(values)) for values in ([1, 2, 4, 8, 16], [0, 2, 3, 4, 6]))
    header = struct.pack(
        ">IIBBBBB", size(rng, 2**31 - 1), size(rng, 2**31 - 1), depth, colour, 0, 0,
        int(rng.integers(2)),
    )  # fmt: skip
    packed = BOMB if rng.random() < 0.5 else zlib.compress(rng.bytes(300))
    parts = [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
    if rng.random() < 0.3:
        name = [b"iCCP", b"zTXt", b"iTXt", b"eXIf"][int(rng.integers(4))]
        parts.insert(1, (name, b"x\0\0" + BOMB))
    made = b"\x89PNG\r\n\x1a\n"
    for name, content in parts:
        made += len(content).to_bytes(4) + name + content + bytes(4)
    return with_right_checksums(made)


BOMB = zlib.compress(bytes(4_000_000), 9)
"""4 kB that unpack to 4 MB, a line of zeros after the other."""


def webp(rng: np.random.Generator) -> bytes:
    data = bytearray(WEBPS[int(rng.integers(len(WEBPS)))])
    kind = bytes(data[12:16])
    width, height = size(rng, 2**14 - 1), size(rng, 2**14 - 1)
    if kind == b"VP8 ":
        data[26:30] = struct.pack("<HH", width, height)
    elif kind == b"VP8L":
        data[21:25] = struct.pack("<I", max(0, width - 1) | max(0, height - 1) << 14)
    else:
        data[24:27] = size(rng, 2**24 - 1).to_bytes(3, "little")
        data[27:30] = size(rng, 2**24 - 1).to_bytes(3, "little")
    if rng.random() < 0.3:
        data[4:8] = size(rng, 2**32 - 1).to_bytes(4, "little")
    return bytes(data)


def tiff(rng: np.random.Generator) -> bytes:
    """A TIFF of which one or two entries of its directory say something else."""
    data = bytearray(TIFFS[int(rng.integers(len(TIFFS)))])
    start = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[start : start + 2], "little")
    for _ in range(int(rng.integers(1, 3))):
        at = start + 2 + 12 * int(rng.integers(count))
        place = at + (8, 8, 8, 4, 2, 0)[int(rng.integers(6))]
        length = 4 if place >= at + 4 else 2
        data[place : place + length] = size(rng, 2 ** (8 * length) - 1).to_bytes(length, "little")
    return bytes(data)


def gif(rng: np.random.Generator) -> bytes:
    data = bytearray(GIF)
    frame = data.index(b"\x2c", 13)
    for at in (6, 8, *(frame + offset for offset in (1, 3, 5, 7))):
        if rng.random() < 0.5:
            data[at : at + 2] = size(rng, 65_535).to_bytes(2, "little")
    return bytes(data)


def bmp(rng: np.random.Generator) -> bytes:
    data = bytearray(BMP)
    for at in (18, 22):
        data[at : at + 4] = size(rng, 2**32 - 1).to_bytes(4, "little")
    for at in (10, 14, 28, 30, 46):
        if rng.random() < 0.2:
            data[at : at + 2] = size(rng, 65_535).to_bytes(2, "little")
    return bytes(data)


WEBPS = [
    saved(PHOTO, "WEBP"),
    saved(PHOTO, "WEBP", lossless=True),
    saved(PHOTO.convert("RGBA"), "WEBP", exif=b"Exif\0\0"),
]
TIFFS = [
    saved(PHOTO, "TIFF"),
    saved(PHOTO.convert("L"), "TIFF", compression="tiff_lzw"),
    saved(PHOTO, "TIFF", compression="tiff_adobe_deflate"),
    saved(PHOTO, "TIFF", compression="jpeg"),
    saved(PHOTO.convert("1"), "TIFF", compression="group4"),
]
GIF = saved(PHOTO.convert("P"), "GIF")
BMP = saved(PHOTO, "BMP")


def taken(data: bytes) -> object:
    return list(take(data, Intake()))


def peak_memory() -> int:
    """Bytes of this process at its peak since `forget_peak`."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if "VmHWM" in line).split()[1]) * 1024


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


@pytest.mark.long
@pytest.mark.parametrize("make", [png, webp, tiff, gif, bmp])
def test_a_file_of_any_declared_size_is_decoded_or_refused_within_memory(
    make: Callable[[np.random.Generator], bytes],
) -> None:
    forget_peak()
    before = peak_memory()
    outcomes = []
    for number in range(MUTATIONS):
        data = make(np.random.default_rng((8, number)))
        try:
            for read in (decode, check, taken):
                outcomes.append(refusal(partial(read, data)))
        except BaseException as error:
            error.add_note(f"{make.__name__} {number}, {len(data)} bytes")
            raise
    known = REASONS | {"unknown: empty window", "unknown: channels"}
    assert {reason for reason in outcomes if reason} <= known
    assert any(outcomes)
    assert peak_memory() - before < MAX_MEMORY
