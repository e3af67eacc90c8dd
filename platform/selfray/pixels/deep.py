"""Deep and multispectral files to values that can be stored: pages, windows, 8 or 16 bits.

Both `selfray shards build` and the decoder read such files by this, so that they agree.
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
"""At most so many values of an image give its percentiles."""
_VALUES_AT_A_TIME = 1 << 20
"""Values that are mapped at a time, for memory."""
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
        """The percentiles of a window that is given by them."""
        return self.window or PERCENTILES


def raws_of(
    data: bytes, max_pixels: int = MAX_PIXELS, first_only: bool = False
) -> list[Raw] | None:
    """The pages of a file that has to be converted, or its first one; None for what every decoder
    reads alike. BrokenImage."""
    if dicom.is_dicom(data):
        return dicom.frames_of(data, max_pixels)
    if tiff.is_tiff(data) and not _is_plain(data, max_pixels):
        pages = tiff.pages_of(data, max_pixels, (0,) if first_only else None)
        return [Raw(values, "TIFF") for values in pages]
    return [_deep_png(data, max_pixels)] if _is_deep_png(data) else None


def windowed(raw: Raw, intake: Intake) -> tuple[np.ndarray, dict[str, Any]]:
    """The values of a window as uint8 or uint16 [H, W, C], and what was done."""
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
    """The finite ones of an image's values, evenly chosen ones of a large image. BrokenImage where
    there is none."""
    some = values.reshape(-1)[:: values.size // _VALUES_OF_A_WINDOW + 1]
    some = some[np.isfinite(some)] if some.dtype.kind == "f" else some
    if some.size == 0:
        raise BrokenImage("corrupt", "the image has no finite value")
    return some


class ValueCounts:
    """How often each value occurs among deep images, for percentiles of all of them together.

    A value is kept by the 20 highest bits of its float32: to one part in 2,048, whole numbers up to
    that exactly.
    """

    _SHIFT = 12

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, values: np.ndarray) -> None:
        """Values of any kind but uint8, which need no window."""
        if values.dtype == np.uint8:
            return
        with contextlib.suppress(BrokenImage):
            found, counts = np.unique(finite_values(values), return_counts=True)
            self.add_pairs(self._codes(found.astype(np.float32)), counts)

    def add_pairs(self, codes: np.ndarray, counts: np.ndarray) -> None:
        """What another one's `pairs` told."""
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            self._counts[code] = self._counts.get(code, 0) + count

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(codes int64 [n] in the order of their values, counts int64 [n])."""
        codes = np.array(sorted(self._counts), np.int64)
        return codes, np.array([self._counts[code] for code in codes.tolist()], np.int64)

    def window(self, shares: tuple[float, float]) -> tuple[float, float] | None:
        """The values at two percentiles; None where there is no value."""
        codes, counts = self.pairs()
        if not len(codes):
            return None
        reached = np.cumsum(counts) / counts.sum() * 100
        places = np.searchsorted(reached, shares).clip(max=len(codes) - 1)
        low, high = self._values(codes[places]).tolist()
        return low, high

    def _codes(self, values: np.ndarray) -> np.ndarray:
        # The bits of a float in the order of their values: negative ones run backwards.
        bits = values.view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits) >> self._SHIFT

    def _values(self, codes: np.ndarray) -> np.ndarray:
        bits = codes << self._SHIFT
        magnitudes = np.abs(bits).astype(np.int32).view(np.float32)
        return np.where(bits < 0, -magnitudes, magnitudes)


def _is_plain(data: bytes, max_pixels: int) -> bool:
    """Whether Pillow reads a TIFF as every program does: one page of 8-bit colours."""
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
    is_deep = data.startswith(PNG_SIGNATURE) and len(data) > 25 and data[24] == 16
    return is_deep and not data.startswith(OWN_PNG, 37)  # whose window was applied before


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
        return Raw(found[:, :, None], "PNG")
    return Raw(np.ascontiguousarray(found[:, :, 2::-1]), "PNG")  # from BGR or BGRA
