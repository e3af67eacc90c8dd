"""Limits checked before an image is decoded, and the error that says why one is refused."""

import numpy as np

from selfray.pixels import headers

MAX_PIXELS = 100_000_000
"""Images that declare more pixels than this are refused. Decoded, this many take 300 MB."""
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
CMYK_JPEG_MEMORY = 16
"""The same for a JPEG of four components."""


class BrokenImage(ValueError):  # noqa: N818 - it names the image, not the fault
    """Raised for bytes that are not a usable image; `reason` is a short category for counts.

    Reasons: "empty", "not an image", "truncated", "corrupt", "too large", "zero-sized",
    "unsupported" and "channels"; "no readable image" for a whole batch in which none is usable.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        # Ray sends exceptions between processes, and by default they pickle the joined message.
        return BrokenImage, (self.reason, self.detail)


def require_size(
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


def require_channels(found: int, channels: int) -> None:
    if found != channels:
        raise BrokenImage(
            "channels", f"the image has {found} channels, but data.channels is {channels}"
        )


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale uint8 or uint16 values to uint8: 65535 becomes 255."""
    if values.dtype == np.uint8:
        return values
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
