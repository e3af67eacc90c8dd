"""k nearest neighbours on frozen features: no training, and hardly any settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfray.probes.classifier import Classified, Classifier, Gallery, parts
from selfray.probes.subsets import held_out


@dataclass(frozen=True)
class KNN(Classifier):
    """DINO's protocol (arXiv:2104.14294): each of the k nearest train images, by cosine similarity
    s, votes for its class with weight exp(s / temperature)."""

    name: ClassVar[str] = "knn"
    version: ClassVar[int] = 1

    k: int = 20
    temperature: float = 0.07

    def accuracy(
        self, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
    ) -> float:
        """Share of test images that are classified correctly, 0..1.

        Args:
            train: float [n, D] features of any norm; test: [m, D].
            train_labels: int64 [n], 0-based; test_labels: [m].
        """
        predicted = self.predict(train, train_labels, test)
        return float((predicted == test_labels).float().mean())

    def predict(self, train: Tensor, train_labels: Tensor, test: Tensor) -> Tensor:
        """The predicted class of each test feature: int64 [m]."""
        return votes(train, train_labels, test, (self.k,), self.temperature)[:, 0]

    def classify(self, train: Gallery, test: Tensor) -> Classified:
        width = train.cls_width
        predicted = self.predict(train.features[:, :width], train.labels, test[:, :width])
        return Classified(predicted, {})


@dataclass(frozen=True)
class ChosenKNN(Classifier):
    """KNN with the k that is best on held-out train images; of equal ones the smallest."""

    name: ClassVar[str] = "knn"
    version: ClassVar[int] = 2

    ks: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    held_out: float = 0.1
    """Share of each class's train images kept out to choose k."""
    seed: int = 0

    def classify(self, train: Gallery, test: Tensor) -> Classified:
        cls = train.features[:, : train.cls_width]
        out = held_out(train.keys, train.labels.numpy(), self.held_out, self.seed)
        best = 0
        if out.any():
            kept, chosen = (torch.from_numpy(np.flatnonzero(mask)) for mask in (~out, out))
            found = votes(cls, train.labels, cls, self.ks, self.temperature, kept, chosen)
            best = int((found == train.labels[chosen][:, None]).float().mean(0).argmax())
        k = self.ks[best]
        predicted = votes(cls, train.labels, test[:, : train.cls_width], (k,), self.temperature)
        return Classified(predicted[:, 0], {"k": k})


@torch.no_grad()
def votes(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    ks: Sequence[int],
    temperature: float,
    rows: Tensor | None = None,
    asked: Tensor | None = None,
) -> Tensor:
    """The class that the k nearest train features vote for, for each k in one pass.

    Args:
        train: float [n, D]; labels: int64 [n]; test: float [m, D].
        rows: int64, those of the train features that vote; None takes all.
        asked: int64, those of the test features whose classes are asked; None takes all.

    Returns:
        int64 [m, len(ks)].
    """
    classes = int(labels.max()) + 1
    most = min(max(ks), len(train if rows is None else rows))
    found = []
    for part in parts(test, asked, 1024):
        chunk = test[part]
        unit = F.normalize(chunk.float(), dim=1)
        similarity, index = _nearest(train, unit, most, rows)  # [c, most]
        weight = (similarity / temperature).exp()
        of_neighbours = labels[index]
        for_each = []
        for k in ks:
            scores = torch.zeros(len(chunk), classes, device=chunk.device)
            scores.scatter_add_(1, of_neighbours[:, :k], weight[:, :k])
            for_each.append(scores.argmax(1))
        found.append(torch.stack(for_each, dim=1))
    return torch.cat(found) if found else torch.zeros(0, len(ks), dtype=torch.int64)


def nearest(train: Tensor, test: Tensor, k: int) -> Tensor:
    """Indices int64 [m, k] of the train features [n, D] nearest by cosine to test features [m,
    D]."""
    return _nearest(train, F.normalize(test.float(), dim=1), min(k, len(train)))[1]


def _nearest(
    train: Tensor, unit: Tensor, k: int, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(similarities, indices) [c, k] of the train features, or of those in the given rows, nearest
    to unit vectors [c, D], nearest first; train is read in chunks, and never copied as a whole."""
    best: tuple[Tensor, Tensor] | None = None
    for chosen in parts(train, rows):
        part = F.normalize(train[chosen].float(), dim=1)
        similarity, index = (unit @ part.T).topk(min(k, len(part)), dim=1)
        index = index + chosen.start if isinstance(chosen, slice) else chosen[index]
        if best is not None:
            both = torch.cat([best[0], similarity], 1), torch.cat([best[1], index], 1)
            similarity, place = both[0].topk(min(k, both[0].shape[1]), dim=1)
            index = both[1].gather(1, place)
        best = similarity, index
    assert best is not None
    return best
