"""Chooses the next combination of a search that learns from earlier ones: Optuna's TPE."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from selfray.metrics import PROBES

if TYPE_CHECKING:
    from selfray.sweeps.question import Known, Question
    from selfray.sweeps.searches import Choice

FIRST_DRAWS = 4
"""Number of combinations drawn at random before TPE starts to model."""


def next_choice(question: "Question", known: "Sequence[Known]") -> "Choice":
    """The combination to try next: a pure function of the question and of the known combinations.

    So a search has no state of its own, and a resumed sweep continues as if it had never stopped.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(
        # A different seed for each draw; otherwise all random draws would be equal.
        seed=question.first_seed * 10_007 + len(known),
        n_startup_trials=FIRST_DRAWS,
        # Running combinations count as bad ones, so that the next one is drawn elsewhere.
        constant_liar=True,
    )
    study = optuna.create_study(sampler=sampler, direction="maximize")
    space = _space(question)
    for one in known:
        study.add_trial(_as_trial(one, space, PROBES[question.metric or "knn"].sign))
    return dict(study.ask(fixed_distributions=space).params)


def _space(question: "Question") -> dict[str, BaseDistribution]:
    # A range is drawn as a place in [0, 1]; Range.value applies its scale.
    return {
        axis.name: FloatDistribution(0.0, 1.0)
        if axis.labels is None
        else CategoricalDistribution(axis.labels)
        for axis in question.axes
    }


_STATES = {
    "running": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def _as_trial(
    known: "Known", space: dict[str, BaseDistribution], sign: int
) -> optuna.trial.FrozenTrial:
    value = None if known.value is None else sign * known.value
    state = known.state
    if state in ("finished", "stopped") and value is None:
        state = "failed"  # there is no number to learn from
    at_rung = {known.images_seen: value} if state == "stopped" and value is not None else {}
    return create_trial(
        state=_STATES[state],
        value=value if state == "finished" else None,
        params=dict(known.choice),
        distributions=space,
        intermediate_values=at_rung,
    )
