"""Encoded images to pixels and back. Broken and absurdly large files are refused, with a reason.

Views of a baseline JPEG are decoded by jpeg.py. OpenCV decodes other 8-bit JPEG and PNG, about
three times as fast as Pillow for small images; Pillow decodes all other formats and modes. The
declared size is checked before any pixel is allocated.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from selfray.check import require
from selfray.pixels import compose, jpeg
from selfray.pixels.headers import (
    JPEG_START,
    MIRRORED,
    PNG_SIGNATURE,
    STACK_KEY,
    TRANSPOSED,
    UPSIDE_DOWN,
    Header,
    plain_header,
    turn_of,
)
from selfray.pixels.libjpeg_log import codec_messages
from selfray.pixels.limits import (
    MAX_PIXELS,
    BrokenImage,
    require_channels,
    require_size,
    to_8_bits,
)
from selfray.pixels.other_formats import decode_with_pillow, open_with_pillow
from selfray.views import MOST_CHANNELS, RGB

_MCU_ROWS = 16
_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_REDUCED_GRAY = {
    1: cv2.IMREAD_GRAYSCALE,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_JPEG_END = b"\xff\xd9"


class Planes(NamedTuple):
    """The decoded part of an image. That of a JPEG is valid until its thread decodes the next."""

    pixels: np.ndarray
    """The values of all planes, uint8 [n]."""
    layout: np.ndarray
    """Where the planes lie in it, int64 [P, 9] in the columns that compose.py names."""
    turns: int
    """The number of channels if they are interleaved in one plane. 1: Y alone, or Y, Cb and Cr."""
    stored: tuple[int, int, int] = (0, 0, 0)
    """The turn that makes the whole image upright (headers.TURNS), and its height and width as
    stored, which are used only if there is a turn."""

    @classmethod
    def of_interleaved(
        cls, pixels: np.ndarray, reduction: int = 1, stored: tuple[int, int, int] = (0, 0, 0)
    ) -> "Planes":
        """From uint8 [H, W, C], an image whose sides were divided by `reduction`."""
        height, width, channels = pixels.shape
        layout = [[0, height, channels * width, 0, 0, height, width, reduction, reduction]]
        return cls(np.ascontiguousarray(pixels).reshape(-1), np.array(layout), channels, stored)


@dataclass(frozen=True, slots=True)
class OpenImage:
    """An image of known size, whose pixels are decoded when a caller says which it needs."""

    data: bytes
    stored: tuple[int, int, int]
    """The turn that makes it upright (headers.TURNS), and its height and width as stored."""
    header: Header | None
    """None if the whole image is decoded already."""
    pixels: np.ndarray | None
    channels: int = RGB
    """Of the pixels: 1 for gray, 3 for RGB, others for multispectral images."""

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
        return Planes.of_interleaved(*self.decode(box[2], least_factor), self.stored)

    def decode(self, bottom: int, least_factor: float) -> tuple[np.ndarray, int]:
        """The stored pixels, uint8 [h, W, C], and the whole number that divides their sides.

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
        flags = (_REDUCED if self.channels == RGB else _REDUCED_GRAY)[
            reduction
        ] | cv2.IMREAD_IGNORE_ORIENTATION
        pixels, _ = codec_messages.imdecode(np.frombuffer(data, np.uint8), flags)
        if pixels is None:  # Pillow can read it, or says what is wrong.
            whole = decode(self.data, channels=self.channels)
            pixels, reduction = _turned_back(whole, turn), 1
        elif self.channels == 1:
            pixels = pixels[:, :, None]
        elif reduction > 1:  # OpenCV cannot turn the channels as it reduces.
            cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, pixels)
        # The crops lie within the declared size, and the kernels check no bounds.
        height, width = -(-min(bottom, stored_height) // reduction), -(-stored_width // reduction)
        if pixels.shape[0] < height or pixels.shape[1] != width:
            raise BrokenImage(
                "corrupt",
                f"the header declares {stored_width} x {stored_height} pixels, but "
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


def decode(data: bytes, max_pixels: int = MAX_PIXELS, channels: int = RGB) -> np.ndarray:
    """The pixels of an encoded image: uint8 [H, W, channels], C-contiguous.

    With 3 channels they are RGB, and gray images are repeated in all three. With 1 they are gray,
    and colour images are reduced to brightness. With any other number, the image must have as many
    channels (see encode_channels).

    The image is turned upright by its EXIF orientation; of an animation, the first frame is
    decoded. Transparency is composited on white, and 16-bit values are scaled to 8. Raises
    BrokenImage, for a declared size above max_pixels before any pixel is allocated. (Pillow refuses
    more than about 179 million pixels in the formats that it reads, even if max_pixels is higher.)
    """
    return _decode(data, max_pixels, channels)[0]


def open_image(data: bytes, max_pixels: int = MAX_PIXELS, channels: int = RGB) -> OpenImage:
    """Read an image's header. Formats that OpenCV does not decode are decoded whole at once.

    Raises BrokenImage where `decode` does, now or when pixels are asked for.
    """
    header = _header(data)
    turn = turn_of(header.exif) if header is not None else None
    if header is None or turn is None or header.stack or channels not in (1, RGB):
        pixels = decode(data, max_pixels, channels)
        return OpenImage(data, (0, pixels.shape[0], pixels.shape[1]), None, pixels, channels)
    require_size(header.width, header.height, max_pixels, header.format, data)
    return OpenImage(data, (turn, header.height, header.width), header, None, channels)


def _header(data: bytes) -> Header | None:
    """The header of an image that OpenCV decodes like Pillow; None for others. Raises
    BrokenImage."""
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


def check(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Decode the whole image strictly. Raises BrokenImage, which says what is wrong with it.

    Unlike `decode` it refuses JPEGs whose data libjpeg repairs with a warning (bytes lost in the
    middle, an end marker pasted onto half a file), and PNGs with a wrong checksum. libjpeg's
    warnings are seen on glibc only, and reach the right caller if one thread checks at a time.
    """
    header = plain_header(data)
    channels = header.stack if header is not None and header.stack else RGB
    pixels, image_format, warning = _decode(data, max_pixels, channels)
    info = ImageInfo(pixels.shape[1], pixels.shape[0], image_format)
    if data.startswith(JPEG_START) and not warning and header is None:
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


def encode_channels(values: np.ndarray) -> bytes:
    """A PNG of uint8 or uint16 [H, W, C], for any number of channels up to 16.

    One channel is a gray PNG and three are an RGB one. Others lie one below the other in a gray
    PNG, with a text chunk that says how many they are: other programs can open it, and `decode`
    gives the channels back.
    """
    require(
        values.dtype in (np.uint8, np.uint16) and values.ndim == 3,
        f"values must be uint8 or uint16 [H, W, C], got {values.dtype} {list(values.shape)}",
    )
    height, width, channels = values.shape
    require(
        1 <= channels <= MOST_CHANNELS,
        f"an image has 1 to {MOST_CHANNELS} channels, got {channels}",
    )
    if channels in (1, RGB):
        done, encoded = cv2.imencode(".png", values[:, :, ::-1])
        assert done
        return encoded.tobytes()
    stack = np.ascontiguousarray(values.transpose(2, 0, 1)).reshape(channels * height, width)
    done, encoded = cv2.imencode(".png", stack)
    assert done
    data, text = encoded.tobytes(), b"tEXt" + STACK_KEY + b"\0" + str(channels).encode()
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return data[:33] + chunk + data[33:]  # behind the header chunk


def _encode(pixels: np.ndarray, extension: str, options: list[int]) -> bytes:
    require(
        pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3,
        f"pixels must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}",
    )
    done, encoded = cv2.imencode(extension, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    assert done
    return encoded.tobytes()


def _decode(data: bytes, max_pixels: int, channels: int) -> tuple[np.ndarray, str, str]:
    """Pixels uint8 [H, W, C], the format's name, and what OpenCV's libraries complained about."""
    if not data:
        raise BrokenImage("empty", "0 bytes")
    header = _header(data)
    if header is not None and header.stack:
        return _decode_stack(data, header, max_pixels, channels), "PNG", ""
    if header is None or channels not in (1, RGB):
        return *decode_with_pillow(data, max_pixels, channels), ""
    require_size(header.width, header.height, max_pixels, header.format, data)
    flags = cv2.IMREAD_COLOR_RGB if channels == RGB else cv2.IMREAD_GRAYSCALE
    pixels, warning = codec_messages.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:  # Pillow can read it, or says what is wrong.
        return *decode_with_pillow(data, max_pixels, channels), warning
    return pixels.reshape(*pixels.shape[:2], channels), header.format, warning


def _decode_stack(data: bytes, header: Header, max_pixels: int, channels: int) -> np.ndarray:
    """The pixels uint8 [H, W, C] of a PNG written by encode_channels."""
    require_channels(header.stack, channels)
    require_size(header.width, header.height, max_pixels, "PNG", data)
    pixels, _ = codec_messages.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 2 or len(pixels) % channels:
        raise BrokenImage("corrupt", f"the PNG does not hold {channels} stacked channels")
    stack = pixels.reshape(channels, -1, pixels.shape[1])
    return np.ascontiguousarray(to_8_bits(stack).transpose(1, 2, 0))


def _declared_size(data: bytes) -> tuple[int, int]:
    header = _header(data)
    if header is not None:
        return header.width, header.height
    return open_with_pillow(data, MAX_PIXELS).size


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
