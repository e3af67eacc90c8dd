"""The question of a sweep: which settings are varied, and how the results answer it. Pure; no
Ray."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from selfray import config
from selfray.check import require, require_one_of
from selfray.experiment import Experiment
from selfray.metrics import PROBES
from selfray.schedules import Constant
from selfray.sweeps.searches import SEARCHES, Choice, SearchName, names_of


@dataclass(frozen=True)
class Option:
    """One possible answer to a question, such as mask ratio 0.6."""

    label: str
    changes: Mapping[str, Any]
    """Values of the experiment's fields, by dotted name."""


@dataclass(frozen=True)
class Axis:
    """One setting that is varied over a list of options."""

    name: str
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        labels = [option.label for option in self.options]
        require(len(labels) > 0, f"{self.name} has no value to try: give at least one")
        require(
            len(set(labels)) == len(labels), f"{self.name}: {', '.join(labels)} name a value twice"
        )

    @classmethod
    def over(cls, name: str, path: str, values: Sequence[Any]) -> "Axis":
        """An axis over values of one dotted field, such as method.mask_ratio."""
        return cls(name, tuple(Option(f"{value}", {path: value}) for value in values))

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(option.label for option in self.options)

    @property
    def described(self) -> str:
        return ", ".join(self.labels)

    def option(self, value: float | str) -> Option:
        """The option with this label."""
        return next(option for option in self.options if option.label == value)


@dataclass(frozen=True)
class Range:
    """One number that is varied between two bounds, for a search that draws values."""

    name: str
    path: str
    """The experiment's dotted field."""
    low: float
    high: float
    scale: Literal["linear", "log", "to_one"] = "linear"
    """What is drawn uniformly: the value (linear), its logarithm (log), or the logarithm of its
    distance to 1 (to_one, for momenta)."""
    is_schedule: bool = False
    """Whether the field is a schedule; it is then set to a constant."""

    def __post_init__(self) -> None:
        require_one_of(f"the scale of {self.name}", self.scale, ("linear", "log", "to_one"))
        require(
            self.low < self.high,
            f"{self.name}: the lower bound must be below the upper one, got {self.low:g} "
            f"{self.high:g}",
        )
        require(
            self.scale != "log" or self.low > 0,
            f"{self.name}: the lower bound must be above 0, got {self.low:g}",
        )
        require(
            self.scale != "to_one" or self.high < 1,
            f"{self.name}: the upper bound must be below 1, got {self.high:g}",
        )

    @property
    def labels(self) -> None:
        """A range has no options by label."""

    @property
    def described(self) -> str:
        return f"{self.low:g} to {self.high:g}"

    def value(self, place: float) -> float:
        """The value at a place in [0, 1] between the bounds, to four digits."""
        if self.scale == "linear":
            return _rounded(self.low + (self.high - self.low) * place)
        if self.scale == "log":
            return _rounded(self.low * (self.high / self.low) ** place)
        far, near = 1 - self.low, 1 - self.high
        return round(1 - _rounded(far * (near / far) ** place), 12)

    def option(self, value: float | str) -> Option:
        """The option at a place in [0, 1]."""
        found = self.value(float(value))
        return Option(f"{found:g}", {self.path: Constant(found) if self.is_schedule else found})


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Known:
    """A combination that was tried before or is running."""

    choice: Choice
    state: Literal["running", "finished", "stopped", "failed"]
    value: float | None = None
    """The metric's mean over seeds; for a stopped one, at its rung."""
    images_seen: int = 0
    """For a stopped one, the images seen at its rung."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: an option of each axis, and a seed."""

    choice: Mapping[str, Option]
    """The option of each axis, by name."""
    seed: int

    @property
    def label(self) -> str:
        """The options as text, without the seed: runs with the same label are repetitions."""
        return ", ".join(f"{name} {option.label}" for name, option in self.choice.items())

    def experiment(self, base: Experiment) -> Experiment:
        """The base experiment with these options. Raises ValueError if they are not valid
        together."""
        changes = {p: v for option in self.choice.values() for p, v in option.changes.items()}
        return config.override(base, **changes, seed=self.seed)


@dataclass(frozen=True)
class Halving:
    """Rules to stop the worse runs early: asynchronous successive halving (ASHA, arXiv:1810.05934),
    with rungs at numbers of images seen."""

    metric: str | None = None
    """The figure by which runs are compared at a rung: a probe or a label-free figure; None takes
    the metric of the ranking."""
    first: float = 0.25
    """Share of the images that every run sees before the first rung."""
    factor: float = 2.0
    """One in this many runs continues after each rung; rungs lie this factor apart."""

    def __post_init__(self) -> None:
        if self.metric is not None:
            require_one_of("stop_by", self.metric, tuple(PROBES))
        require(0 < self.first < 1, f"first_rung must lie in (0, 1), got {self.first}")
        require(self.factor > 1, f"rung_factor must be above 1, got {self.factor}")


