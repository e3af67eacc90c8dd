"""Converts users' image files to what shards store: 8-bit images of 1 to 16 channels.

Files that all decoders read in the same way are kept byte for byte. Deep images (16 bits, signed or
float values, DICOM), multispectral images and files of several pages are converted: a window of
values is mapped to 0..255, or to 0..65535 to keep the depth. The manifest records the conversion.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from selfray.pixels.codecs import encode_channels
from selfray.pixels.deep import Intake, raws_of, windowed
from selfray.pixels.limits import MAX_PIXELS, BrokenImage
from selfray.views import RGB


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

    @property
    def described(self) -> str:
        """What was done to it, in words that are the same for all images that it was done to."""
        if not self.done:
            return ""
        window, modality = self.done.get("window"), self.done.get("modality")
        by = f", window of {window[2]}" if window and window[2] != "fixed" else ""
        by = f", window {window[0]:g} {window[1]:g}" if window and not by else by
        return (
            (f"{modality} " if modality else "")
            + f"{self.done['from']} -> {self.done.get('bits', 8)} bits{by}"
            + (", inverted" if self.done.get("inverted") else "")
        )


def take(
    data: bytes,
    intake: Intake,
    max_pixels: int = MAX_PIXELS,
    max_side: int | None = None,
    on_broken: Callable[[int, BrokenImage], None] | None = None,
) -> Iterator[Taken]:
    """The images of a file, shrunk to `max_side` if they are converted. Raises BrokenImage; a page
    of several that cannot be used is told to `on_broken`, if that is given."""
    raws = raws_of(data, max_pixels)
    if raws is None:
        yield Taken(data, RGB)
        return
    if intake.page is not None and intake.page >= len(raws):
        raise BrokenImage("unsupported", f"page {intake.page} of a file that has {len(raws)}")
    pages = range(len(raws)) if intake.page is None else (intake.page,)
    for page in pages:
        try:
            stored, done = windowed(raws[page], intake)
        except BrokenImage as error:
            if len(raws) == 1 or on_broken is None:
                raise
            on_broken(page, error)
            continue
        if max_side is not None:
            stored = _shrunk(stored, max_side)
        number = page if len(raws) > 1 else None
        yield Taken(encode_channels(stored), stored.shape[2], number, done)


def _shrunk(values: np.ndarray, max_side: int) -> np.ndarray:
    """[H, W, C] with its longer side at most max_side pixels."""
    height, width, channels = values.shape
    factor = max_side / max(height, width)
    if factor >= 1:
        return values
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    parts = [  # OpenCV shrinks at most four channels at once
        cv2.resize(values[:, :, first : first + 4], size, interpolation=cv2.INTER_AREA)
        for first in range(0, channels, 4)
    ]
    return np.dstack(parts).reshape(size[1], size[0], channels)
