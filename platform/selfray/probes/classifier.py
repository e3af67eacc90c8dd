"""What every protocol that names classes has in common: it never sees a test label."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selfray.probes.protocol import Protocol

CHUNK_ROWS = 16_384
"""Rows of a gallery that are worked on at a time: features may lie on a disk, not in memory."""


WHOLE = 2**26
"""Up to so many numbers of a gallery are held in memory at once."""


@dataclass(frozen=True)
class Gallery:
    """Features of images whose classes are known: what a protocol learns from."""

    features: Tensor
    """float32 [n, D], or [n, 2D] for a ViT: the class token, then the mean of the patch tokens. It
    may be mapped from a file: take rows of it, not all at once."""
    labels: Tensor
    """int64 [n], in 0..classes-1."""
    keys: np.ndarray
    """uint64 [n]: which image each is, by its bytes."""
    classes: int
    cls_width: int | None = None
    """D, the width of the class token's part; None where the features have no other part."""

    def rows(self, chosen: np.ndarray | Tensor) -> "Gallery":
        index = torch.as_tensor(chosen)
        keys = self.keys[index.numpy()]
        return Gallery(self.features[index], self.labels[index], keys, self.classes, self.cls_width)


class Classified(NamedTuple):
    predicted: Tensor
    """int64 [m]: the class of each test image."""
    chosen: dict[str, Any]
    """Settings that held-out train images decided, by name."""


@dataclass(frozen=True)
class Classifier(Protocol, ABC):
    """A protocol that learns classes from a gallery and names those of other features."""

    @abstractmethod
    def classify(self, train: Gallery, test: Tensor) -> Classified:
        """The classes of test features [m, D or 2D]. Nothing of the test but its features is
        there, so no test label can choose anything."""


@dataclass
class Moments:
    """Mean and standard deviation of features, read in chunks."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(0))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0))

    @classmethod
    def of(cls, features: Tensor, rows: Tensor | None = None) -> "Moments":
        """Of features [n, D], or of some of their rows."""
        width = features.shape[1]
        found = cls(0, torch.zeros(width).double(), torch.zeros(width).double())
        parts = range(0, len(features if rows is None else rows), CHUNK_ROWS)
        for first in parts:
            part = slice(first, first + CHUNK_ROWS)
            values = features[part if rows is None else rows[part]].double()
            found.count += len(values)
            found.total += values.sum(0)
            found.squares += values.square().sum(0)
        return found

    @property
    def mean(self) -> Tensor:
        return (self.total / self.count).float()

    @property
    def std(self) -> Tensor:
        mean = self.total / self.count
        return (self.squares / self.count - mean.square()).clamp(min=0).sqrt().float() + 1e-6