@dataclass(frozen=True)
class Question:
    """What a sweep should find out, and how it searches."""

    name: str
    """The first part of the sweep's folder, and its name in MLflow."""
    axes: tuple[Axis | Range, ...]
    metric: str | None = None
    """The figure that ranks: a probe or a label-free figure; None takes the method's own probe."""
    seeds: int = 1
    search: SearchName = "grid"
    """How combinations are chosen: a name in searches.py."""
    samples: int = 8
    """Number of combinations that a search draws, or of members of a population."""
    generations: int = 4
    """Number of times that a population's runs are compared; the last time is at their end."""
    halving: Halving | None = None
    first_seed: int = 0

    def __post_init__(self) -> None:
        require(len(self.axes) > 0, "a sweep needs at least one setting to vary")
        require(self.seeds >= 1, f"seeds must be at least 1, got {self.seeds}")
        require(self.samples >= 1, f"samples must be at least 1, got {self.samples}")
        require(self.generations >= 2, f"generations must be at least 2, got {self.generations}")
        if self.metric is not None:
            require_one_of("rank_by", self.metric, tuple(PROBES))
        require_one_of("search", self.search, tuple(SEARCHES))
        if SEARCHES[self.search].is_population:
            require(self.seeds == 1, "a population has one seed: its members show the spread")
            require(self.halving is None, "a population replaces its worst runs: it has no rungs")
        if SEARCHES[self.search].needs_lists:
            for axis in self.axes:
                require(
                    isinstance(axis, Axis),
                    f"a {self.search} needs a list of values of {axis.name}, not two bounds: give "
                    f"--search {names_of(lambda search: not search.needs_lists)}",
                )

    @property
    def choices(self) -> list[Choice]:
        """All combinations to run, the same in every process. Empty for a search that draws them
        one by one, and for a population."""
        draw = SEARCHES[self.search].draw
        return [] if draw is None else draw(self)

    def trials(self, choice: Choice) -> list[Trial]:
        """The trials of a combination, one for each seed."""
        options = {axis.name: axis.option(choice[axis.name]) for axis in self.axes}
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return [Trial(options, seed) for seed in seeds]

    @property
    def runs(self) -> int:
        """The total number of runs of the sweep."""
        combinations = len(self.choices) or self.samples
        return combinations * self.seeds


@dataclass(frozen=True)
class Score:
    """The results of all runs of one combination."""

    label: str
    values: tuple[float, ...]
    """The metric of each run that finished."""
    failures: tuple[str, ...] = field(default=())
    """The causes of failed runs."""
    stopped: tuple[float, ...] = field(default=())
    """The metric of each run that was stopped, at its rung."""

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None with fewer than two runs."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation of two figures of the same runs, -1..1; None if one is constant
    or there are fewer than three runs."""
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(np.corrcoef(_places(first), _places(second))[0, 1])


def _places(values: Sequence[float]) -> np.ndarray:
    """The rank of each value, float [n]; equal values share the mean of their ranks."""
    array = np.asarray(values)
    below = (array[None] < array[:, None]).sum(1)
    return below + ((array[None] == array[:, None]).sum(1) - 1) / 2


def ranked(scores: Sequence[Score], metric: str = "knn") -> list[Score]:
    """Sort by mean, best first; then stopped combinations, then failed ones."""
    sign = PROBES[metric].sign

    def place(score: Score) -> tuple[int, float]:
        if score.values:
            return 0, -sign * score.mean
        return (1, -sign * statistics.mean(score.stopped)) if score.stopped else (2, 0.0)

    return sorted(scores, key=place)


def answer(question: str, scores: Sequence[Score], metric: str) -> str:
    """One sentence: the best, its margin, and whether the margin exceeds the spread over seeds."""
    judge = PROBES[metric]
    measured = [score for score in ranked(scores, metric) if score.values]
    if not measured:
        return f"{question} No run finished, so there is no answer."
    best, *others = measured
    if not others:
        return (
            f"{question} Only {best.label} was measured to the end: {judge.name} "
            f"{judge.shown(best.mean)}."
        )
    second = others[0]
    margin = abs(best.mean - second.mean)
    lead = (
        f"{question} {best.label}: {judge.name} {judge.shown(best.mean)}, "
        f"{judge.shown_difference(margin)} ahead of {second.label}"
    )
    spreads = [score.spread for score in (best, second) if score.spread is not None]
    if len(spreads) < 2:
        if any(len(score.values) + len(score.stopped) > 1 for score in (best, second)):
            return f"{lead}. Too few of their seeds finished to show whether that is chance."
        return f"{lead}. One seed cannot show whether that is chance: give --seeds 3."
    # The deviation of a difference of two means over seeds.
    noise = math.sqrt(
        sum(
            spread**2 / len(score.values)
            for spread, score in zip(spreads, (best, second), strict=True)
        )
    )
    seeds = f"{judge.shown_difference(noise)} of noise between seeds"
    if margin > 2 * noise:
        return f"{lead}, more than twice the {seeds}."
    return f"{lead}, within twice the {seeds}: the difference may be chance."
