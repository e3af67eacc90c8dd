"""Encoded images to pixels and back: decoding that refuses broken and absurd files, and says why.

Views of a baseline JPEG take jpeg.py; other 8-bit JPEG and PNG OpenCV's decoder (about three times
as fast as Pillow's for small images), every other format and mode Pillow's. All read the declared
size first.
"""

import ctypes
import io
import os
import struct
import sys
import threading
import warnings
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from selfray.check import require
from selfray.pixels import jpeg, kernels

MAX_PIXELS = 100_000_000
"""Images that declare more pixels than this are refused (300 MB once decoded)."""

# Pillow must not guess further: its EPS reader, for one, starts Ghostscript on untrusted bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_GRAY, _PNG_RGB = 0, 2
# Chunks that change the pixels in ways of their own: transparency, animation, orientation.
_PNG_SPECIAL_CHUNKS = (b"tRNS", b"acTL", b"eXIf")
# Start-of-frame markers that OpenCV's libjpeg reads: baseline, extended and progressive Huffman.
_JPEG_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)
_JPEG_PROGRESSIVE = 0xC2
_JPEG_NO_FRAMES = (0xC4, 0xC8, 0xCC)
_EXIF_ORIENTATION, _SHORT = 0x0112, 3
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

    Reasons: "empty", "not an image", "truncated", "corrupt", "too large", "zero-sized",
    "unsupported"; a whole batch without one: "no readable image".
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        # Exceptions pickle by `args`, the joined message; Ray sends them between processes.
        return BrokenImage, (self.reason, self.detail)


class Planes(NamedTuple):
    """As much of an image as was decoded; of a JPEG, valid until this thread decodes the next."""

    pixels: np.ndarray
    """uint8 [n], all of them."""
    layout: np.ndarray
    """int64 [P, 9]: where planes lie in it, in the columns that kernels.py names."""
    turns: int
    """3: one plane, of RGB. 1: Y alone, or Y, Cb and Cr."""
    stored: tuple[int, int, int] = (0, 0, 0)
    """How the whole image is to be turned (kernels.TURNS), and its height and width before it is,
    which count only if it is."""

    @classmethod
    def of_rgb(
        cls, pixels: np.ndarray, reduction: int = 1, stored: tuple[int, int, int] = (0, 0, 0)
    ) -> "Planes":
        """Of uint8 [H, W, 3], by whose `reduction` an image's sides were divided."""
        height, width = pixels.shape[:2]
        layout = [[0, height, 3 * width, 0, 0, height, width, reduction, reduction]]
        return cls(np.ascontiguousarray(pixels).reshape(-1), np.array(layout), 3, stored)


