"""The base of all protocols that predict classes: they never see a test label."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selfray.probes.protocol import Protocol

CHUNK_ROWS = 16_384
"""Rows of a gallery processed at a time: features may lie on disk, not in memory."""


WHOLE = 2**26
"""Largest gallery, in numbers, that is held in memory at once."""


def parts(
    features: Tensor, rows: Tensor | None = None, size: int | None = None
) -> Iterator[slice | Tensor]:
    """Indices of chunks of features [n, D], or of the given rows, int64 [k], of them: what is
    larger than the memory is never copied as a whole. A chunk has CHUNK_ROWS rows by default."""
    size = size or CHUNK_ROWS
    for first in range(0, len(features if rows is None else rows), size):
        part = slice(first, first + size)
        yield part if rows is None else rows[part]


@dataclass(frozen=True)
class Gallery:
    """Features of images with known classes, from which a protocol learns."""

    features: Tensor
    """float32 [n, D], or [n, 2D] for a ViT: the class token, then the mean of the patch tokens.
    They may be memory-mapped from a file: read them in chunks."""
    labels: Tensor
    """int64 [n], in 0..classes-1."""
    keys: np.ndarray
    """uint64 [n]: a hash of each image's bytes."""
    classes: int
    cls_width: int | None = None
    """D, the width of the class token's part; None if the features have only that part."""

    def rows(self, chosen: np.ndarray | Tensor) -> "Gallery":
        index = torch.as_tensor(chosen)
        keys = self.keys[index.numpy()]
        return Gallery(self.features[index], self.labels[index], keys, self.classes, self.cls_width)


class Classified(NamedTuple):
    predicted: Tensor
    """int64 [m]: the class of each test image."""
    chosen: dict[str, Any]
    """Settings that were chosen on held-out train images, by name."""


@dataclass(frozen=True)
class Classifier(Protocol, ABC):
    """A protocol that learns classes from a gallery and predicts those of other features."""

    @abstractmethod
    def classify(self, train: Gallery, test: Tensor) -> Classified:
        """Predict the classes of test features float [m, D or 2D]. The method gets no test labels,
        so they cannot influence any choice."""


@dataclass
class Moments:
    """Mean and standard deviation of each feature, float32 [D], computed in chunks."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(0))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0))

    @classmethod
    def of(cls, features: Tensor, rows: Tensor | None = None) -> "Moments":
        """The moments of features [n, D], or of the given rows, int64 [k], of them."""
        width = features.shape[1]
        found = cls(0, torch.zeros(width).double(), torch.zeros(width).double())
        for part in parts(features, rows):
            values = features[part].double()
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
