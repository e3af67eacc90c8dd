"""The protocols of `selfray evaluate` that need only features, by the names that a user types."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from selfray.check import require
from selfray.probes.classifier import Classifier, Gallery
from selfray.probes.judgement import Judgement, classified, of_predictions, retrieved
from selfray.probes.knn import ChosenKNN
from selfray.probes.linear import Linear
from selfray.probes.logistic import Logistic
from selfray.probes.protocol import Protocol
from selfray.probes.retrieval import Retrieval
from selfray.probes.subsets import balanced

LOW_SHOT = "low-shot"
OF_FEATURES = ("knn", "linear", "logistic", "retrieval", LOW_SHOT)
"""Names of these protocols; `low-shot` gives one judgement for each size."""


@dataclass(frozen=True)
class FewLabels(Protocol):
    """Logistic regression on class-balanced subsets of the train labels; each subset is a pure
    function of (seed, image), and the number is the mean over subsets."""

    name: ClassVar[str] = "low-shot"
    version: ClassVar[int] = 1

    share: float | None = None
    """Share of the train labels in a subset; None if `labels` is given."""
    labels: int | None = None
    """Number of train labels in a subset; None if `share` is given."""
    subsets: int = 3
    classifier: Classifier = field(default_factory=Logistic)

    @property
    def key(self) -> str:
        return f"labels-{self.labels}" if self.share is None else f"low-shot-{_percent(self.share)}"

    def count(self, images: int) -> int:
        return self.labels if self.share is None else max(1, round(self.share * images))  # type: ignore[return-value]

    def chosen(self, train: Gallery, seed: int) -> np.ndarray:
        """Indices int64 of a subset's images."""
        count = self.count(len(train.labels))
        return balanced(train.keys, train.labels.numpy(), count, seed)

    def judge(self, train: Gallery, test: Gallery) -> Judgement:
        predicted, used = [], []
        for seed in range(self.subsets):
            rows = self.chosen(train, seed)
            found = self.classifier.classify(train.rows(rows), test.features)
            predicted.append(found.predicted.numpy())
            used.append(len(rows))
        judgement = of_predictions(self.key, str(self), np.stack(predicted), test.labels.numpy())
        return Judgement(
            judgement.key,
            judgement.protocol,
            judgement.metric,
            judgement.scores,
            more={**judgement.more, "labels": float(np.mean(used))},
        )


@dataclass(frozen=True)
class Suite:
    """The settings of all protocols."""

    knn: ChosenKNN = field(default_factory=ChosenKNN)
    linear: Linear = field(default_factory=Linear)
    logistic: Logistic = field(default_factory=Logistic)
    retrieval: Retrieval = field(default_factory=Retrieval)
    shares: tuple[float, ...] = (0.01, 0.1)
    """Shares of the labels for `low-shot`."""
    labels: tuple[int, ...] = ()
    """Numbers of labels for the label-efficiency curve."""
    subsets: int = 3
    """Number of subsets of the labels for each size."""
    logistic_of_few: bool = True
    """Whether logistic regression judges subsets of labels; fine-tuning is not among these
    tasks."""
    own: Mapping[str, Classifier] = field(default_factory=dict)
    """Protocols of plugins by name."""

    def __post_init__(self) -> None:
        require(
            all(0 < share < 1 for share in self.shares),
            f"--shares must lie in (0, 1), got {', '.join(map(str, self.shares))}",
        )
        require(
            all(count > 0 for count in self.labels),
            f"--labels must be positive, got {', '.join(map(str, self.labels))}",
        )
        for name, protocol in self.own.items():
            require(
                isinstance(protocol, Classifier) and name not in OF_FEATURES,
                f"PROTOCOLS of a plugin holds {name}, which must be a selfray.probes.classifier."
                "Classifier with a name of its own",
            )
        require(self.subsets > 0, f"--subsets must be at least 1, got {self.subsets}")

    def few(self) -> Iterator[FewLabels]:
        for share in self.shares:
            yield FewLabels(share, None, self.subsets, self.logistic)

    def curve(self) -> Iterator[FewLabels]:
        for count in self.labels:
            yield FewLabels(None, count, self.subsets, self.logistic)

    def tasks(self, by: Sequence[str]) -> dict[str, Protocol]:
        """The protocols to run by key; each is a task of its own."""
        found: dict[str, Protocol] = {}
        for name in by:
            if name == LOW_SHOT and self.logistic_of_few:
                found |= {few.key: few for few in self.few()}
            elif name in OF_FEATURES and name != LOW_SHOT:
                found[name] = getattr(self, name)
            elif name in self.own:
                found[name] = self.own[name]
        return found | ({few.key: few for few in self.curve()} if self.logistic_of_few else {})


def judge(key: str, protocol: Protocol, train: Gallery, test: Gallery) -> Judgement:
    """The judgement of one protocol on features of train and test images."""
    if isinstance(protocol, FewLabels):
        return protocol.judge(train, test)
    if isinstance(protocol, Retrieval):
        return retrieved(key, protocol, train, test)
    assert isinstance(protocol, Classifier)
    return classified(key, protocol, train, test)


def _percent(share: float) -> str:
    return f"{100 * share:g}%"
