"""Checks before a sweep starts that each of its runs is possible."""

from selfray.experiment import Experiment
from selfray.models import on_meta
from selfray.sweeps.population import first_generation
from selfray.sweeps.question import Question, Range
from selfray.sweeps.searches import SEARCHES, Choice


def refuse_impossible(base: Experiment, question: Question) -> None:
    """Raise the experiment's own ValueError if a run's settings are invalid or its encoder cannot
    be used."""
    if SEARCHES[question.search].is_population:
        for member in first_generation(question):
            on_meta.require_encoder_of(member.experiment(base, question))
        return
    choices = question.choices
    if SEARCHES[
        question.search
    ].ask:  # later choices are unknown, but they lie between these bounds
        choices = [_end(question, place) for place in (0.0, 1.0)]
    for choice in choices:
        for trial in question.trials(choice):
            on_meta.require_encoder_of(trial.experiment(base))


def _end(question: Question, place: float) -> Choice:
    """The combination at one end of every range."""
    return {
        axis.name: place if isinstance(axis, Range) else axis.options[-int(place)].label
        for axis in question.axes
    }