@dataclass(frozen=True, slots=True)
class OpenImage:
    """An image whose size is known and whose pixels are decoded when somebody says which."""

    data: bytes
    stored: tuple[int, int, int]
    """How it is to be turned (kernels.TURNS), and its height and width before it is."""
    frame: int | None
    """Where a JPEG's frame header lies, if part of it can be decoded."""
    baseline: bool
    pixels: np.ndarray | None

    @property
    def height(self) -> int:
        """Upright, as `width` is and the box of `planes`."""
        return self.stored[2 if self.stored[0] & kernels.TRANSPOSED else 1]

    @property
    def width(self) -> int:
        return self.stored[1 if self.stored[0] & kernels.TRANSPOSED else 2]

    def planes(self, box: tuple[int, int, int, int], least_factor: float) -> "Planes":
        """What crops within a box (top, left, bottom, right) need of it; see `decode`."""
        if self.stored[0]:
            top, left, bottom, right = map(float, box)
            upright = (top, left, bottom - top, right - left)
            top, left, height, width = map(int, kernels.stored_box(self.stored, upright))
            box = (top, left, top + height, left + width)
        if self.baseline:
            found = jpeg.decode(self.data, box, least_factor)
            if found is not None:
                return Planes(*found, turns=1, stored=self.stored)
        return Planes.of_rgb(*self.decode(box[2], least_factor), self.stored)

    def decode(self, bottom: int, least_factor: float) -> tuple[np.ndarray, int]:
        """Pixels uint8 [h, W, 3] as they are stored, and by what whole number their sides were
        divided.

        Rows from `bottom` on may be missing; the others are those of the whole image bit for bit.
        `least_factor` is the least by which any crop of it will be shrunk: from 2 on, libjpeg
        leaves out the frequencies that a half, a quarter or an eighth of the size has no room for.
        """
        if self.pixels is not None:
            return self.pixels, 1
        turn, stored_height, stored_width = self.stored
        reduction = 1
        data: bytes | bytearray = self.data
        if self.frame is not None:
            reduction = next((r for r in (8, 4, 2) if r <= least_factor), 1)
            # A header that declares fewer rows ends the decoding early. A progressive file's scans
            # have no such end. The chroma of a row depends on at most 16 further rows.
            height = (bottom + 2 * _MCU_ROWS - 1) // _MCU_ROWS * _MCU_ROWS
            if self.baseline and height < stored_height:
                data = bytearray(data)
                struct.pack_into(">H", data, self.frame + 5, height)
        # Upright by what the header says: an orientation that only OpenCV sees must not turn it.
        flags = _REDUCED[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
        pixels, _ = _codec_messages.imdecode(np.frombuffer(data, np.uint8), flags)
        if pixels is None:  # `decode` says what is wrong with it, or can read it.
            pixels, reduction = _turned_back(decode(self.data), turn), 1
        elif reduction > 1:  # OpenCV cannot turn the channels as it reduces.
            cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, pixels)
        # Crops were drawn for the size that the header declared, and kernels check no bounds.
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
    """What a readable image is: width and height in pixels as decoded (after EXIF orientation)."""

    width: int
    height: int
    format: str
    """Pillow's name of the format, such as "JPEG"."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of an encoded image: uint8 [H, W, 3] RGB, C-contiguous.

    Upright by its EXIF orientation; the first frame of an animation; transparency composited on
    white; 16-bit values scaled to 8. Raises BrokenImage, and does so before any pixel is allocated
    where the declared size exceeds max_pixels. (Pillow has a limit of its own, about 179 million
    pixels, which a larger max_pixels does not lift for the formats that Pillow reads.)
    """
    return _decode(data, max_pixels)[0]


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> OpenImage:
    """Read the header alone of what OpenCV decodes; anything else is decoded whole at once.

    Raises BrokenImage where `decode` does, or its decode will.
    """
    header = _plain_header(data) if data else None
    turn = _turn_of(header.exif) if header is not None else None
    if header is None or turn is None:
        pixels = decode(data, max_pixels)
        return OpenImage(data, (0, pixels.shape[0], pixels.shape[1]), None, False, pixels)
    _require_size(header.width, header.height, max_pixels)
    baseline = header.frame is not None and data[header.frame + 1] != _JPEG_PROGRESSIVE
    return OpenImage(data, (turn, header.height, header.width), header.frame, baseline, None)


def _turn_of(exif: bytes | None) -> int | None:
    """How what is stored becomes upright, as kernels.TURNS has it; None if that is not sure."""
    if exif is None:
        return 0
    tiff, found = exif[6:], []
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        version, first = struct.unpack_from(order + "HI", tiff, 2)
        (entries,) = struct.unpack_from(order + "H", tiff, first)
        for entry in range(entries):
            values = struct.unpack_from(order + "HHIH", tiff, first + 2 + 12 * entry)
            if values[0] == _EXIF_ORIENTATION:
                found.append(values[1:])
    except (KeyError, struct.error):
        return None
    if version != 42 or len(found) > 1:
        return None
    kind, count, value = found[0] if found else (_SHORT, 1, 1)
    # Decoders differ on other types.
    plain = (kind, count) == (_SHORT, 1) and value < len(kernels.TURNS)
    return kernels.TURNS[value] if plain else None


def _turned_back(pixels: np.ndarray, turn: int) -> np.ndarray:
    """An upright image [H, W, 3] as it was before it was turned."""
    pixels = pixels[::-1] if turn & kernels.UPSIDE_DOWN else pixels
    pixels = pixels[:, ::-1] if turn & kernels.MIRRORED else pixels
    return pixels.transpose(1, 0, 2) if turn & kernels.TRANSPOSED else pixels


