"""Numbers of an evaluation, with interval, protocol and the scores behind them; and comparisons."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from selfray.probes.classifier import Classifier, Gallery
from selfray.probes.intervals import (
    Interval,
    difference,
    interval,
    overlap_difference,
    overlap_interval,
)
from selfray.probes.retrieval import Retrieval

UNEVEN = 1.5
"""Balanced accuracy is shown if the largest class has more than this many times the test images of
the smallest."""


@dataclass(frozen=True)
class Judgement:
    """The result of one protocol for one encoder on one data set."""

    key: str
    """The protocol's short name, such as `knn` or `low-shot-1%`."""
    protocol: str
    """Its name, version and settings."""
    metric: str
    """accuracy, mAP, Jaccard or mIoU."""
    scores: np.ndarray
    """float64 [S, m], by subset of the labels (S = 1 if all are used) and test image; or
    [m, C, 2] for mIoU, see `overlap_interval`."""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """Settings that were chosen on held-out train images."""
    more: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by name."""
    predicted: np.ndarray | None = None
    """int64 [m]: the predicted class of each test image; None if there is no single prediction."""
    seconds: float = 0.0

    @property
    def interval(self) -> Interval:
        return interval(self.scores) if self.scores.ndim == 2 else overlap_interval(self.scores)

    def against(self, other: "Judgement") -> Interval:
        """This value minus another's on the same test images, with its interval."""
        paired = difference if self.scores.ndim == 2 else overlap_difference
        return paired(self.scores, other.scores)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON, so that a later start reads the file instead of computing again."""
        return {
            "key": self.key,
            "protocol": self.protocol,
            "metric": self.metric,
            "scores": self.scores.tolist(),
            "chosen": dict(self.chosen),
            "more": dict(self.more),
            "predicted": None if self.predicted is None else self.predicted.tolist(),
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Judgement":
        predicted = value["predicted"]
        return cls(
            **{
                **value,
                "scores": np.array(value["scores"], np.float64),
                "predicted": None if predicted is None else np.array(predicted, np.int64),
            }
        )

    def numbers(self) -> dict[str, float]:
        """All logged numbers by name; the value itself has the empty name."""
        found = self.interval
        return {"": found.value, "low": found.low, "high": found.high, **self.more}


def classified(key: str, protocol: Classifier, train: Gallery, test: Gallery) -> Judgement:
    """Accuracy of a classifier. Only here are its predictions compared with test labels."""
    predicted, chosen = protocol.classify(train, test.features)
    return of_predictions(key, str(protocol), predicted.numpy(), test.labels.numpy(), chosen)


def of_predictions(
    key: str,
    protocol: str,
    predicted: np.ndarray,
    labels: np.ndarray,
    chosen: Mapping[str, Any] | None = None,
) -> Judgement:
    """Accuracy of predictions int64 [m], or [S, m] for S subsets of the labels, against labels
    int64 [m]."""
    each = np.atleast_2d(predicted)
    scores = (each == labels).astype(np.float64)
    more = {"balanced": float(np.mean([balanced_accuracy(p, labels) for p in each]))}
    alone = each[0] if len(each) == 1 else None
    return Judgement(key, protocol, "accuracy", scores, chosen or {}, more, alone)


def retrieved(key: str, protocol: Retrieval, train: Gallery, test: Gallery) -> Judgement:
    precision, found_at = protocol.rank(train, test.features, test.labels)
    more = {f"recall_at_{k}": float(hits.mean()) for k, hits in found_at.items()}
    return Judgement(key, str(protocol), "mAP", precision.double().numpy()[None], {}, more)


def accuracy_by_class(predicted: np.ndarray, labels: np.ndarray) -> dict[int, float]:
    """The share of each class's test images that are classified correctly."""
    return {int(c): float((predicted[labels == c] == c).mean()) for c in np.unique(labels)}


def balanced_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The mean over classes of `accuracy_by_class`."""
    return float(np.mean(list(accuracy_by_class(predicted, labels).values())))


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """int64 [C, C]: the number of test images of each class (row) predicted as each class (column).
    Test images of classes without train images are left out."""
    known = labels < classes
    cells = labels[known] * classes + predicted[known]
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def is_uneven(labels: np.ndarray) -> bool:
    counts = np.unique(labels, return_counts=True)[1]
    return bool(counts.max() > UNEVEN * counts.min())


def verdicts(by_encoder: Mapping[str, Sequence[Judgement]], images: int) -> Iterator[str]:
    """One sentence for each protocol: by how much its best encoder differs from each other one, and
    whether that may be chance (paired bootstrap)."""
    if len(by_encoder) < 2:
        return
    keys = list(dict.fromkeys(j.key for found in by_encoder.values() for j in found))
    for key in keys:
        found = {
            name: judgement
            for name, judgements in by_encoder.items()
            for judgement in judgements
            if judgement.key == key
        }
        if len(found) > 1:
            yield f"{key}: {_sentence(found, images)}"


def _sentence(found: Mapping[str, Judgement], images: int) -> str:
    best = max(found, key=lambda name: found[name].interval.value)
    beaten, equal = [], []
    for name, judgement in found.items():
        if name == best:
            continue
        gap = found[best].against(judgement)
        if gap.excludes_zero:
            beaten.append(
                f"{name} by {100 * gap.value:.1f} points "
                f"[{100 * gap.low:.1f}, {100 * gap.high:.1f}]"
            )
        else:
            equal.append(name)
    parts = []
    if beaten:
        parts.append(f"{best} is better than {' and '.join(beaten)}")
    if equal:
        parts.append(
            f"{images:,} images show no difference between {best} and {' or '.join(equal)}"
        )
    return "; ".join(parts)


def mean_ranks(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean over columns of each encoder's rank; 1 is best, equal values share a rank.

    Args:
        values: for each encoder, one value per column; higher is better.
    """
    table = torch.tensor(list(values.values()), dtype=torch.float64)  # [E, columns]
    better = (table[None] > table[:, None]).sum(1)  # [E, columns]
    equal = (table[None] == table[:, None]).sum(1)
    ranks = (better + (equal + 1) / 2).mean(1)
    return dict(zip(values, ranks.tolist(), strict=True))


def dumps(judgement: Judgement) -> bytes:
    return json.dumps(judgement.to_json()).encode()
