"""Which combination is tried next, where a search learns from those before: Optuna's TPE."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from selfray.metrics import PROBES
from selfray.sweeps.question import Choice, Question, Range

FIRST_DRAWS = 4
"""Combinations drawn at random before the others are modelled."""


@dataclass(frozen=True)
class Known:
    """A combination that was tried before, or is under way."""

    choice: Choice
    state: Literal["running", "finished", "stopped", "failed"]
    value: float | None = None
    """The metric's mean over seeds; of a stopped one, at its rung."""
    images_seen: int = 0
    """Where a stopped one was stopped."""


def next_choice(question: Question, known: Sequence[Known]) -> Choice:
    """The combination to try after these: a pure function of the question and of them.

    So a search needs no memory of its own: a sweep that is resumed asks as if it had never ended.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(
        # Another seed for each draw, or the random ones would all be the same.
        seed=question.first_seed * 10_007 + len(known),
        n_startup_trials=FIRST_DRAWS,
        # Runs that are under way count as bad ones, so that the next is drawn elsewhere.
        constant_liar=True,
    )
    study = optuna.create_study(sampler=sampler, direction="maximize")
    space = _space(question)
    for one in known:
        study.add_trial(_as_trial(one, space, PROBES[question.metric or "knn"].sign))
    return dict(study.ask(fixed_distributions=space).params)


def _space(question: Question) -> dict[str, BaseDistribution]:
    # A range is drawn by places in [0, 1]: its scale is Range.value's to know.
    return {
        axis.name: FloatDistribution(0.0, 1.0)
        if isinstance(axis, Range)
        else CategoricalDistribution([option.label for option in axis.options])
        for axis in question.axes
    }


_STATES = {
    "running": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def _as_trial(
    known: Known, space: dict[str, BaseDistribution], sign: int
) -> optuna.trial.FrozenTrial:
    value = None if known.value is None else sign * known.value
    state = known.state
    if state in ("finished", "stopped") and value is None:
        state = "failed"  # it left no number to learn from
    at_rung = {known.images_seen: value} if state == "stopped" and value is not None else {}
    return create_trial(
        state=_STATES[state],
        value=value if state == "finished" else None,
        params=dict(known.choice),
        distributions=space,
        intermediate_values=at_rung,
    )