def check(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Decode the whole image strictly; BrokenImage says what is wrong with it.

    Stricter than `decode`: refuses JPEGs whose data libjpeg repairs with a warning (bytes lost in
    the middle, an end marker pasted onto half a file), and PNGs with a wrong checksum. libjpeg's
    warnings are seen on glibc only, and reach the right caller if one thread checks at a time.
    """
    pixels, image_format, warning = _decode(data, max_pixels)
    if "premature end" in warning.lower():
        raise BrokenImage("truncated", warning)
    if "Corrupt JPEG data" in warning:
        raise BrokenImage("corrupt", warning)
    if data.startswith(_PNG_SIGNATURE):
        _verify_png(data)
    return ImageInfo(pixels.shape[1], pixels.shape[0], image_format)


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 [H, W, 3] RGB."""
    return _encode(pixels, ".png", [])


def encode_jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    """A JPEG of uint8 [H, W, 3] RGB; quality from 1 to 100."""
    require(1 <= quality <= 100, f"JPEG quality must lie in [1, 100], got {quality}")
    return _encode(pixels, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality])


def shrink(data: bytes, max_side: int, quality: int = 95) -> bytes:
    """The image with its longer side at most max_side pixels, as an upright JPEG.

    Returns the very bytes where the image is small enough already (they are not checked then).
    Raises BrokenImage.
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
    """Pixels, the format's name, and what the decoding libraries had to complain about."""
    if not data:
        raise BrokenImage("empty", "0 bytes")
    header = _plain_header(data)
    if header is None:
        return *_decode_with_pillow(data, max_pixels), ""
    _require_size(header.width, header.height, max_pixels)
    pixels, warning = _codec_messages.imdecode(np.frombuffer(data, np.uint8))
    if pixels is None:  # Pillow says what is wrong, or can read what OpenCV cannot.
        return *_decode_with_pillow(data, max_pixels), warning
    return pixels, header.format, warning


def _require_size(width: int, height: int, max_pixels: int) -> None:
    if width == 0 or height == 0:
        raise BrokenImage("zero-sized", f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise BrokenImage("too large", f"{width} x {height} pixels; the limit is {max_pixels}")


def _declared_size(data: bytes) -> tuple[int, int]:
    header = _plain_header(data) if data else None
    if header is not None:
        return header.width, header.height
    return _open_with_pillow(data, MAX_PIXELS).size


# Headers, read by hand: Pillow takes 20 us to open an image that OpenCV decodes in 17.


class _Header(NamedTuple):
    format: str
    width: int
    height: int
    frame: int | None = None
    """Where a JPEG's frame header starts."""
    exif: bytes | None = None


def _plain_header(data: bytes) -> _Header | None:
    """The header of an image that OpenCV decodes right; None sends it to Pillow."""
    if data.startswith(b"\xff\xd8"):
        return _plain_jpeg_header(data)
    if data.startswith(_PNG_SIGNATURE):
        return _plain_png_header(data)
    return None


def _plain_jpeg_header(data: bytes) -> _Header | None:
    position, end, exif = 2, len(data) - 10, None
    while position < end:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in _JPEG_NO_FRAMES:
            precision, height, width, channels = struct.unpack_from(">BHHB", data, position + 4)
            if marker not in _JPEG_PLAIN_FRAMES or precision != 8 or channels not in (1, 3):
                return None  # CMYK, lossless, arithmetic coding or 12 bits
            # Decoders differ on a file that ends early: some fill the rest with grey. Refuse it
            # here. The search starts behind the frame header: EXIF thumbnails have their own end.
            if data.rfind(_JPEG_END, position) < 0:
                raise BrokenImage("truncated", "the JPEG has no end marker")
            return _Header("JPEG", width, height, position, exif)
        elif marker in (0xD9, 0xDA) or marker == 0 or 0x02 <= marker < 0xC0:
            return None  # no segment: decoders differ on where to go on
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            position += 2
        else:
            length = data[position + 2] << 8 | data[position + 3]
            if marker == 0xE1 and data.startswith(b"Exif", position + 4):
                # Decoders differ on which of several counts.
                exif = data[position + 4 : position + 2 + length] if exif is None else b""
            position += 2 + length
    return None


def _plain_png_header(data: bytes) -> _Header | None:
    if len(data) < 33 or data[12:16] != b"IHDR":
        return None
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    if bits != 8 or colour not in (_PNG_GRAY, _PNG_RGB):
        return None
    position = 33
    while position + 8 <= len(data):
        kind = data[position + 4 : position + 8]
        if kind == b"IDAT":
            return _Header("PNG", width, height)
        if kind in _PNG_SPECIAL_CHUNKS:
            return None
        position += 12 + int.from_bytes(data[position : position + 4])
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """The canvas (width, height) of a WebP file; Pillow allocates it while it opens the file."""
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
    # A filter on Pillow's modules, not catch_warnings: that one mixes up other threads' filters.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if not data:
        raise BrokenImage("empty", "0 bytes")
    webp_size = _webp_size(data)
    if webp_size is not None:
        _require_size(*webp_size, max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        detail = f"{len(data)} bytes that start with {data[:8]!r}"
        raise BrokenImage("not an image", detail) from None
    except Exception as error:  # Pillow's readers raise many types on hostile bytes.
        raise _broken(error) from error
    _require_size(*image.size, max_pixels)
    return image


def _decode_with_pillow(data: bytes, max_pixels: int) -> tuple[np.ndarray, str]:
    image = _open_with_pillow(data, max_pixels)
    image_format = image.format or ""
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), image_format), image_format
    except Exception as error:  # as above
        raise _broken(error) from error


