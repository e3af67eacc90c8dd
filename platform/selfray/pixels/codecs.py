"""Encoded images to pixels and back. Broken and absurdly large files are refused, with a reason.

Views of a baseline JPEG are decoded by jpeg.py. OpenCV decodes other 8-bit JPEG and PNG, about
three times as fast as Pillow for small images; Pillow decodes all other formats and modes. The
declared size is checked before any pixel is allocated.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from selfray.check import require
from selfray.pixels import compose, headers, jpeg
from selfray.pixels.headers import (
    JPEG_START,
    MIRRORED,
    PNG_SIGNATURE,
    TRANSPOSED,
    TURNS,
    UPSIDE_DOWN,
    Header,
    plain_header,
    turn_of,
    webp_size,
)
from selfray.pixels.libjpeg_log import codec_messages

MAX_PIXELS = 100_000_000
"""Images that declare more pixels than this are refused. Decoded, so many take 300 MB."""
MAX_MEMORY = 1_200_000_000
"""Bytes that decoding one image may take at its peak. An image that would take more is refused."""
MEMORY_PER_PIXEL = {
    "JPEG": 12,
    "PNG": 8,
    "WEBP": 17,
    "GIF": 8,
    "TIFF": 12,
    "BMP": 8,
    "PPM": 8,
    "JPEG2000": 25,
    "AVIF": 20,
}
"""Bytes that each pixel takes at most while an image is decoded, by Pillow's name of the format: in
the decoder, in Pillow's image and in the array that is returned."""
_CMYK_JPEG_MEMORY = 16
"""The same for a JPEG of four components."""

# Only these, because Pillow would try others: its EPS reader starts Ghostscript on untrusted bytes.
FORMATS = tuple(MEMORY_PER_PIXEL)
_STRIP_PIXELS = 1 << 18
"""Pixels that are converted to RGB at a time."""

_MCU_ROWS = 16
_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_JPEG_END = b"\xff\xd9"


