"""Damaged JPEG and PNG files: each gives libjpeg-turbo's or libpng's picture, or a BrokenImage.

FUZZ_MUTATIONS says how many files of each kind are damaged and read; `make fuzz` takes 100,000.
"""

import io
import os
import zlib
from collections import Counter
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image

from selfray.pixels import codecs, jpeg
from selfray.pixels.augment import augment_image, generator
from selfray.pixels.codecs import BrokenImage, check, decode, open_image
from selfray.views import View

MUTATIONS = int(os.environ.get("FUZZ_MUTATIONS", "500"))
VIEWS = {"global": (View(size=16, crop_scale=(0.1, 1.0), blur=0.5),)}


def photograph(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(float)
    noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255)
    return Image.fromarray(noisy.astype(np.uint8))


def saved(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[274] = value
    return exif.tobytes()


PHOTO = photograph(75, 57)
JPEGS = [
    saved(PHOTO, "JPEG", quality=90, subsampling="4:4:4"),
    saved(PHOTO, "JPEG", quality=75, subsampling="4:2:0"),
    saved(PHOTO, "JPEG", quality=60, subsampling="4:2:2", optimize=True),
    saved(PHOTO, "JPEG", quality=90, restart_marker_blocks=4),
    saved(PHOTO, "JPEG", quality=80, exif=orientation(6)),
    saved(PHOTO, "JPEG", quality=80, progressive=True),
    saved(PHOTO.convert("L"), "JPEG", quality=95),
    saved(PHOTO.convert("CMYK"), "JPEG", quality=80),
]
PNGS = [
    saved(PHOTO, "PNG"),
    saved(PHOTO.convert("L"), "PNG"),
    saved(PHOTO.convert("P"), "PNG"),
    saved(PHOTO.convert("RGBA"), "PNG"),
    saved(Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257), "PNG"),
]


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """The file with one to four pieces of it changed, lost, repeated or put elsewhere."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        # Headers take few of the bytes and most of the attention.
        end = len(changed) if rng.random() < 0.5 else min(len(changed), 700)
        at = int(rng.integers(0, end))
        length = int(rng.integers(1, 1 + min(64, len(changed) - at)))
        kind = rng.integers(0, 7)
        if kind == 0:
            changed[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            changed[at] = int(rng.choice(np.array((0, 1, 127, 128, 255, rng.integers(0, 256)))))
        elif kind == 2:
            changed[at : at + length] = rng.bytes(length)
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[at : at + length]
        elif kind == 5:
            changed[at:at] = rng.bytes(length)
        else:
            del changed[max(1, len(changed) - length) :]
    return bytes(changed)


def with_right_checksums(data: bytes) -> bytes:
    """A PNG's checksums set to what is in its chunks, as far as these can be told."""
    changed, at = bytearray(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        if end + 4 > len(data):
            break
        changed[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4)
        at = end + 4
    return bytes(changed)


def with_other_lines(data: bytes, rng: np.random.Generator) -> bytes:
    """A PNG of one data chunk with damage in its lines: other filters and values."""
    start = data.index(b"IDAT")
    end = start + 4 + int.from_bytes(data[start - 4 : start])
    lines = bytearray(zlib.decompress(data[start + 4 : end]))
    for at in rng.integers(0, len(lines), 20).tolist():
        lines[at] = int(rng.integers(0, 8))  # some of them are filters, of which 0 to 4 exist
    chunk = b"IDAT" + zlib.compress(lines)
    length, checksum = (len(chunk) - 4).to_bytes(4), zlib.crc32(chunk).to_bytes(4)
    return data[: start - 4] + length + chunk + checksum + data[end + 4 :]


def random_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
    return (
        top,
        left,
        int(rng.integers(top + 1, height + 1)),
        int(rng.integers(left + 1, width + 1)),
    )


def assert_planes_are_libjpegs(data: bytes, rng: np.random.Generator) -> bool:
    """Compare what the decoder of planes makes of a box of Y. False if it leaves the file to
    libjpeg."""
    try:
        header = open_image(data).header
    except BrokenImage:
        return False
    if header is None:
        return False
    box = random_box(rng, header.height, header.width)
    found = jpeg.decode(data, box, 1.0)
    if found is None:
        return False
    flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
    theirs, _ = codecs.codec_messages.imdecode(np.frombuffer(data, np.uint8), flags)
    assert theirs is not None
    pixels, layout = found
    start, rows, stride, first_row, first_column, *_, down, across = layout[0].tolist()
    if (down, across) != (1, 1):
        return False
    plane = pixels[start : start + rows * stride].reshape(rows, stride)
    top, left, bottom, right = box
    ours = plane[top - first_row : bottom - first_row, left - first_column : right - first_column]
    assert np.abs(ours.astype(int) - theirs[top:bottom, left:right]).max() <= 1
    return True


REASONS = {
    "empty",
    "not an image",
    "truncated",
    "corrupt",
    "too large",
    "zero-sized",
    "unsupported",
}


def assert_pixels_are_pillows(data: bytes) -> bool:
    """Compare the pixels of a PNG. False if one of the two refuses it, or it is transparent."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            if image.mode not in ("RGB", "L") or image.has_transparency_data:
                return False
            theirs = np.asarray(image.convert("RGB"))
        ours = decode(data)
    except Exception:
        return False
    assert np.array_equal(ours, theirs)
    return True


def refusal(attempt: Callable[[], object]) -> str | None:
    """The reason for which reading is refused; None if it is not."""
    try:
        attempt()
    except BrokenImage as error:
        return error.reason if error.reason in REASONS else f"unknown: {error.reason}"
    return None


def read(data: bytes, rng: np.random.Generator) -> str:
    """Read a damaged file in every way that selfray has. Returns what came of it."""

    def planes() -> None:
        image = open_image(data)
        image.planes(random_box(rng, image.height, image.width), rng.uniform(0.3, 9))
        # Whatever box is asked for, nothing beyond the image is read.
        image.planes(tuple(rng.integers(-9, 120, 4).tolist()), 1.0)  # type: ignore[arg-type]

    attempts = (
        lambda: decode(data),
        lambda: check(data),
        planes,
        lambda: augment_image(data, VIEWS, generator(0, 0, 0)),
    )
    outcomes = [refusal(attempt) or "picture" for attempt in attempts]
    assert set(outcomes) <= {*REASONS, "picture"}
    # What the strict check accepts, every reader accepts.
    assert outcomes[1] != "picture" or set(outcomes) == {"picture"}
    return outcomes[0]


def test_a_damaged_jpeg_is_refused_or_decoded_as_libjpeg_turbo_decodes_it() -> None:
    outcomes, compared = Counter(), 0
    for number in range(MUTATIONS):
        rng = np.random.default_rng((1, number))
        data = damaged(JPEGS[number % len(JPEGS)], rng)
        try:
            outcomes[read(data, rng)] += 1
            compared += assert_planes_are_libjpegs(data, rng)
        except BaseException as error:
            error.add_note(f"mutation {number}, {len(data)} bytes")
            raise
    assert outcomes["picture"] > MUTATIONS // 10
    assert compared > MUTATIONS // 20


def test_a_damaged_png_is_refused_or_decoded_as_libpng_decodes_it() -> None:
    outcomes, compared = Counter(), 0
    for number in range(MUTATIONS):
        rng = np.random.default_rng((2, number))
        data = PNGS[number % len(PNGS)]
        kind = rng.integers(0, 3)
        data = with_other_lines(data, rng) if kind == 0 else damaged(data, rng)
        data = with_right_checksums(data) if kind == 1 else data
        try:
            outcomes[read(data, rng)] += 1
            compared += assert_pixels_are_pillows(data)
        except BaseException as error:
            error.add_note(f"mutation {number}, {len(data)} bytes")
            raise
    assert sum(outcomes.values()) == MUTATIONS
    assert compared > MUTATIONS // 20


@pytest.mark.parametrize("declared", [(65_500, 1_500), (9_999, 10_000)])
def test_a_header_alone_takes_no_memory(declared) -> None:
    height, width = declared
    for data in JPEGS:
        frame = next(
            at for at in range(len(data)) if data[at : at + 2] in (b"\xff\xc0", b"\xff\xc2")
        )
        size = height.to_bytes(2) + width.to_bytes(2)
        bomb = data[: frame + 5] + size + data[frame + 9 :]
        for attempt in (decode, check, open_image):
            with pytest.raises(BrokenImage) as caught:
                attempt(bomb)
            assert caught.value.reason == "truncated"