def _to_rgb(image: Image.Image, image_format: str) -> np.ndarray:
    # Pillow clips 16-bit modes at 255 when it converts them, so they are scaled here. Mode "I" has
    # 32 bits, of which PNG and PPM use 16.
    if image.mode.startswith("I;16") or (image.mode == "I" and image_format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)  # [H, W], 0 .. 65535
        gray = ((values + 128) // 257).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise BrokenImage("unsupported", "32-bit pixels have no defined white; convert to 8 or 16")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))  # a copy: Pillow's own buffer is read-only


def _verify_png(data: bytes) -> None:
    """Check the checksum of every chunk up to the end chunk; decoders skip some of them."""
    position = len(_PNG_SIGNATURE)
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


# libjpeg and libpng print complaints straight to C's stderr ("Corrupt JPEG data: ..."), and OpenCV
# offers no way to stop them.


class _CodecMessages:
    """Points C's stderr at a memory stream while a decoder runs, on glibc.

    Only what other threads print through C's stdio meanwhile is lost: Python's sys.stderr,
    faulthandler and std::cerr do not pass through this pointer, as they would through a redirected
    file descriptor. Costs about 2 us.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0  # decoders running in this process's threads
        self._libc: ctypes.CDLL | None = None
        self._is_set_up = False
        self._previous_level = 0

    def imdecode(
        self, encoded: np.ndarray, flags: int = cv2.IMREAD_COLOR_RGB
    ) -> tuple[np.ndarray | None, str]:
        """RGB pixels or None, and what was printed (the last of several threads has it all)."""
        pixels = None
        self._enter()
        try:
            pixels = cv2.imdecode(encoded, flags)
        except cv2.error:
            pass  # None, as for bytes that OpenCV cannot read
        finally:
            printed = self._leave()
        return pixels, printed

    def _set_up(self) -> None:
        self._is_set_up = True
        if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
            return
        try:
            os.confstr("CS_GNU_LIBC_VERSION")
        except (ValueError, OSError):
            return  # musl's stderr is a constant; writing to it would crash.
        self._libc = ctypes.CDLL(None)
        self._libc.open_memstream.restype = ctypes.c_void_p
        self._text, self._length = ctypes.c_void_p(), ctypes.c_size_t()
        self._stderr = ctypes.c_void_p.in_dll(self._libc, "stderr")
        self._real = self._stderr.value
        self._stream = ctypes.c_void_p(
            self._libc.open_memstream(ctypes.byref(self._text), ctypes.byref(self._length))
        )
        os.register_at_fork(after_in_child=self._reset_after_fork)

    def _reset_after_fork(self) -> None:
        # The threads that decoded in the parent do not exist here, and cannot leave.
        self._lock = threading.Lock()
        self._depth = 0
        self._stderr.value = self._real

    def _enter(self) -> None:
        with self._lock:
            if not self._is_set_up:
                self._set_up()
            self._depth += 1
            if self._depth == 1:
                self._previous_level = cv2.utils.logging.setLogLevel(0)  # silent
                if self._libc is not None:
                    self._real = self._stderr.value
                    self._stderr.value = self._stream.value

    def _leave(self) -> str:
        with self._lock:
            self._depth -= 1
            if self._depth > 0:
                return ""
            cv2.utils.logging.setLogLevel(self._previous_level)
            if self._libc is None:
                return ""
            self._stderr.value = self._real
            self._libc.fflush(self._stream)
            if self._length.value == 0:
                return ""
            text = ctypes.string_at(self._text.value or 0, self._length.value)
            self._libc.fseek(self._stream, 0, 0)
            self._libc.fflush(self._stream)
            return text.decode(errors="replace").strip()


_codec_messages = _CodecMessages()