class BrokenImage(ValueError):  # noqa: N818 - it names the image, not the fault
    """Bytes that are no usable image; `reason` is a short category to count by.

    Reasons: "empty", "not an image", "truncated", "corrupt", "too large", "zero-sized" and
    "unsupported"; "no readable image" for a whole batch in which none is usable.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        # Ray sends exceptions between processes, and by default they pickle the joined message.
        return BrokenImage, (self.reason, self.detail)


class Planes(NamedTuple):
    """The decoded part of an image. That of a JPEG is valid until its thread decodes the next."""

    pixels: np.ndarray
    """The values of all planes, uint8 [n]."""
    layout: np.ndarray
    """Where the planes lie in it, int64 [P, 9] in the columns that compose.py names."""
    turns: int
    """3: one plane, of interleaved RGB. 1: Y alone, or Y, Cb and Cr."""
    stored: tuple[int, int, int] = (0, 0, 0)
    """The turn that makes the whole image upright (headers.TURNS), and its height and width as
    stored, which are used only if there is a turn."""

    @classmethod
    def of_rgb(
        cls, pixels: np.ndarray, reduction: int = 1, stored: tuple[int, int, int] = (0, 0, 0)
    ) -> "Planes":
        """From uint8 [H, W, 3], an image whose sides were divided by `reduction`."""
        height, width = pixels.shape[:2]
        layout = [[0, height, 3 * width, 0, 0, height, width, reduction, reduction]]
        return cls(np.ascontiguousarray(pixels).reshape(-1), np.array(layout), 3, stored)


@dataclass(frozen=True, slots=True)
class OpenImage:
    """An image of known size, whose pixels are decoded when a caller says which it needs."""

    data: bytes
    stored: tuple[int, int, int]
    """The turn that makes it upright (headers.TURNS), and its height and width as stored."""
    header: Header | None
    """None if the whole image is decoded already."""
    pixels: np.ndarray | None

    @property
    def height(self) -> int:
        """Of the upright image, in pixels, like `width` and the box of `planes`."""
        return self.stored[2 if self.stored[0] & TRANSPOSED else 1]

    @property
    def width(self) -> int:
        return self.stored[1 if self.stored[0] & TRANSPOSED else 2]

    @property
    def baseline(self) -> bool:
        """Whether it is a JPEG whose rows can be decoded one after the other."""
        return self.header is not None and bool(self.header.frame) and not self.header.progressive

    def planes(self, box: tuple[int, int, int, int], least_factor: float) -> "Planes":
        """The pixels that crops within a box (top, left, bottom, right) need; see `decode`.

        The box is in pixels of the upright image. One that is empty or reaches beyond the image
        gives the planes of the whole image.
        """
        top, left, bottom, right = box
        if not (0 <= top < bottom <= self.height and 0 <= left < right <= self.width):
            box = (0, 0, self.height, self.width)
        if self.stored[0]:
            top, left, bottom, right = map(float, box)
            upright = (top, left, bottom - top, right - left)
            top, left, height, width = map(int, compose.stored_box(self.stored, upright))
            box = (top, left, top + height, left + width)
        if self.baseline:
            assert self.header is not None
            found = jpeg.decode(self.data, box, least_factor, self.header.segments)
            if found is not None:
                return Planes(*found, turns=1, stored=self.stored)
        return Planes.of_rgb(*self.decode(box[2], least_factor), self.stored)

    def decode(self, bottom: int, least_factor: float) -> tuple[np.ndarray, int]:
        """The stored pixels, uint8 [h, W, 3], and the whole number that divides their sides.

        Rows from `bottom` on may be missing; the others equal those of the whole image.
        `least_factor` is the least factor by which any crop will be shrunk. From 2 on, libjpeg
        leaves out the frequencies that a half, a quarter or an eighth of the size cannot show.
        """
        if self.pixels is not None:
            return self.pixels, 1
        turn, stored_height, stored_width = self.stored
        reduction = 1
        data: bytes | bytearray = self.data
        if self.header is not None and self.header.frame is not None:
            reduction = next((r for r in (8, 4, 2) if r <= least_factor), 1)
            # A header that declares fewer rows ends the decoding early, but not that of a
            # progressive file. The chroma of a row depends on at most 16 rows below it.
            height = (bottom + 2 * _MCU_ROWS - 1) // _MCU_ROWS * _MCU_ROWS
            if self.baseline and height < stored_height:
                data = bytearray(data)
                struct.pack_into(">H", data, self.header.frame + 5, height)
        # The header's orientation counts, not one that only OpenCV finds.
        flags = _REDUCED[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
        pixels, _ = codec_messages.imdecode(np.frombuffer(data, np.uint8), flags)
        if pixels is None:  # Pillow can read it, or says what is wrong.
            pixels, reduction = _turned_back(decode(self.data), turn), 1
        elif reduction > 1:  # OpenCV cannot turn the channels as it reduces.
            cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, pixels)
        # The crops lie within the declared size, and the kernels check no bounds.
        height, width = -(-min(bottom, stored_height) // reduction), -(-stored_width // reduction)
        if pixels.shape[0] < height or pixels.shape[1] != width:
            raise BrokenImage(
                "corrupt",
                f"the header declares {stored_width} x {stored_height} pixels, and "
                f"{pixels.shape[1]} x {pixels.shape[0]} were decoded",
            )
        return pixels, reduction


@dataclass(frozen=True)
class ImageInfo:
    """A readable image's width and height in pixels, after its EXIF orientation, and its format."""

    width: int
    height: int
    format: str
    """Pillow's name of the format, such as "JPEG"."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of an encoded image: uint8 [H, W, 3] RGB, C-contiguous.

    The image is turned upright by its EXIF orientation; of an animation it is the first frame.
    Transparency is composited on white, and 16-bit values are scaled to 8. Raises BrokenImage, for
    a declared size above max_pixels before any pixel is allocated. (Pillow refuses more than about
    179 million pixels in the formats that it reads, whatever max_pixels says.)
    """
    return _decode(data, max_pixels)[0]


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> OpenImage:
    """Read an image's header. Formats that OpenCV does not decode are decoded whole at once.

    Raises BrokenImage where `decode` does, now or when pixels are asked for.
    """
    header = _header(data)
    turn = turn_of(header.exif) if header is not None else None
    if header is None or turn is None:
        pixels = decode(data, max_pixels)
        return OpenImage(data, (0, pixels.shape[0], pixels.shape[1]), None, pixels)
    _require_size(header.width, header.height, max_pixels, header.format, data)
    return OpenImage(data, (turn, header.height, header.width), header, None)


