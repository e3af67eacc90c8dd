"""Decodes formats and modes that OpenCV cannot decode as needed, by Pillow."""

import io
import logging
import warnings

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from selfray.pixels.foreign import foreign_format
from selfray.pixels.headers import MIRRORED, TRANSPOSED, TURNS, UPSIDE_DOWN, webp_size
from selfray.pixels.limits import (
    CMYK_JPEG_MEMORY,
    MEMORY_PER_PIXEL,
    BrokenImage,
    require_channels,
    require_size,
    to_8_bits,
)
from selfray.views import RGB

# Only these, because Pillow would try others: its EPS reader starts Ghostscript on untrusted bytes.
FORMATS = tuple(MEMORY_PER_PIXEL)
_STRIP_PIXELS = 1 << 18
"""Pixels that are converted to RGB at a time."""


def _broken(error: Exception) -> BrokenImage:
    if isinstance(error, BrokenImage):
        return error
    detail = str(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return BrokenImage("too large", detail)
    if "truncated" in detail.lower():
        return BrokenImage("truncated", detail)
    return BrokenImage("corrupt", detail)


def open_with_pillow(data: bytes, max_pixels: int) -> Image.Image:
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it also raises what it logs
    # Not catch_warnings, which would change the filters of other threads.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if not data:
        raise BrokenImage("empty", "0 bytes")
    canvas = webp_size(data)
    if canvas is not None:
        require_size(*canvas, max_pixels, "WEBP", data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        found = foreign_format(data)
        if found is not None:
            detail = f"{found}, which is not read: convert it to TIFF or PNG"
            raise BrokenImage("unsupported", detail) from None
        detail = f"{len(data)} bytes that start with {data[:8]!r}"
        raise BrokenImage("not an image", detail) from None
    except Exception as error:  # Pillow's readers raise many types on hostile bytes.
        raise _broken(error) from error
    image_format = image.format or ""
    more = CMYK_JPEG_MEMORY if (image_format, image.mode) == ("JPEG", "CMYK") else None
    require_size(*image.size, max_pixels, image_format, data, more)
    return image


def decode_with_pillow(data: bytes, max_pixels: int, channels: int) -> tuple[np.ndarray, str]:
    image = open_with_pillow(data, max_pixels)
    if channels not in (1, RGB):
        require_channels(len(image.getbands()), channels)
    image_format = image.format or ""
    try:
        image.load()
        turn, pixels = TURNS[_orientation_of(image)], _to_channels(image, image_format, channels)
        image.close()  # before a turned image is in memory as well
        return np.ascontiguousarray(_turned(pixels, turn)), image_format
    except Exception as error:  # as above
        raise _broken(error) from error


def _orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an image that is loaded: 1 to 8."""
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def _to_channels(image: Image.Image, image_format: str, channels: int) -> np.ndarray:
    """A Pillow image as uint8 [H, W, C], converted in strips so that no second one is in memory."""
    pixels = np.empty((image.height, image.width, channels), np.uint8)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image.crop((0, top, image.width, bottom))
        if channels not in (1, RGB):
            pixels[top:bottom] = np.asarray(strip)
            continue
        rgb = _strip_to_rgb(strip, image_format)  # [h, W, 3], or gray [h, W, 1]
        is_colour = channels == 1 and rgb.shape[2] == RGB
        pixels[top:bottom] = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[:, :, None] if is_colour else rgb
    return pixels


def _strip_to_rgb(image: Image.Image, image_format: str) -> np.ndarray:
    # Pillow clips 16-bit values at 255 when it converts them, so scale them here. Mode "I" has 32
    # bits, of which PNG and PPM use 16.
    if image.mode.startswith("I;16") or (image.mode == "I" and image_format in ("PNG", "PPM")):
        gray = to_8_bits(np.asarray(image).astype(np.uint16))  # [H, W]
        return gray[:, :, None]  # broadcast to three channels
    if image.mode in ("I", "F"):
        raise BrokenImage("unsupported", "32-bit pixels have no defined white; convert to 8 or 16")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if image.mode == "L":
        return np.asarray(image)[:, :, None]
    return np.asarray(image.convert("RGB"))


def _turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """A stored image uint8 [H, W, 3] upright: the inverse of _turned_back."""
    pixels = pixels.transpose(1, 0, 2) if turn & TRANSPOSED else pixels
    pixels = pixels[:, ::-1] if turn & MIRRORED else pixels
    return pixels[::-1] if turn & UPSIDE_DOWN else pixels
