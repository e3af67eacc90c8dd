"""Converts deep and multispectral image files to 8 or 16 bits: pages, channels and windows.

`selfray shards build` and the decoder both use this module, so that they agree.
"""

import contextlib
import io
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

from selfray.check import require
from selfray.pixels import dicom, tiff
from selfray.pixels.headers import OWN_PNG, PNG_SIGNATURE
from selfray.pixels.limits import MAX_PIXELS, BrokenImage
from selfray.pixels.other_formats import open_with_pillow
from selfray.pixels.raw import Raw

PERCENTILES = (0.5, 99.5)
"""The window of deep images if neither the user nor the file gives one."""
_VALUES_OF_A_WINDOW = 1 << 24
"""Largest number of values of an image from which percentiles are computed."""
_VALUES_AT_A_TIME = 1 << 20
"""Number of values mapped at a time, to bound the memory."""
_SAMPLES_PER_PIXEL = 277
_PLAIN_MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr")


WindowOf = Literal["image", "set", "fixed"]


@dataclass(frozen=True)
class Intake:
    """How image files are converted for storage."""

    window: tuple[float, float] | None = None
    """The values that become black and white: percentiles such as 0.5 99.5, or fixed values such as
    -1000 400. None takes a DICOM's own window, and percentiles 0.5 99.5 for other images of more
    than 8 bits."""
    window_of: WindowOf | None = None
    """The meaning of `window`: percentiles of each image (image), percentiles over all images
    (set) or values (fixed). None takes two numbers within 0..100 as percentiles of each
    image and others as values."""
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

    @property
    def shares(self) -> tuple[float, float]:
        """The two percentiles, if the window is given by percentiles."""
        return self.window or PERCENTILES


def raws_of(
    data: bytes, max_pixels: int = MAX_PIXELS, first_only: bool = False
) -> list[Raw] | None:
    """The pages of a file that must be converted (with `first_only`, the first page); None for
    files that every decoder reads alike. Raises BrokenImage."""
    if dicom.is_dicom(data):
        return dicom.frames_of(data, max_pixels)
    if tiff.is_tiff(data) and not _is_plain(data, max_pixels):
        pages = tiff.pages_of(data, max_pixels, (0,) if first_only else None)
        return [Raw(values, "TIFF") for values in pages]
    return [_deep_png(data, max_pixels)] if _is_deep_png(data) else None


def windowed(raw: Raw, intake: Intake) -> tuple[np.ndarray, dict[str, Any]]:
    """Map the values of a window to uint8 or uint16, [H, W, C]. Returns (pixels, the conversion,
    for the manifest). Raises BrokenImage for an empty window."""
    values = raw.values
    done: dict[str, Any] = {"from": f"{values.dtype.name} x {values.shape[2]}", **raw.kept}
    if values.dtype == np.uint8 and intake.window is None:
        return values, done
    some = finite_values(values)
    if intake.window is None and raw.window is not None:
        low, high = raw.window
        done["window"] = [low, high, "the file's"]
    elif intake.by_percentiles:
        low, high = (float(value) for value in np.percentile(some, intake.shares))
        done["window"] = [low, high, "percentiles {:g} {:g}".format(*intake.shares)]
    else:
        assert intake.window is not None
        low, high = intake.window
        done["window"] = [low, high, "fixed"]
    if not low < high:
        raise BrokenImage(
            "empty window",
            f"from {low:g} to {high:g} in an image of {some.min():g} to {some.max():g}: give "
            "--window and fixed values",
        )
    most = 65535 if intake.keep_depth and values.dtype != np.uint8 else 255
    kind = np.uint16 if most == 65535 else np.uint8
    scaled = np.empty(values.shape, kind)
    rows = max(1, _VALUES_AT_A_TIME // (values.shape[1] * values.shape[2]))
    for top in range(0, len(values), rows):
        part = values[top : top + rows].astype(np.float32)
        part = np.nan_to_num((part - low) * (most / (high - low)), nan=0.0)
        part = most - part if raw.is_inverted else part
        scaled[top : top + rows] = np.clip(np.rint(part), 0, most).astype(kind)
    done["bits"] = 16 if most == 65535 else 8
    if raw.is_inverted:
        done["inverted"] = True
    return scaled, done


def finite_values(values: np.ndarray) -> np.ndarray:
    """The finite values of an image; of a large image, an evenly spaced part. Raises BrokenImage if
    there are none."""
    some = values.reshape(-1)[:: values.size // _VALUES_OF_A_WINDOW + 1]
    some = some[np.isfinite(some)] if some.dtype.kind == "f" else some
    if some.size == 0:
        raise BrokenImage("corrupt", "the image has no finite value")
    return some


class ValueCounts:
    """Counts the values of deep images, for percentiles over all images.

    Values are rounded to the 20 highest bits of a float32: to one part in 2,048. Integers up to
    2,048 are exact.
    """

    _SHIFT = 12

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, values: np.ndarray) -> None:
        """Add an image's values of any dtype. uint8 values are ignored: they need no window."""
        if values.dtype == np.uint8:
            return
        with contextlib.suppress(BrokenImage):
            found, counts = np.unique(finite_values(values), return_counts=True)
            self.add_pairs(self._codes(found.astype(np.float32)), counts)

    def add_pairs(self, codes: np.ndarray, counts: np.ndarray) -> None:
        """Add the `pairs` of another ValueCounts: codes int64 [n], counts int64 [n]."""
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            self._counts[code] = self._counts.get(code, 0) + count

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(codes int64 [n] in the order of their values, counts int64 [n])."""
        codes = np.array(sorted(self._counts), np.int64)
        return codes, np.array([self._counts[code] for code in codes.tolist()], np.int64)

    def window(self, shares: tuple[float, float]) -> tuple[float, float] | None:
        """The values at two percentiles; None without any value."""
        codes, counts = self.pairs()
        if not len(codes):
            return None
        reached = np.cumsum(counts) / counts.sum() * 100
        places = np.searchsorted(reached, shares).clip(max=len(codes) - 1)
        low, high = self._values(codes[places]).tolist()
        return low, high

    def _codes(self, values: np.ndarray) -> np.ndarray:
        # Integers in the order of the floats: the bits of negative floats sort backwards.
        bits = values.view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits) >> self._SHIFT

    def _values(self, codes: np.ndarray) -> np.ndarray:
        bits = codes << self._SHIFT
        magnitudes = np.abs(bits).astype(np.int32).view(np.float32)
        return np.where(bits < 0, -magnitudes, magnitudes)


def _is_plain(data: bytes, max_pixels: int) -> bool:
    """Whether a TIFF is one page of 8-bit colours, which Pillow reads like other programs."""
    try:
        image: Any = open_with_pillow(data, max_pixels)
        # Pillow reads two channels as gray and drops the second.
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
    is_deep = data.startswith(PNG_SIGNATURE) and len(data) > 25 and data[24] == 16
    return is_deep and not data.startswith(OWN_PNG, 37)  # our own file: its window has been applied


def _deep_png(data: bytes, max_pixels: int) -> Raw:
    """The stored values of a 16-bit PNG, uint16 [H, W, 1 or 3], without transparency."""
    open_with_pillow(data, max_pixels)  # raises for too large images
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            try:
                found = np.asarray(image)
            except Exception as error:
                raise BrokenImage("corrupt", str(error)) from error
    if found.ndim == 2:
        return Raw(found[:, :, None], "PNG")
    return Raw(np.ascontiguousarray(found[:, :, 2::-1]), "PNG")  # from BGR or BGRA