def _header(data: bytes) -> Header | None:
    """The header of what OpenCV decodes as Pillow would; None for the rest. BrokenImage."""
    header = plain_header(data)
    # Decoders differ on a JPEG that ends early: some fill the rest with gray. So it is refused. The
    # search starts at the frame header, because EXIF thumbnails have end markers too.
    if header is not None and header.frame is not None and data.rfind(_JPEG_END, header.frame) < 0:
        raise BrokenImage("truncated", "the JPEG has no end marker")
    return header


def _turned_back(pixels: np.ndarray, turn: int) -> np.ndarray:
    """An upright image uint8 [H, W, 3] as it was stored, before the turn."""
    pixels = pixels[::-1] if turn & UPSIDE_DOWN else pixels
    pixels = pixels[:, ::-1] if turn & MIRRORED else pixels
    return pixels.transpose(1, 0, 2) if turn & TRANSPOSED else pixels


def _turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """A stored image uint8 [H, W, 3] upright: the inverse of _turned_back."""
    pixels = pixels.transpose(1, 0, 2) if turn & TRANSPOSED else pixels
    pixels = pixels[:, ::-1] if turn & MIRRORED else pixels
    return pixels[::-1] if turn & UPSIDE_DOWN else pixels


def check(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Decode the whole image strictly. Raises BrokenImage, which says what is wrong with it.

    Unlike `decode` it refuses JPEGs whose data libjpeg repairs with a warning (bytes lost in the
    middle, an end marker pasted onto half a file), and PNGs with a wrong checksum. libjpeg's
    warnings are seen on glibc only, and reach the right caller if one thread checks at a time.
    """
    pixels, image_format, warning = _decode(data, max_pixels)
    info = ImageInfo(pixels.shape[1], pixels.shape[0], image_format)
    if data.startswith(JPEG_START) and not warning and plain_header(data) is None:
        # Pillow read it, for instance as CMYK, and keeps libjpeg's warnings to itself.
        del pixels
        _, warning = codec_messages.imdecode(np.frombuffer(data, np.uint8))
    if "premature end" in warning.lower():
        raise BrokenImage("truncated", warning)
    if "Corrupt JPEG data" in warning:
        raise BrokenImage("corrupt", warning)
    if data.startswith(PNG_SIGNATURE):
        _verify_png(data)
    return info


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 [H, W, 3] RGB."""
    return _encode(pixels, ".png", [])


def encode_jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    """A JPEG of uint8 [H, W, 3] RGB; quality from 1 to 100."""
    require(1 <= quality <= 100, f"JPEG quality must lie in [1, 100], got {quality}")
    return _encode(pixels, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality])


def shrink(data: bytes, max_side: int, quality: int = 95) -> bytes:
    """The image with its longer side at most max_side pixels, as an upright JPEG.

    An image that is small enough is returned as the same bytes, unchecked. Raises BrokenImage.
    """
    require(max_side > 0, f"max_side must be positive, got {max_side}")
    if max(_declared_size(data)) <= max_side:
        return data
    pixels = decode(data)
    height, width = pixels.shape[:2]
    factor = max_side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return encode_jpeg(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), quality)


