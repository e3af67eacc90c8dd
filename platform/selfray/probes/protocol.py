"""A probe's name, version and settings, which go with its number everywhere."""

from dataclasses import dataclass, fields
from typing import ClassVar

PIXEL_BASELINE_SIZE = 32
"""Side at which raw pixels are judged: at 224 the features of 60,000 images would take 36 GB."""


@dataclass(frozen=True)
class Protocol:
    """A way to judge frozen features. Whatever changes a number changes the version."""

    name: ClassVar[str]
    version: ClassVar[int]

    @property
    def id(self) -> str:
        """Such as knn-v1: what stands beside the number."""
        return f"{self.name}-v{self.version}"

    def __str__(self) -> str:
        settings = ", ".join(f"{f.name} {getattr(self, f.name)}" for f in fields(self))
        return f"{self.id} ({settings})"
