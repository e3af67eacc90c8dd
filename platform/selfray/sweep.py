"""A question asked of many runs: what is varied, and what came of it. Pure; no Ray."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfray import config
from selfray.experiment import Experiment
from selfray.views import require


@dataclass(frozen=True)
class Option:
    """One answer that a question may have, such as mask ratio 0.6."""

    label: str
    changes: Mapping[str, Any]
    """The experiment's dotted fields that it sets."""


@dataclass(frozen=True)
class Axis:
    """One thing that is varied."""

    name: str
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        labels = [option.label for option in self.options]
        require(len(labels) > 0, f"there is no value of {self.name} to try")
        require(
            len(set(labels)) == len(labels), f"{self.name}: {', '.join(labels)} name a value twice"
        )

    @classmethod
    def over(cls, name: str, path: str, values: Sequence[Any]) -> "Axis":
        """The values of one dotted field, such as method.mask_ratio."""
        return cls(name, tuple(Option(f"{value}", {path: value}) for value in values))


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: an option of each axis, and a seed."""

    choice: Mapping[str, Option]
    """By the axis's name."""
    seed: int

    @property
    def label(self) -> str:
        """What is varied, without the seed: runs of one label are repetitions."""
        return ", ".join(f"{name} {option.label}" for name, option in self.choice.items())

    def experiment(self, base: Experiment) -> Experiment:
        """ValueError where the options make no valid experiment."""
        changes = {p: v for option in self.choice.values() for p, v in option.changes.items()}
        return config.override(base, **changes, seed=self.seed)


@dataclass(frozen=True)
class Question:
    """What a sweep is to find out."""

    name: str
    """The first part of the sweep's folder, and its name in MLflow."""
    axes: tuple[Axis, ...]
    metric: str = "knn"
    """The probe that ranks: knn or linear."""
    seeds: int = 1
    samples: int | None = None
    """Combinations that are tried, drawn at random; None tries all."""
    first_seed: int = 0

    def __post_init__(self) -> None:
        require(len(self.axes) > 0, "a sweep needs something to vary")
        require(self.seeds >= 1, f"seeds must be at least 1, got {self.seeds}")
        require(
            self.samples is None or self.samples >= 1,
            f"samples must be at least 1, got {self.samples}",
        )

    @property
    def trials(self) -> list[Trial]:
        """All runs, the repetitions of one combination in a row; the same in every process."""
        names = [axis.name for axis in self.axes]
        combinations = list(itertools.product(*(axis.options for axis in self.axes)))
        if self.samples is not None and self.samples < len(combinations):
            rng = np.random.default_rng(self.first_seed)
            drawn = sorted(rng.choice(len(combinations), self.samples, replace=False))
            combinations = [combinations[index] for index in drawn]
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return [
            Trial(dict(zip(names, options, strict=True)), seed)
            for options in combinations
            for seed in seeds
        ]


@dataclass(frozen=True)
class Score:
    """What the runs of one combination came to."""

    label: str
    values: tuple[float, ...]
    """The metric of each run that ended well, in 0..1."""
    failures: tuple[str, ...] = field(default=())
    """The causes of those that did not."""

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None where there are fewer than two runs."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's: how far two figures order runs alike, -1..1; None where one of them is constant
    or there are fewer than three runs."""
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(np.corrcoef(_places(first), _places(second))[0, 1])


def _places(values: Sequence[float]) -> np.ndarray:
    """The rank of each value, equal ones sharing the mean of theirs."""
    array = np.asarray(values)
    below = (array[None] < array[:, None]).sum(1)
    return below + ((array[None] == array[:, None]).sum(1) - 1) / 2


def ranked(scores: Sequence[Score]) -> list[Score]:
    """The best mean first; combinations of which no run ended well, last."""
    return sorted(scores, key=lambda score: -score.mean if score.values else 1.0)


def answer(question: str, scores: Sequence[Score], metric: str) -> str:
    """One sentence: the best, its margin, and whether that is more than the spread over seeds."""
    measured = [score for score in ranked(scores) if score.values]
    if not measured:
        return f"{question} No run ended well, so there is no answer."
    best, *others = measured
    if not others:
        return f"{question} Only {best.label} was measured: {metric} {best.mean:.1%}."
    second = others[0]
    margin = best.mean - second.mean
    lead = (
        f"{question} {best.label}: {metric} {best.mean:.1%}, {100 * margin:.1f} points before "
        f"{second.label}"
    )
    spreads = [score.spread for score in (best, second) if score.spread is not None]
    if len(spreads) < 2:
        return f"{lead}. With one seed nobody can tell whether that is chance: give --seeds 3."
    # The deviation of a difference of two means over seeds.
    runs = min(len(best.values), len(second.values))
    noise = (sum(spread**2 for spread in spreads) / runs) ** 0.5
    if margin > 2 * noise:
        return f"{lead}, more than twice the {100 * noise:.1f} points that seeds make."
    return (
        f"{lead}, within twice the {100 * noise:.1f} points that seeds make: the two are not told "
        "apart."
    )
