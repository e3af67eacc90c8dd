"""Converts users' image files to what shards store: 8-bit images of 1 to 16 channels.

Files that all decoders read in the same way are kept byte for byte. Deep images (16 bits, signed or
float values, DICOM), multispectral images and files of several pages are converted: a window of
values is mapped to 0..255, or to 0..65535 to keep the depth. The manifest records the conversion.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

from selfray.check import require
from selfray.pixels import dicom, tiff
from selfray.pixels.codecs import encode_channels
from selfray.pixels.headers import PNG_SIGNATURE
from selfray.pixels.limits import MAX_PIXELS, BrokenImage
from selfray.pixels.other_formats import open_with_pillow
from selfray.pixels.raw import Raw

PERCENTILES = (0.5, 99.5)
"""The window of deep images if neither the user nor the file gives one."""
_SAMPLES_PER_PIXEL = 277
_PLAIN_MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr")


@dataclass(frozen=True)
class Intake:
    """How image files are converted for storage."""

    window: tuple[float, float] | None = None
    """The values that become black and white: percentiles of each image such as 0.5 99.5, or fixed
    values such as -1000 400. None takes a DICOM's own window, and percentiles 0.5 99.5 for other
    images of more than 8 bits."""
    window_of: Literal["image", "fixed"] | None = None
    """The meaning of `window`: percentiles of each image (image) or values (fixed). None takes two
    numbers within 0..100 as percentiles and others as values."""
    keep_depth: bool = False
    """Store images of more than 8 bits with 16 bits."""
    page: int | None = None
    """Take only this page of files with several pages, counted from 0; None takes every page as an
    image."""

    def __post_init__(self) -> None:
        if self.window is not None:
            low, high = self.window
            require(
                bool(np.isfinite([low, high]).all()) and low < high,
                f"window must be two numbers, the lower first, got {low:g} {high:g}",
            )
            require(
                not self.by_percentiles or 0 <= low < high <= 100,
                f"window {low:g} {high:g} is not a pair of percentiles: give two numbers within "
                "0..100, or --window-of fixed",
            )
        require(self.page is None or self.page >= 0, f"page must be at least 0, got {self.page}")

    @property
    def by_percentiles(self) -> bool:
        if self.window is None or self.window_of is not None:
            return self.window_of != "fixed"
        return 0 <= self.window[0] < self.window[1] <= 100


@dataclass(frozen=True)
class Taken:
    """One image to store."""

    data: bytes
    channels: int
    """1 for gray, 3 for RGB (and for files kept byte for byte), others for multispectral images."""
    page: int | None = None
    """The page or frame, for a file of several."""
    done: dict[str, Any] = field(default_factory=dict)
    """The conversion, for the manifest: depth, window, modality. Empty for the file's own bytes."""


def take(data: bytes, intake: Intake, max_pixels: int = MAX_PIXELS) -> Iterator[Taken]:
    """The images of a file. Raises BrokenImage, at the latest at the position of the broken
    page."""
    if dicom.is_dicom(data):
        raws = dicom.frames_of(data, max_pixels)
    elif tiff.is_tiff(data) and not _is_plain(data, max_pixels):
        raws = [Raw(values) for values in tiff.pages_of(data, max_pixels)]
    elif _is_deep_png(data):
        raws = [_deep_png(data, max_pixels)]
    else:
        yield Taken(data, 3)
        return
    pages = range(len(raws)) if intake.page is None else (intake.page,)
    if intake.page is not None and intake.page >= len(raws):
        raise BrokenImage("unsupported", f"page {intake.page} of a file that has {len(raws)}")
    for page in pages:
        stored, done = _windowed(raws[page], intake)
        number = page if len(raws) > 1 else None
        yield Taken(encode_channels(stored), stored.shape[2], number, done)


def _is_plain(data: bytes, max_pixels: int) -> bool:
    """Whether a TIFF is one page of 8-bit colours, which all programs read in the same way."""
    try:
        image: Any = open_with_pillow(data, max_pixels)
        # Pillow reads two channels as gray, and drops the second.
        samples = image.tag_v2.get(_SAMPLES_PER_PIXEL, 1)
        is_whole = samples == len(image.getbands())
        return is_whole and image.n_frames == 1 and image.mode in _PLAIN_MODES
    except BrokenImage as error:
        if error.reason == "too large":
            raise
        return False
    except Exception:  # Pillow raises many types as it looks for further pages
        return False


def _is_deep_png(data: bytes) -> bool:
    return data.startswith(PNG_SIGNATURE) and len(data) > 25 and data[24] == 16


def _deep_png(data: bytes, max_pixels: int) -> Raw:
    """A 16-bit PNG as it is stored: uint16 [H, W, 1 or 3]; transparency is left out."""
    open_with_pillow(data, max_pixels)  # refuses what is too large
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            try:
                found = np.asarray(image)
            except Exception as error:
                raise BrokenImage("corrupt", str(error)) from error
    if found.ndim == 2:
        return Raw(found[:, :, None])
    return Raw(np.ascontiguousarray(found[:, :, 2::-1]))  # from BGR or BGRA


def _windowed(raw: Raw, intake: Intake) -> tuple[np.ndarray, dict[str, Any]]:
    """Map a window of values to uint8 or uint16 [H, W, C]; returns them and a record of the
    mapping.
    """
    values = raw.values
    done: dict[str, Any] = {"from": f"{values.dtype.name} x {values.shape[2]}", **raw.kept}
    if values.dtype == np.uint8 and intake.window is None:
        return values, done
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if finite.size == 0:
        raise BrokenImage("corrupt", "the image has no finite value")
    if intake.window is None and raw.window is not None:
        low, high = raw.window
        done["window"] = [low, high, "the file's"]
    elif intake.by_percentiles:
        shares = intake.window or PERCENTILES
        low, high = (float(value) for value in np.percentile(finite, shares))
        done["window"] = [low, high, f"percentiles {shares[0]:g} {shares[1]:g}"]
    else:
        assert intake.window is not None
        low, high = intake.window
        done["window"] = [low, high, "fixed"]
    if not low < high:
        raise BrokenImage(
            "empty window",
            f"from {low:g} to {high:g} in an image of {finite.min():g} to {finite.max():g}: give "
            "--window and fixed values",
        )
    most = 65535 if intake.keep_depth and values.dtype != np.uint8 else 255
    kind = np.uint16 if most == 65535 else np.uint8
    scaled = np.empty(values.shape, kind)
    for channel in range(values.shape[2]):  # a channel at a time, for memory
        part = values[:, :, channel].astype(np.float32)
        part = np.nan_to_num((part - low) * (most / (high - low)), nan=0.0)
        part = most - part if raw.is_inverted else part
        scaled[:, :, channel] = np.clip(np.rint(part), 0, most).astype(kind)
    done["bits"] = 16 if most == 65535 else 8
    if raw.is_inverted:
        done["inverted"] = True
    return scaled, done