def _encode(pixels: np.ndarray, extension: str, options: list[int]) -> bytes:
    require(
        pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3,
        f"pixels must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}",
    )
    done, encoded = cv2.imencode(extension, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    assert done
    return encoded.tobytes()


def _decode(data: bytes, max_pixels: int) -> tuple[np.ndarray, str, str]:
    """Pixels uint8 [H, W, 3], the format's name, and what OpenCV's libraries complained about."""
    if not data:
        raise BrokenImage("empty", "0 bytes")
    header = _header(data)
    if header is None:
        return *_decode_with_pillow(data, max_pixels), ""
    _require_size(header.width, header.height, max_pixels, header.format, data)
    pixels, warning = codec_messages.imdecode(np.frombuffer(data, np.uint8))
    if pixels is None:  # Pillow can read it, or says what is wrong.
        return *_decode_with_pillow(data, max_pixels), warning
    return pixels, header.format, warning


def _require_size(
    width: int,
    height: int,
    max_pixels: int,
    image_format: str,
    data: bytes,
    memory_per_pixel: int | None = None,
) -> None:
    """Raise BrokenImage for a size that must not be decoded, or that these bytes cannot hold."""
    if width == 0 or height == 0:
        raise BrokenImage("zero-sized", f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise BrokenImage("too large", f"{width} x {height} pixels; the limit is {max_pixels}")
    # No image of fewer than 64 pixels for each byte is refused, so the size is seldom computed.
    if width * height > 64 * len(data) and len(data) < headers.least_bytes(data, width, height):
        raise BrokenImage("truncated", f"{len(data)} bytes cannot hold {width} x {height} pixels")
    memory = (memory_per_pixel or MEMORY_PER_PIXEL[image_format]) * width * height
    if memory > MAX_MEMORY:
        raise BrokenImage(
            "too large",
            f"{width} x {height} pixels take {memory / 1e9:.1f} GB to decode from {image_format}; "
            f"the limit is {MAX_MEMORY / 1e9:.1f} GB",
        )


def _declared_size(data: bytes) -> tuple[int, int]:
    header = _header(data)
    if header is not None:
        return header.width, header.height
    return _open_with_pillow(data, MAX_PIXELS).size


# Pillow: every other format and mode.


def _broken(error: Exception) -> BrokenImage:
    if isinstance(error, BrokenImage):
        return error
    detail = str(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return BrokenImage("too large", detail)
    if "truncated" in detail.lower():
        return BrokenImage("truncated", detail)
    return BrokenImage("corrupt", detail)


def _open_with_pillow(data: bytes, max_pixels: int) -> Image.Image:
    # Not catch_warnings, which would change the filters of other threads.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if not data:
        raise BrokenImage("empty", "0 bytes")
    canvas = webp_size(data)
    if canvas is not None:
        _require_size(*canvas, max_pixels, "WEBP", data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        detail = f"{len(data)} bytes that start with {data[:8]!r}"
        raise BrokenImage("not an image", detail) from None
    except Exception as error:  # Pillow's readers raise many types on hostile bytes.
        raise _broken(error) from error
    image_format = image.format or ""
    more = _CMYK_JPEG_MEMORY if (image_format, image.mode) == ("JPEG", "CMYK") else None
    _require_size(*image.size, max_pixels, image_format, data, more)
    return image


def _decode_with_pillow(data: bytes, max_pixels: int) -> tuple[np.ndarray, str]:
    image = _open_with_pillow(data, max_pixels)
    image_format = image.format or ""
    try:
        image.load()
        turn, pixels = TURNS[_orientation_of(image)], _to_rgb(image, image_format)
        image.close()  # before a turned image is in memory as well
        return np.ascontiguousarray(_turned(pixels, turn)), image_format
    except Exception as error:  # as above
        raise _broken(error) from error


def _orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an image that is loaded: 1 to 8."""
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def _to_rgb(image: Image.Image, image_format: str) -> np.ndarray:
    """A Pillow image as uint8 [H, W, 3], converted in strips so that no second one is in memory."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image.crop((0, top, image.width, bottom))
        pixels[top:bottom] = _strip_to_rgb(strip, image_format)
    return pixels


def _strip_to_rgb(image: Image.Image, image_format: str) -> np.ndarray:
    # Pillow clips 16-bit values at 255 when it converts them, so scale them here. Mode "I" has 32
    # bits, of which PNG and PPM use 16.
    if image.mode.startswith("I;16") or (image.mode == "I" and image_format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)  # [H, W], 0 .. 65535
        gray = ((values + 128) // 257).astype(np.uint8)
        return gray[:, :, None]  # broadcast to three channels
    if image.mode in ("I", "F"):
        raise BrokenImage("unsupported", "32-bit pixels have no defined white; convert to 8 or 16")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _verify_png(data: bytes) -> None:
    """Check the checksum of every chunk up to the end chunk; decoders skip some of them."""
    position = len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise BrokenImage("corrupt", f"the PNG chunk {kind!r} has a wrong checksum")
        if kind == b"IEND":
            return
        position = end + 4
    raise BrokenImage("truncated", "the PNG has no end chunk")
