"""Retrieval: whether the nearest neighbours of an image have the same label."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfray.probes.classifier import CHUNK_ROWS, WHOLE, Gallery
from selfray.probes.protocol import Protocol

_CELLS = 2**22
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
        images, width = len(train.features), train.cls_width or train.features.shape[1]
        is_small = images * width <= WHOLE
        unit = _units(train.features[:, :width]) if is_small else None
        count = torch.arange(1, images + 1, dtype=torch.float32)
        precision, hits = [], {k: [] for k in self.ks}
        step = max(1, _CELLS // images)
        for first in range(0, len(test), step):
            queries = _units(test[first : first + step, :width])
            wanted = test_labels[first : first + step, None]
            if unit is not None:
                cosines = queries @ unit.T  # [c, n]
            else:  # the gallery lies in a file and is read in parts
                parts = train.features.split(CHUNK_ROWS)
                cosines = torch.cat([queries @ _units(p[:, :width]).T for p in parts], dim=1)
            order = cosines.argsort(dim=1, descending=True, stable=True)  # [c, n]
            relevant = (train.labels[order] == wanted).float()
            so_far = relevant.cumsum(1)
            total = so_far[:, -1]
            summed = (so_far / count * relevant).sum(1)
            precision.append(torch.where(total > 0, summed / total.clamp(min=1), summed))
            for k in self.ks:
                hits[k].append((relevant[:, :k].sum(1) > 0).float())
        return Retrieved(torch.cat(precision), {k: torch.cat(v) for k, v in hits.items()})


def _units(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1)
