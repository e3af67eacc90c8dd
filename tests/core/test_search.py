"""Searches that draw: what Optuna is asked after what is known."""

from helpers import MAE, experiment
from selfray.sweeps.question import Axis, Known, Question, Range
from selfray.sweeps.searches import Choice
from selfray.sweeps.tpe import next_choice

RATIO = Range("ratio", "method.mask_ratio", 0.1, 0.9)
QUESTION = Question("q", (RATIO,), metric="linear", search="optuna", samples=24)


def place(choice: Choice) -> float:
    return float(choice["ratio"])


def test_what_is_asked_follows_from_what_is_known_alone():
    known = [Known({"ratio": x}, "finished", x) for x in (0.1, 0.4, 0.9, 0.7, 0.2)]
    assert next_choice(QUESTION, known) == next_choice(QUESTION, list(known))
    assert next_choice(QUESTION, known) != next_choice(QUESTION, known[:4])


def test_no_draw_is_asked_twice_while_nothing_has_ended():
    known: list[Known] = []
    for _ in range(6):
        known.append(Known(next_choice(QUESTION, known), "running"))
    assert len({place(one.choice) for one in known}) == 6


def test_the_search_goes_where_the_metric_is_high():
    known: list[Known] = []
    for _ in range(24):
        choice = next_choice(QUESTION, known)
        known.append(Known(choice, "finished", 1 - (place(choice) - 0.8) ** 2))
    first, last = known[:8], known[-8:]

    def distance(some: list[Known]) -> float:
        return sum(abs(place(one.choice) - 0.8) for one in some) / len(some)

    assert distance(last) < 0.7 * distance(first)


def test_where_low_is_good_the_search_goes_low():
    question = Question("q", (RATIO,), metric="alignment", search="optuna", samples=24)
    known: list[Known] = []
    for _ in range(24):
        choice = next_choice(question, known)
        known.append(Known(choice, "finished", (place(choice) - 0.2) ** 2))
    assert sum(abs(place(one.choice) - 0.2) for one in known[-8:]) / 8 < 0.2


def test_runs_that_failed_or_were_stopped_are_known_too():
    known = [
        Known({"ratio": 0.1}, "failed"),
        Known({"ratio": 0.2}, "stopped", 0.5, 100),
        Known({"ratio": 0.3}, "finished", 0.6),
        Known({"ratio": 0.4}, "running"),
        Known({"ratio": 0.5}, "finished", None),  # its probe failed
    ]
    assert 0 <= place(next_choice(QUESTION, known)) <= 1


def test_options_can_be_drawn_beside_ranges_and_make_an_experiment():
    axes = (RATIO, Axis.over("epochs", "epochs", [3, 4]))
    question = Question("q", axes, search="optuna", samples=3, seeds=2)
    choice = next_choice(question, [])
    first, second = question.trials(choice)
    made = first.experiment(experiment(MAE))
    assert made.epochs in (3, 4)
    assert made.method.mask_ratio == RATIO.value(place(choice))  # type: ignore[attr-defined]
    assert (first.seed, second.seed) == (0, 1)
    assert question.runs == 6
