"""Population-based training (Jaderberg et al., arXiv:1711.09846): runs train side by side, and
after each generation the worst ones copy the weights of the best ones and vary their settings. The
result is a schedule: the settings that the winner had over time. Pure; no Ray.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfray import config
from selfray.check import require
from selfray.experiment import Experiment
from selfray.schedules import Piecewise
from selfray.sweeps.question import Question, Range
from selfray.sweeps.searches import Choice, names_of

QUANTILE = 0.25
"""Share of the members that are replaced after each generation, by as many of the best; at least
one member."""
STEP = 0.2
"""How far a setting moves up or down, on a scale where its bounds are 0 and 1."""
RESAMPLE = 0.25
"""Probability that a setting is drawn at random instead."""


@dataclass(frozen=True)
class Member:
    """One run of a population, up to and including the next generation."""

    places: tuple[Choice, ...]
    """Its settings in each generation; the last entry is for the next one."""
    copies: int | None = None
    """The member whose weights and history it copied before the last generation."""

    def experiment(self, base: Experiment, question: Question) -> Experiment:
        """The experiment with this member's settings as schedules; the last value holds to the
        end."""
        changes: dict[str, Any] = {"seed": question.first_seed}
        for axis in ranges(question):
            values = [axis.value(float(place[axis.name])) for place in self.places]
            values += values[-1:] * (question.generations - len(values))
            changes[axis.path] = Piecewise(tuple(values))
        return config.override(base, **changes)

    def label(self, question: Question) -> str:
        """Its schedules as text, such as momentum 0.9, 0.95, 0.99."""
        return "; ".join(
            f"{axis.name} "
            + ", ".join(f"{axis.value(float(place[axis.name])):g}" for place in self.places)
            for axis in ranges(question)
        )


def ranges(question: Question) -> list[Range]:
    """The settings that evolve. Raises ValueError for one that is not a schedule, because only
    schedules can change during a run."""
    found = []
    for axis in question.axes:
        require(
            isinstance(axis, Range) and axis.is_schedule,
            f"{axis.name} is not a schedule between two bounds, so it cannot change during a run: "
            f"give --search {names_of(lambda search: not search.is_population)}",
        )
        assert isinstance(axis, Range)
        found.append(axis)
    return found


def first_generation(question: Question) -> list[Member]:
    """The first members, spread evenly between the bounds of each setting."""
    rng = np.random.default_rng((question.first_seed, 0))
    count = question.samples
    drawn = {
        axis.name: (rng.permutation(count) + rng.random(count)) / count for axis in ranges(question)
    }
    return [
        Member(({name: float(places[index]) for name, places in drawn.items()},))
        for index in range(count)
    ]


def next_generation(
    question: Question, members: Sequence[Member], scores: Sequence[float | None]
) -> list[Member]:
    """The members of the next generation: a pure function of the members and their scores (higher
    is better; None for a failed one)."""
    rng = np.random.default_rng((question.first_seed, len(members[0].places)))
    order = sorted(
        range(len(members)),
        key=lambda i: -np.inf if (score := scores[i]) is None else score,
        reverse=True,
    )
    replaced = max(1, int(QUANTILE * len(members))) if len(members) > 1 else 0
    best = [i for i in order[: max(1, replaced)] if scores[i] is not None]
    # Failed members have no weights to continue from, so they are always replaced.
    worst = {i for i in order if scores[i] is None} | set(order[len(order) - replaced :])
    found = []
    for index, member in enumerate(members):
        if index in worst and best and index not in best:
            parent = int(rng.choice(best))
            past = members[parent].places
            found.append(Member((*past, _varied(past[-1], rng)), parent))
        else:
            found.append(Member((*member.places, member.places[-1])))
    return found


def _varied(place: Choice, rng: np.random.Generator) -> Choice:
    varied = {}
    for name, value in place.items():
        moved = float(value) + (STEP if rng.random() < 0.5 else -STEP)
        drawn = float(rng.random())
        varied[name] = drawn if rng.random() < RESAMPLE else min(1.0, max(0.0, moved))
    return varied
