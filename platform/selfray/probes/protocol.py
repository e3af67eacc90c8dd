"""A protocol's name, version and settings, which accompany its number everywhere."""

from dataclasses import dataclass, fields
from typing import ClassVar

PIXEL_BASELINE_SIZE = 32
"""Image side for the raw-pixel baseline: at 224 the features of 60,000 images would take 36 GB."""


@dataclass(frozen=True)
class Protocol:
    """A way to judge frozen features. Every change that alters numbers raises the version."""

    name: ClassVar[str]
    version: ClassVar[int]

    @property
    def id(self) -> str:
        """Name and version, such as knn-v1; shown beside the number."""
        return f"{self.name}-v{self.version}"

    def __str__(self) -> str:
        settings = ", ".join(f"{f.name} {getattr(self, f.name)}" for f in fields(self))
        return f"{self.id} ({settings})"
