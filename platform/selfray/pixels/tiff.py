"""Reads TIFF files that Pillow cannot: more than four channels, 16 bits per channel, floats.

It uses tifffile, which `pip install 'selfray[tiff]'` installs.
"""

import io
import logging
from typing import Any

import numpy as np

from selfray.pixels.limits import BrokenImage, require_size
from selfray.views import MOST_CHANNELS

_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_tiff(data: bytes) -> bool:
    return data.startswith(_STARTS)


def channels_of(data: bytes, max_pixels: int, page: int = 0) -> np.ndarray:
    """One page of a TIFF as stored: uint8, uint16, int16 or float [H, W, C]. Raises BrokenImage."""
    return pages_of(data, max_pixels, (page,))[0]


def pages_of(data: bytes, max_pixels: int, only: tuple[int, ...] | None = None) -> list[np.ndarray]:
    """The pages of a TIFF as stored, [H, W, C] each; with `only`, these pages. Raises
    BrokenImage."""
    tifffile = _tifffile()
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # its log messages are of no use here
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            chosen = range(len(file.pages)) if only is None else only
            return [_page(file.pages[number], max_pixels, len(data)) for number in chosen]
    except BrokenImage:
        raise
    except MemoryError as error:
        raise BrokenImage("too large", "the TIFF needs more memory than is available") from error
    except Exception as error:  # tifffile raises many types on hostile bytes
        raise BrokenImage("corrupt", str(error) or type(error).__name__) from error


def _page(page: Any, max_pixels: int, size: int) -> np.ndarray:
    height, width = int(page.imagelength), int(page.imagewidth)
    samples = int(page.samplesperpixel)
    if not 1 <= samples <= MOST_CHANNELS:
        raise BrokenImage(
            "channels", f"the image has {samples} channels; the limit is {MOST_CHANNELS}"
        )
    bytes_per_pixel = 3 * samples * max(1, int(page.bitspersample) // 8)
    require_size(width, height, max_pixels, "TIFF", b"", bytes_per_pixel)
    stored = sum(int(count) for count in page.databytecounts)
    if int(page.compression) == 1 and stored < height * width * samples * page.bitspersample // 8:
        raise BrokenImage("truncated", f"{size} bytes cannot hold {width} x {height} pixels")
    values = page.asarray()
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    if values.dtype.kind not in "uif":
        raise BrokenImage("unsupported", f"a TIFF of {values.dtype.name}")
    if values.ndim == 2:
        values = values[:, :, None]
    elif values.ndim == 3 and int(page.planarconfig) == 2:
        values = np.moveaxis(values, 0, 2)
    if values.shape != (height, width, samples):
        raise BrokenImage("unsupported", f"a TIFF of shape {list(values.shape)}")
    return values


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError:
        raise BrokenImage(
            "unsupported", "reading this TIFF needs tifffile: pip install 'selfray[tiff]'"
        ) from None
    return tifffile
