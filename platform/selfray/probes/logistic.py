"""Logistic regression by L-BFGS, which suits few labels better than SGD."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfray.probes.classifier import (
    WHOLE,
    Classified,
    Classifier,
    Gallery,
    Moments,
    parts,
)
from selfray.probes.subsets import folds, held_out

FEW = 1_000
"""With at most this many train images, the regularisation is chosen by cross-validation."""


@dataclass(frozen=True)
class Logistic(Classifier):
    """Multinomial logistic regression on standardised features: the mean cross entropy plus
    l2 / 2 |W|^2, minimised by L-BFGS. l2 is chosen on held-out train images, or by cross-validation
    if there are few; the classifier is then fitted to all train images."""

    name: ClassVar[str] = "logistic"
    version: ClassVar[int] = 1

    l2: tuple[float, ...] = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    """From strong to weak: each fit starts from the result of the previous one."""
    without_choice: float = 1e-2
    """l2 if a class has only one image, so that none can be held out."""
    iterations: int = 100
    held_out: float = 0.1
    folds: int = 5
    seed: int = 0

    def classify(self, train: Gallery, test: Tensor) -> Classified:
        moments = Moments.of(train.features)
        # No search if a class has a single image, which cannot be held out.
        l2 = self._choose(train) if int(_smallest(train)) > 1 else self.without_choice
        weights = None
        for strength in (*(s for s in self.l2 if s > l2), l2):
            weights = _fit(train, moments, strength, self.iterations, weights)
        assert weights is not None
        return Classified(_predict(weights, moments, test), {"l2": l2})

    def _choose(self, train: Gallery) -> float:
        labels = train.labels.numpy()
        if len(labels) <= FEW:
            count = min(self.folds, int(_smallest(train)))
            part = folds(train.keys, labels, count, self.seed)
            outs = [part == p for p in range(count)]
        else:
            outs = [held_out(train.keys, labels, self.held_out, self.seed)]
        right = np.zeros(len(self.l2))
        for out in outs:
            kept, chosen = (torch.from_numpy(np.flatnonzero(mask)) for mask in (~out, out))
            moments = Moments.of(train.features, kept)
            # What is larger than the memory is never copied as a whole.
            is_small = train.features.numel() <= WHOLE
            learned, rows = (train.rows(kept), None) if is_small else (train, kept)
            weights = None
            for place, strength in enumerate(self.l2):
                weights = _fit(learned, moments, strength, self.iterations, weights, rows)
                found = _predict(weights, moments, train.features, chosen)
                right[place] += int((found == train.labels[chosen]).sum())
        # argmax takes the first of equal values, which is the strongest.
        return self.l2[int(right.argmax())]


def _smallest(train: Gallery) -> Tensor:
    counts = torch.bincount(train.labels, minlength=train.classes)
    return counts[counts > 0].min()


def _fit(
    train: Gallery,
    moments: Moments,
    l2: float,
    iterations: int,
    start: Tensor | None,
    rows: Tensor | None = None,
) -> Tensor:
    """Fit weights [D + 1, C], bias in the last row, starting from those of another strength, to
    all rows or to the given ones, int64 [k]."""
    n, width = len(train.labels if rows is None else rows), train.features.shape[1]
    weights = torch.zeros(width + 1, train.classes) if start is None else start.clone()
    weights.requires_grad_(True)
    mean, std = moments.mean, moments.std
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe"
    )

    @torch.no_grad()
    def loss() -> Tensor:
        # The gradient of softmax cross entropy in closed form: no autograd over chunks.
        gradient = torch.zeros_like(weights)
        total = torch.zeros(())
        for part in parts(train.features, rows):
            x = (train.features[part].float() - mean) / std
            labels = train.labels[part]
            logits = torch.addmm(weights[-1], x, weights[:-1])  # [c, C]
            total += F.cross_entropy(logits, labels, reduction="sum")
            error = logits.softmax(-1)
            error[torch.arange(len(labels)), labels] -= 1
            gradient[:-1] += x.T @ error
            gradient[-1] += error.sum(0)
        gradient /= n
        gradient[:-1] += l2 * weights[:-1]
        weights.grad = gradient
        return total / n + l2 / 2 * weights[:-1].square().sum()

    optimizer.step(loss)  # type: ignore[arg-type]
    return weights.detach()


def _predict(
    weights: Tensor, moments: Moments, features: Tensor, rows: Tensor | None = None
) -> Tensor:
    found = []
    for part in parts(features, rows):
        x = (features[part].float() - moments.mean) / moments.std
        found.append(torch.addmm(weights[-1], x, weights[:-1]).argmax(-1))
    return torch.cat(found)
