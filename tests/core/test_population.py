"""Population-based training as data: who takes over from whom, and what comes of it."""

import pytest

from helpers import experiment, tiny
from selfray.methods.byol import BYOLConfig
from selfray.schedules import Constant, Piecewise, Progress
from selfray.sweeps.population import Member, first_generation, next_generation
from selfray.sweeps.question import Axis, Question, Range

MOMENTUM = Range("momentum", "method.momentum", 0.9, 0.999, "to_one", is_schedule=True)
QUESTION = Question("q", (MOMENTUM,), search="population", samples=8, generations=3)


def test_the_first_members_are_spread_evenly_between_the_bounds():
    places = sorted(float(m.places[0]["momentum"]) for m in first_generation(QUESTION))
    assert [int(8 * place) for place in places] == list(range(8))
    assert first_generation(QUESTION) == first_generation(QUESTION)


def test_the_worst_quarter_takes_over_the_past_of_the_best_and_varies():
    members = first_generation(QUESTION)
    after = next_generation(QUESTION, members, [0.1 * i for i in range(8)])
    assert [m.copies is not None for m in after] == [True, True] + [False] * 6
    for member in after[:2]:
        assert member.copies in (6, 7)
        assert member.places[0] == members[member.copies].places[0]
        assert member.places[1] != member.places[0]
        assert 0 <= float(member.places[1]["momentum"]) <= 1
    for before, member in zip(members[2:], after[2:], strict=True):
        assert member.places == (before.places[0], before.places[0])


def test_who_failed_takes_over_from_the_best_and_nobody_from_who_failed():
    members = first_generation(QUESTION)
    after = next_generation(QUESTION, members, [None, 0.9, 0.5, 0.8, 0.6, None, None, 0.7])
    for index in (0, 5, 6):
        assert after[index].copies in (1, 3)
    assert after[1].copies is after[3].copies is None


def test_where_all_failed_nobody_takes_over():
    members = first_generation(QUESTION)
    assert all(m.copies is None for m in next_generation(QUESTION, members, [None] * 8))


def test_generations_are_the_same_in_every_process():
    members, scores = first_generation(QUESTION), [0.3, 0.1, 0.2, 0.9, 0.8, 0.4, 0.5, 0.7]
    once = next_generation(QUESTION, members, scores)
    assert once == next_generation(QUESTION, members, scores)
    assert once != next_generation(QUESTION, once, scores)


def test_a_members_past_is_a_schedule_whose_last_value_goes_on():
    member = Member(({"momentum": 0.0}, {"momentum": 0.5}))
    found = member.experiment(experiment(tiny(BYOLConfig)), QUESTION).method
    assert found.momentum == Piecewise((0.9, 0.99, 0.99))  # type: ignore[attr-defined]
    assert member.label(QUESTION) == "momentum 0.9, 0.99"


def test_a_piecewise_schedule_changes_at_its_parts_bounds():
    schedule = Piecewise((1.0, 2.0, 3.0))
    values = [schedule(Progress(seen, 9, seen)) for seen in range(10)]
    assert values == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    with pytest.raises(ValueError, match=r"Piecewise.values must name at least one value"):
        Piecewise(())


def test_what_is_no_schedule_does_not_evolve():
    ratio = Axis.over("ratio", "method.mask_ratio", [0.5, 0.6])
    message = "ratio is not a schedule between two bounds, so it cannot change during a run"
    with pytest.raises(ValueError, match=message):
        first_generation(Question("q", (ratio,), search="population"))
    assert Constant(0.9)(Progress(0, 1, 0)) == 0.9
