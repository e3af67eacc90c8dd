"""k nearest neighbours on frozen features: no training, so nothing to tune."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from selfray.probes.protocol import Protocol


@dataclass(frozen=True)
class KNN(Protocol):
    """DINO's protocol (arXiv:2104.14294): cosine similarity s, each of the k nearest train images
    votes for its class with weight exp(s / temperature)."""

    name: ClassVar[str] = "knn"
    version: ClassVar[int] = 1

    k: int = 20
    temperature: float = 0.07

    def accuracy(
        self, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
    ) -> float:
        """Share of test images whose class is found, 0..1.

        Args:
            train: float [n, D] features, any length; test: [m, D].
            train_labels: int64 [n], 0-based; test_labels: [m].
        """
        predicted = self.predict(train, train_labels, test)
        return float((predicted == test_labels).float().mean())

    @torch.no_grad()
    def predict(self, train: Tensor, train_labels: Tensor, test: Tensor) -> Tensor:
        """The class of each test feature: int64 [m]."""
        train = F.normalize(train.float(), dim=1)
        classes = int(train_labels.max()) + 1
        k = min(self.k, len(train))
        votes = []
        for chunk in F.normalize(test.float(), dim=1).split(1024):
            similarity, index = (chunk @ train.T).topk(k, dim=1)  # [c, k]
            weight = (similarity / self.temperature).exp()
            scores = torch.zeros(len(chunk), classes, device=chunk.device)
            votes.append(scores.scatter_add_(1, train_labels[index], weight).argmax(1))
        return torch.cat(votes)


def nearest(train: Tensor, test: Tensor, k: int) -> Tensor:
    """Indices int64 [m, k] of the train features most similar (cosine) to each test feature."""
    similarity = F.normalize(test.float(), dim=1) @ F.normalize(train.float(), dim=1).T
    return similarity.topk(min(k, len(train)), dim=1).indices
