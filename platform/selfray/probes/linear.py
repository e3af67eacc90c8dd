"""A linear classifier on frozen features, trained with several learning rates in one pass."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfray.probes.classifier import (
    CHUNK_ROWS,
    WHOLE,
    Classified,
    Classifier,
    Gallery,
    Moments,
)


class LinearResult(NamedTuple):
    accuracy: float
    """On the test images, 0..1."""
    learning_rate: float
    """The learning rate that was best on held-out train images."""
    held_out_accuracy: float


@dataclass(frozen=True)
class Linear(Classifier):
    """Softmax regression by SGD (momentum 0.9, cosine to 0, no weight decay) on standardised
    features; the learning rate is chosen on held-out train images, never on test."""

    name: ClassVar[str] = "linear"
    version: ClassVar[int] = 1

    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    steps: int = 2000
    batch_size: int = 256
    held_out: float = 0.1
    """Share of the train images held out to choose the learning rate."""
    seed: int = 0

    def accuracy(
        self, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
    ) -> float:
        """Accuracy on test, 0..1. Features float [n, D] and [m, D], labels int64 [n] and [m]."""
        return self.evaluate(train, train_labels, test, test_labels).accuracy

    def evaluate(
        self, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
    ) -> LinearResult:
        classes = int(max(train_labels.max(), test_labels.max())) + 1
        predicted, rate, held_out = self._predict(train, train_labels, test, classes)
        accuracy = float((predicted == test_labels).float().mean())
        return LinearResult(accuracy, rate, held_out)

    def classify(self, train: Gallery, test: Tensor) -> Classified:
        predicted, rate, held_out = self._predict(train.features, train.labels, test, train.classes)
        chosen = {"learning_rate": rate, "held_out_accuracy": held_out}
        return Classified(predicted, chosen)

    def _predict(
        self, train: Tensor, train_labels: Tensor, test: Tensor, classes: int
    ) -> tuple[Tensor, float, float]:
        """(classes of test int64 [m], learning rate, its held-out accuracy)."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(train), generator=generator)
        held = max(1, int(len(train) * self.held_out))
        held_out, kept = order[:held], order[held:]
        standard = Standard.of(train, kept)
        weights = self._fit(train, kept, standard, train_labels, classes, generator)
        rates = len(self.learning_rates)
        on_held_out = _predictions(weights, standard, train, held_out, rates)  # [h, R]
        accuracy = (on_held_out == train_labels[held_out][:, None]).float().mean(0)
        best = int(accuracy.argmax())
        every = torch.arange(len(test))
        predicted = _predictions(weights, standard, test, every, rates)[:, best]
        return predicted, self.learning_rates[best], float(accuracy[best])

    def _fit(
        self,
        features: Tensor,
        kept: Tensor,
        standard: "Standard",
        labels: Tensor,
        classes: int,
        generator: torch.Generator,
    ) -> list[Tensor]:
        """Train one classifier for each of R learning rates: weights [D, R * C], biases [R * C].

        Batches are read one by one: features may lie in a file that is larger than the memory.
        """
        rates = torch.tensor(self.learning_rates).repeat_interleave(classes)  # [R * C]
        columns = len(rates)
        parameters = [torch.zeros(features.shape[1], columns), torch.zeros(columns)]
        velocities = [torch.zeros_like(p) for p in parameters]
        batch = min(self.batch_size, len(kept))
        order = torch.empty(0, dtype=torch.int64)
        for step in range(self.steps):
            if len(order) < batch:
                order = torch.randperm(len(kept), generator=generator)
            chosen, order = kept[order[:batch]], order[batch:]
            x = standard(features[chosen])
            wanted = F.one_hot(labels[chosen], classes).float()[:, None] / batch  # [b, 1, C]
            # The gradient of softmax cross entropy in closed form: one matrix product for all
            # learning rates, without autograd.
            logits = torch.addmm(parameters[1], x, parameters[0]).unflatten(1, (-1, classes))
            error = logits.softmax(-1).div_(batch).sub_(wanted).flatten(1)  # [b, R * C]
            rate = rates * (0.5 * (1 + math.cos(math.pi * step / self.steps)))
            for parameter, velocity, gradient in zip(
                parameters, velocities, [x.T @ error, error.sum(0)], strict=True
            ):
                velocity.mul_(0.9).add_(gradient)
                parameter.addcmul_(rate, velocity, value=-1)
        return parameters


@dataclass(frozen=True)
class Standard:
    """Mean 0 and deviation 1 for each feature."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, features: Tensor, rows: Tensor) -> "Standard":
        """By some rows of features [n, D]."""
        if len(rows) * features.shape[1] <= WHOLE:
            chosen = features[rows].float()
            return cls(chosen.mean(0), chosen.std(0, correction=0) + 1e-6)
        moments = Moments.of(features, rows.sort().values)
        return cls(moments.mean, moments.std)

    def __call__(self, features: Tensor) -> Tensor:
        return (features.float() - self.mean) / self.std


def _predictions(
    parameters: list[Tensor], standard: Standard, features: Tensor, rows: Tensor, rates: int
) -> Tensor:
    """int64 [n, R]: the class of some rows of the features by the classifiers of R learning
    rates."""
    found = []
    for chosen in rows.split(CHUNK_ROWS):
        logits = torch.addmm(parameters[1], standard(features[chosen]), parameters[0])
        found.append(logits.unflatten(1, (rates, -1)).argmax(-1))
    return torch.cat(found)
