"""An image's values as its file has them, before a window maps them to what is stored."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Raw:
    values: np.ndarray
    """[H, W, C] of any integers or floats."""
    format: str
    """Such as PNG, TIFF or DICOM."""
    window: tuple[float, float] | None = None
    """The values that the file itself calls black and white."""
    is_inverted: bool = False
    """Whether low values are bright (DICOM's MONOCHROME1)."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What else the manifest keeps of it, such as a modality."""
