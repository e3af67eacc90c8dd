"""The values of an image as in its file, before a window maps them to the stored depth."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Raw:
    values: np.ndarray
    """[H, W, C], integers or floats of any size."""
    window: tuple[float, float] | None = None
    """The values of black and white, if the file gives them."""
    is_inverted: bool = False
    """Whether low values are bright (DICOM's MONOCHROME1)."""
    kept: dict[str, Any] = field(default_factory=dict)
    """Further properties for the manifest, such as a modality."""
