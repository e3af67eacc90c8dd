"""DICOM files to values, by pydicom: `pip install 'selfray[dicom]'` brings it and its decoders.

Of a DICOM's tags only size, depth and modality are kept, because others may identify patients.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from selfray.pixels.limits import BrokenImage, require_size
from selfray.pixels.raw import Raw


def is_dicom(data: bytes) -> bool:
    return data[128:132] == b"DICM"


def frames_of(data: bytes, max_pixels: int) -> list[Raw]:
    """The frames of a DICOM file, rescaled to its units such as Hounsfield units. Raises
    BrokenImage for bad files and for more than `max_pixels` pixels."""
    pydicom = _pydicom()
    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
    except Exception as error:  # pydicom raises many types on hostile bytes
        raise BrokenImage("corrupt", str(error) or type(error).__name__) from error
    if "PixelData" not in dataset:
        raise BrokenImage("not an image", "the DICOM has no pixels")
    try:
        return _frames(pydicom, dataset, max_pixels)
    except BrokenImage:
        raise
    except MemoryError as error:
        raise BrokenImage("too large", "the DICOM needs more memory than is available") from error
    except Exception as error:
        raise BrokenImage("corrupt", str(error).splitlines()[0] if str(error) else "") from error


def _frames(pydicom: Any, dataset: Any, max_pixels: int) -> list[Raw]:
    count = int(dataset.get("NumberOfFrames", 1) or 1)
    samples = int(dataset.get("SamplesPerPixel", 1))
    depth = 4 * samples * max(1, int(dataset.BitsAllocated) // 8)
    require_size(int(dataset.Columns), int(dataset.Rows) * count, max_pixels, "DICOM", b"", depth)
    pixels = np.asarray(dataset.pixel_array)
    pixels = pixels if count > 1 else pixels[None]
    kind = str(dataset.PhotometricInterpretation)
    kept = {"bits_stored": int(dataset.BitsStored), "modality": str(dataset.get("Modality", ""))}
    if kind == "PALETTE COLOR":
        pixels = pydicom.pixels.apply_color_lut(pixels, dataset)
    if pixels.ndim == 4:  # pydicom gives RGB for YBR
        return [Raw(frame, kept=kept) for frame in pixels]
    slope = float(dataset.get("RescaleSlope", 1) or 1)
    intercept = float(dataset.get("RescaleIntercept", 0) or 0)
    values = pixels if (slope, intercept) == (1, 0) else pixels * np.float32(slope) + intercept
    window = _window(dataset)
    is_inverted = kind == "MONOCHROME1"
    return [Raw(frame[:, :, None], window, is_inverted, kept) for frame in values]


def _window(dataset: Any) -> tuple[float, float] | None:
    """(lowest, highest) value of a DICOM's first window; None if it has no valid one."""
    found = [dataset.get(name) for name in ("WindowCenter", "WindowWidth")]
    first = [
        value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value
        for value in found
    ]
    try:
        centre, width = (float(value) for value in first)
    except (TypeError, ValueError):
        return None
    return (centre - width / 2, centre + width / 2) if width > 1 else None


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError:
        raise BrokenImage(
            "unsupported", "reading DICOM needs pydicom: pip install 'selfray[dicom]'"
        ) from None
    return pydicom
