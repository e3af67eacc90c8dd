import contextlib
import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from selfray.pixels import compose, limits
from selfray.pixels.codecs import (
    BrokenImage,
    ImageInfo,
    check,
    decode,
    encode_channels,
    encode_jpeg,
    encode_png,
    open_image,
    shrink,
)
from selfray.pixels.intake import Intake, take


def picture(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def reference(data: bytes) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    return np.asarray(image.convert("RGB"))


def difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b).max())


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


OPAQUE = {
    "jpeg": encoded(picture(), "JPEG", quality=90),
    "jpeg gray": encoded(picture().convert("L"), "JPEG"),
    "jpeg cmyk": encoded(picture().convert("CMYK"), "JPEG"),
    "jpeg progressive": encoded(picture(), "JPEG", progressive=True),
    "jpeg 4:4:4": encoded(picture(), "JPEG", subsampling=0),
    "jpeg 8x8": encoded(picture(8, 8), "JPEG"),
    "jpeg 1x1": encoded(picture(1, 1), "JPEG"),
    "png": encoded(picture(), "PNG"),
    "png gray": encoded(picture().convert("L"), "PNG"),
    "png palette": encoded(picture().convert("P"), "PNG"),
    "png bilevel": encoded(picture().convert("1"), "PNG"),
    "png 1x1": encoded(picture(1, 1), "PNG"),
    "webp": encoded(picture(), "WEBP", quality=90),
    "webp lossless": encoded(picture(), "WEBP", lossless=True),
    "avif": encoded(picture(), "AVIF", quality=90),
    "avif orientation 6": encoded(picture(), "AVIF", exif=with_orientation(6)),
    "gif": encoded(picture(), "GIF"),
    "bmp": encoded(picture(), "BMP"),
    "bmp palette": encoded(picture().convert("P"), "BMP"),
    "tiff": encoded(picture(), "TIFF"),
    "tiff lzw": encoded(picture(), "TIFF", compression="tiff_lzw"),
    "tiff cmyk": encoded(picture().convert("CMYK"), "TIFF"),
    "ppm": encoded(picture(), "PPM"),
    **{
        f"jpeg orientation {orientation}": encoded(
            picture(), "JPEG", exif=with_orientation(orientation)
        )
        for orientation in range(1, 9)
    },
    "png orientation 6": encoded(picture(), "PNG", exif=with_orientation(6)),
    "webp orientation 8": encoded(picture(), "WEBP", exif=with_orientation(8)),
    "tiff orientation 6": encoded(picture(), "TIFF", exif=with_orientation(6)),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_every_opaque_format_decodes_as_pillow_decodes_it(name):
    pixels = decode(OPAQUE[name])
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    # Two builds of libjpeg may round differently by one.
    assert difference(pixels, reference(OPAQUE[name])) <= 1


@pytest.mark.parametrize("name", OPAQUE)
def test_check_accepts_every_format_and_gives_the_decoded_size(name):
    height, width = decode(OPAQUE[name]).shape[:2]
    image_format = name.split()[0].upper()
    assert check(OPAQUE[name]) == ImageInfo(width, height, image_format)


def test_an_exif_rotated_jpeg_comes_out_upright():
    upright = picture()
    for orientation, transpose in {
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
    }.items():
        stored = upright.transpose(transpose)
        data = encoded(stored, "JPEG", quality=95, exif=with_orientation(orientation))
        assert np.abs(decode(data).astype(int) - np.asarray(upright)).mean() < 3


def test_transparency_is_composited_on_white():
    image = picture().convert("RGBA")
    alpha = np.zeros((48, 64), np.uint8)
    alpha[:, 32:] = 255
    alpha[:, 16:32] = 128
    image.putalpha(Image.fromarray(alpha))
    colours = np.asarray(image)[..., :3].astype(float)
    for data in (encoded(image, "PNG"), encoded(image, "WEBP", lossless=True, exact=True)):
        pixels = decode(data)
        assert (pixels[:, :16] == 255).all()
        assert difference(pixels[:, 32:], colours[:, 32:].astype(int)) == 0
        blend = colours[:, 16:32] * 128 / 255 + 255 * 127 / 255
        assert np.abs(pixels[:, 16:32] - blend).max() <= 1.5


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_becomes_white(mode):
    image = Image.new(mode, (4, 4), 0)
    data = encoded(image, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert (decode(data) == 255).all()
    assert check(data).width == 4


def test_deep_values_fill_the_range_as_a_build_stores_them():
    values = np.linspace(500, 3000, 48 * 64).reshape(48, 64)
    low, high = np.percentile(values, (0.5, 99.5))
    expected = np.clip(np.round((values - low) / (high - low) * 255), 0, 255).astype(np.uint8)
    for image_format, kind in (("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.float32)):
        data = encoded(Image.fromarray(values.astype(kind)), image_format)
        assert difference(decode(data), np.repeat(expected[..., None], 3, 2)) <= 1
        (taken,) = take(data, Intake())
        assert difference(decode(data, channels=1), decode(taken.data, channels=1)) == 0
    colour = np.stack([values, values[::-1], values.T.reshape(48, 64)], axis=2).astype(np.uint16)
    done, data = cv2.imencode(".png", colour[..., ::-1])
    assert done
    expected = np.clip(np.round((colour - low) / (high - low) * 255), 0, 255)
    assert difference(decode(data.tobytes()), expected) <= 1


def test_a_depth_that_was_kept_is_not_windowed_again():
    values = np.linspace(0, 20_000, 48 * 64).reshape(48, 64, 1).astype(np.uint16)
    for stored in (values, np.repeat(values, 3, axis=2)):
        pixels = decode(encode_channels(stored))
        assert difference(pixels, np.round(np.repeat(values, 3, axis=2) / 257)) <= 1
        (again,) = take(encode_channels(stored), Intake())
        assert again.data == encode_channels(stored)


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(image_format):
    frames = [picture(seed=seed) for seed in range(3)]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    assert difference(decode(data), reference(data)) == 0
    assert check(data).width == 64


# Broken images


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def declared_png(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def declared_jpeg(width: int, height: int) -> bytes:
    data = bytearray(OPAQUE["jpeg"])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def declared_webp(width: int, height: int) -> bytes:
    animation = encoded(picture(), "WEBP", save_all=True, append_images=[picture(seed=1)])
    data = bytearray(animation)
    assert data[12:16] == b"VP8X"
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def declared_gif(width: int, height: int) -> bytes:
    data = bytearray(OPAQUE["gif"])
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


BOMBS = {
    "png": declared_png(100_000, 100_000),
    "png just above": declared_png(10_001, 10_000),
    "png 16-bit": declared_png(100_000, 100_000, bits=16),
    "png palette": declared_png(20_000, 5_001, colour=3),
    "jpeg": declared_jpeg(65_000, 65_000),
    "webp": declared_webp(16_383, 16_383),
    "gif": declared_gif(60_000, 60_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_is_refused_before_its_pixels_are_allocated(name):
    decode(OPAQUE["jpeg"])  # what loads at the first image is not counted
    tracemalloc.start()
    try:
        for read in (decode, check):
            with pytest.raises(BrokenImage) as caught:
                read(BOMBS[name])
            assert caught.value.reason == "too large"
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_the_limit_on_pixels_is_the_callers():
    for name in ("jpeg", "png", "gif", "tiff", "webp", "avif"):
        decode(OPAQUE[name], max_pixels=64 * 48)
        with pytest.raises(BrokenImage, match="64 x 48 pixels; the limit is 3071"):
            decode(OPAQUE[name], max_pixels=64 * 48 - 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello world, this is a text file\n" * 20, "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (bytes(1000), "not an image"),
        (declared_png(0, 10), "zero-sized"),
        (declared_jpeg(10, 0), "zero-sized"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(data, reason):
    for read in (decode, check):
        with pytest.raises(BrokenImage) as caught:
            read(data)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    "name",
    [
        "jpeg",
        "jpeg gray",
        "jpeg progressive",
        "jpeg cmyk",
        "png",
        "webp",
        "gif",
        "avif",
        "bmp",
        "tiff",
    ],
)
def test_a_truncated_file_never_passes_the_check(name):
    data = OPAQUE[name]
    for length in (10, 30, len(data) // 4, len(data) // 2, len(data) * 9 // 10, len(data) - 2):
        if name == "gif" and length == len(data) - 2:
            continue  # complete but for the trailer
        with pytest.raises(BrokenImage):
            check(data[:length])


def test_truncated_jpegs_and_pngs_are_called_truncated():
    for name in ("jpeg", "jpeg progressive", "png"):
        data = OPAQUE[name]
        for read in (decode, check):
            with pytest.raises(BrokenImage) as caught:
                read(data[: len(data) * 2 // 3])
            assert caught.value.reason == "truncated"


needs_codec_messages = pytest.mark.skipif(
    "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="libjpeg's warnings are read on glibc"
)


@needs_codec_messages
def test_check_refuses_half_a_jpeg_with_an_end_marker_pasted_on():
    data = OPAQUE["jpeg"]
    half = data[: len(data) * 2 // 3] + b"\xff\xd9"
    assert decode(half).shape == (48, 64, 3)  # lenient decoders fill the rest with grey
    with pytest.raises(BrokenImage, match="premature end") as caught:
        check(half)
    assert caught.value.reason == "truncated"


@needs_codec_messages
def test_check_refuses_a_jpeg_with_bytes_lost_in_the_middle():
    data = encoded(picture(200, 200), "JPEG", quality=95)
    middle = len(data) // 2
    with pytest.raises(BrokenImage) as caught:
        check(data[:middle] + data[middle + 100 :])
    assert caught.value.reason in ("corrupt", "truncated")


def test_check_refuses_a_png_with_a_wrong_checksum():
    data = bytearray(OPAQUE["png"])
    data[-16] ^= 1  # in the checksum of the last data chunk
    with pytest.raises(BrokenImage) as caught:
        check(bytes(data))
    assert caught.value.reason == "corrupt"


def test_noise_in_any_file_raises_nothing_but_broken_image():
    rng = np.random.default_rng(0)
    for data in OPAQUE.values():
        for _ in range(8):
            noisy = np.frombuffer(data, np.uint8).copy()
            noisy[rng.integers(0, len(noisy), 4)] = rng.integers(0, 256, 4)
            for read in (decode, check):
                with contextlib.suppress(BrokenImage):
                    read(noisy.tobytes())


@needs_codec_messages
def test_decoding_broken_images_prints_nothing(capfd):
    jpeg, png = OPAQUE["jpeg"], bytearray(OPAQUE["png"])
    png[300:320] = bytes(20)
    cruft = jpeg[:-2] + b"abcde" * 5 + jpeg[-2:]
    bomb = declared_gif(10_000, 9_500)  # Pillow warns from 89 million pixels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in (jpeg[:900] + b"\xff\xd9", cruft, bytes(png), bytes(png[:400]), bomb[:50]):
            for read in (decode, check):
                with contextlib.suppress(BrokenImage):
                    read(data)
    assert capfd.readouterr() == ("", "")


def test_what_others_print_to_stderr_still_arrives(capfd):
    decode(OPAQUE["jpeg"])
    os.write(2, b"python\n")
    cv2.imdecode(np.frombuffer(OPAQUE["jpeg"][:900] + b"\xff\xd9", np.uint8), cv2.IMREAD_COLOR)
    printed = capfd.readouterr().err
    assert "python" in printed
    assert "Corrupt JPEG data" in printed


def test_threads_decode_at_the_same_time():
    expected = {name: decode(data) for name, data in OPAQUE.items()}
    failures = []

    def work() -> None:
        for name, data in OPAQUE.items():
            try:
                decode(OPAQUE["jpeg"][:900] + b"\xff\xd9")
                assert np.array_equal(decode(data), expected[name])
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_broken_image_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(BrokenImage("truncated", "the file ends early")))
    assert error.reason == "truncated"
    assert str(error) == "truncated: the file ends early"


def ends_early(data: bytes) -> bytes:
    """The first half of a JPEG, with an end marker pasted on."""
    return data[: len(data) * 2 // 3] + b"\xff\xd9"


@needs_codec_messages
@pytest.mark.parametrize("kind", ["cmyk", "cmyk progressive", "odd orientation"])
def test_what_pillow_decodes_is_checked_as_strictly_as_the_rest(kind):
    whole = {
        "cmyk": encoded(picture(200, 200).convert("CMYK"), "JPEG"),
        "cmyk progressive": encoded(picture(200, 200).convert("CMYK"), "JPEG", progressive=True),
        "odd orientation": encoded(picture(200, 200), "JPEG", exif=with_orientation(9)),
    }[kind]
    assert check(whole) == ImageInfo(200, 200, "JPEG")
    with pytest.raises(BrokenImage) as caught:
        check(ends_early(whole))
    assert caught.value.reason == "truncated"
    with pytest.raises(BrokenImage):
        check(whole[:-2])


@pytest.mark.parametrize("kind", ["jpeg", "jpeg progressive", "jpeg cmyk"])
def test_a_size_that_the_bytes_cannot_hold_takes_no_memory(kind):
    data = bytearray(OPAQUE[kind])
    frame = next(at for at in range(len(data)) if data[at : at + 2] in (b"\xff\xc0", b"\xff\xc2"))
    data[frame + 5 : frame + 9] = struct.pack(">HH", 9_999, 10_000)
    before = peak_memory()
    for read in (decode, check, open_image):
        with pytest.raises(BrokenImage, match=r"bytes cannot hold 10000 x 9999 pixels") as caught:
            read(bytes(data))
        assert caught.value.reason == "truncated"
    assert peak_memory() - before < 250e6


def peak_memory() -> float:
    """Of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_chunk_that_declares_more_than_the_file_has_takes_no_memory():
    data = OPAQUE["png"]
    start = data.index(b"IDAT") - 4
    data = data[:start] + (2**31 - 1).to_bytes(4) + data[start + 4 :]
    before = peak_memory()
    with pytest.raises(BrokenImage):
        check(data)
    with contextlib.suppress(BrokenImage):  # Pillow may read what there is
        decode(data)
    assert peak_memory() - before < 250e6


def test_a_picture_of_one_colour_is_no_bomb():
    for data in (
        encoded(Image.new("RGB", (3000, 2000), "navy"), "JPEG"),
        encoded(Image.new("RGB", (3000, 2000), "navy"), "JPEG", progressive=True, quality=1),
        encoded(Image.new("CMYK", (3000, 2000)), "JPEG", quality=1, optimize=True),
        encoded(Image.new("L", (3000, 2000)), "PNG"),
        encoded(Image.new("1", (3000, 2000)), "PNG"),
    ):
        assert check(data).width == 3000


HUNGRY = {
    "PNG": ("RGBA", {}),
    "WEBP": ("RGBA", {"lossless": True}),
    "TIFF": ("CMYK", {"compression": "tiff_deflate"}),
    "GIF": ("RGB", {}),
    "AVIF": ("RGB", {"speed": 10}),
    "JPEG2000": ("RGBA", {}),
    "JPEG": ("CMYK", {"progressive": True}),
}


MEASURE = """
import io, sys
from pathlib import Path
from PIL import Image
from selfray.pixels.codecs import decode

def high_water():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024

for name in sys.argv[1:]:
    data = Path(name).read_bytes()
    small = io.BytesIO()  # what its decoder needs for any image is not counted
    Image.new("RGB", (64, 64)).save(small, Path(name).name)
    decode(small.getvalue())
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    decode(data)
    print(high_water() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its peak")
def test_a_pixel_takes_no_more_memory_than_is_promised(tmp_path):
    side, files = 1200, []
    for image_format, (mode, options) in HUNGRY.items():
        files.append(tmp_path / image_format)
        files[-1].write_bytes(encoded(Image.new(mode, (side, side), 7), image_format, **options))
    command = [sys.executable, "-c", MEASURE, *map(str, files)]
    # Memory goes back to the system as soon as it is freed.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    promised = limits.MEMORY_PER_PIXEL | {"JPEG": limits.CMYK_JPEG_MEMORY}
    for image_format, taken in zip(HUNGRY, map(int, done.stdout.split()), strict=True):
        # And the strips in which Pillow's image is converted.
        assert 3 * side**2 < taken < promised[image_format] * side**2 + 8e6, image_format


def test_what_would_take_more_memory_than_is_allowed_is_refused(monkeypatch):
    monkeypatch.setattr(limits, "MAX_MEMORY", 17 * 64 * 48 - 1)
    decode(OPAQUE["jpeg"])
    with pytest.raises(BrokenImage, match=r"64 x 48 pixels take .* from WEBP") as caught:
        decode(OPAQUE["webp"])
    assert caught.value.reason == "too large"


@pytest.mark.parametrize("box", [(77, 27, 1, 2), (35, 13, 6, 38), (-5, 0, 10, 10), (0, 0, 999, 9)])
def test_a_box_that_is_none_gives_the_planes_of_the_whole_image(box):
    for name in ("jpeg", "jpeg progressive", "png"):
        planes = open_image(OPAQUE[name]).planes(box, 1.0)
        assert planes.layout[0, compose.ROWS] == 48
        assert planes.layout[0, compose.STORED] >= 48


# Encoding


def test_png_keeps_every_pixel_and_jpeg_nearly():
    pixels = np.array(picture())
    assert np.array_equal(decode(encode_png(pixels)), pixels)
    assert np.abs(decode(encode_jpeg(pixels, 95)).astype(int) - pixels).mean() < 3
    assert len(encode_jpeg(pixels, 30)) < len(encode_jpeg(pixels, 95))


def test_encoding_refuses_what_is_not_rgb_bytes():
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], got float32"):
        encode_png(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"quality must lie in \[1, 100\]"):
        encode_jpeg(np.zeros((4, 4, 3), np.uint8), 0)


def test_shrink_leaves_small_images_untouched():
    assert shrink(OPAQUE["png"], 64) is OPAQUE["png"]
    assert shrink(OPAQUE["gif"], 64) is OPAQUE["gif"]


def test_shrink_bounds_the_longer_side_and_turns_the_image_upright():
    data = encoded(picture(400, 200), "JPEG", exif=with_orientation(6))
    small = shrink(data, 100)
    assert check(small) == ImageInfo(50, 100, "JPEG")
    expected = cv2.resize(reference(data), (50, 100), interpolation=cv2.INTER_AREA)
    assert np.abs(decode(small).astype(int) - expected).mean() < 4
    with pytest.raises(BrokenImage):
        shrink(b"", 100)


# Part of a JPEG


def photograph(height: int = 203, width: int = 331) -> np.ndarray:
    """Smooth colours with edges and some noise."""
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(float)
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def saved(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_the_rows_above_the_bottom_are_those_of_the_whole_image(subsampling, progressive):
    data = saved(photograph(), subsampling=subsampling, progressive=progressive)
    whole = decode(data)
    for bottom in (1, 15, 16, 17, 100, 176, 191, 202, 203):
        pixels, reduction = open_image(data).decode(bottom, 1.0)
        assert reduction == 1
        assert np.array_equal(pixels[:bottom], whole[:bottom])
        if not progressive:
            assert len(pixels) <= min(203, bottom + 31)


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_an_image_decoded_smaller_is_near_the_whole_one_shrunk(reduction):
    data = saved(photograph(400, 640), subsampling="4:2:0")
    pixels, found = open_image(data).decode(400, reduction + 0.5)
    assert found == reduction
    assert pixels.shape == (400 // reduction, 640 // reduction, 3)
    size = (640 // reduction, 400 // reduction)
    wanted = cv2.resize(decode(data), size, interpolation=cv2.INTER_AREA)
    difference = np.abs(pixels.astype(int) - wanted)
    assert difference.mean() < 1.5
    assert difference.max() <= 16


def test_an_image_with_an_orientation_is_opened_upright():
    for orientation, size in ((0, (203, 331)), (1, (203, 331)), (6, (331, 203)), (9, (203, 331))):
        exif = with_orientation(orientation)
        image = open_image(saved(photograph(), exif=exif.tobytes()))
        assert (image.height, image.width) == size == decode(image.data).shape[:2]
        # What no program writes is decoded whole.
        assert image.decode(50, 2.0)[1] == (1 if orientation == 9 else 2)
