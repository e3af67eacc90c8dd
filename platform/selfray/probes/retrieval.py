"""Retrieval: whether the nearest neighbours of an image have the same label."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfray.probes.classifier import Gallery
from selfray.probes.protocol import Protocol

_CELLS = 2**24
"""Largest number of similarities held at a time."""


class Retrieved(NamedTuple):
    average_precision: Tensor
    """float [m]: average precision of each test image's ranking of all train images; 0 if none is
    relevant."""
    found_at: dict[int, Tensor]
    """For each k, float [m]: 1 if one of the k nearest is relevant, else 0."""


@dataclass(frozen=True)
class Retrieval(Protocol):
    """Each test image ranks the train images by cosine similarity of class tokens; images with its
    label are relevant. mAP is the mean over test images of the average precision of the whole
    ranking; recall@k is the share of test images with a relevant image among the k nearest."""

    name: ClassVar[str] = "retrieval"
    version: ClassVar[int] = 1

    ks: tuple[int, ...] = (1, 5, 10)

    @torch.no_grad()
    def rank(self, train: Gallery, test: Tensor, test_labels: Tensor) -> Retrieved:
        """Rank the gallery for each test feature [m, D or 2D] with labels int64 [m]."""
        unit = F.normalize(train.features[:, : train.cls_width].float(), dim=1)
        count = torch.arange(1, len(unit) + 1, dtype=torch.float32)
        precision, hits = [], {k: [] for k in self.ks}
        step = max(1, _CELLS // len(unit))
        for first in range(0, len(test), step):
            queries = F.normalize(test[first : first + step, : train.cls_width].float(), dim=1)
            wanted = test_labels[first : first + step, None]
            order = (queries @ unit.T).argsort(dim=1, descending=True, stable=True)  # [c, n]
            relevant = (train.labels[order] == wanted).float()
            so_far = relevant.cumsum(1)
            total = so_far[:, -1]
            summed = (so_far / count * relevant).sum(1)
            precision.append(torch.where(total > 0, summed / total.clamp(min=1), summed))
            for k in self.ks:
                hits[k].append((relevant[:, :k].sum(1) > 0).float())
        return Retrieved(torch.cat(precision), {k: torch.cat(v) for k, v in hits.items()})
