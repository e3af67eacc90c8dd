"""Sweeps as data: combinations, ranks and the sentence that answers the question."""

import pytest
from scipy.stats import spearmanr

from helpers import MAE, experiment
from selfray.schedules import Constant, Cosine
from selfray.sweeps.question import (
    Axis,
    Halving,
    Option,
    Question,
    Range,
    Score,
    Trial,
    answer,
    rank_correlation,
    ranked,
)

RATIO = Axis.over("mask ratio", "method.mask_ratio", [0.5, 0.75, 0.9])
EPOCHS = Axis.over("epochs", "epochs", [1, 2])


def labels_and_seeds(question: Question) -> list[tuple[str, int]]:
    return [(t.label, t.seed) for choice in question.choices for t in question.trials(choice)]


def test_the_grid_has_every_combination_with_every_seed_once():
    question = Question("q", (RATIO, EPOCHS), seeds=2, first_seed=5)
    found = labels_and_seeds(question)
    assert len(found) == question.runs == 3 * 2 * 2
    assert len(set(found)) == 12
    assert {seed for _, seed in found} == {5, 6}
    assert found[:2] == [("mask ratio 0.5, epochs 1", 5), ("mask ratio 0.5, epochs 1", 6)]


def test_a_random_search_draws_some_combinations_the_same_in_every_process():
    question = Question("q", (RATIO, EPOCHS), search="random", samples=4, seeds=3)
    found = labels_and_seeds(question)
    assert len({label for label, _ in found}) == 4
    assert len(found) == question.runs == 12
    assert found == labels_and_seeds(question)


def test_a_random_search_draws_between_two_bounds():
    between = Range("temperature", "method.temperature", 0.01, 1.0, scale="log")
    question = Question("q", (between, EPOCHS), search="random", samples=400)
    values = [q.choice["temperature"].changes["method.temperature"] for q in trials_of(question)]
    assert 0.01 <= min(values) < max(values) <= 1.0
    # Evenly by the logarithm: half of them below its middle.
    assert 160 < sum(value < 0.1 for value in values) < 240
    assert {q.choice["epochs"].label for q in trials_of(question)} == {"1", "2"}


def trials_of(question: Question) -> list[Trial]:
    return [trial for choice in question.choices for trial in question.trials(choice)]


def test_a_momentum_is_drawn_evenly_by_its_distance_to_one():
    between = Range("momentum", "method.momentum", 0.9, 0.999, scale="to_one", is_schedule=True)
    assert [between.value(place) for place in (0.0, 0.5, 1.0)] == [0.9, 0.99, 0.999]
    assert between.option(0.5) == Option("0.99", {"method.momentum": Constant(0.99)})


def test_a_trial_is_the_experiment_with_its_options_and_seed():
    shape = Option("cosine", {"method.mask_ratio": 0.6, "probe.times": 1})
    found = Trial({"shape": shape}, seed=3).experiment(experiment(MAE))
    assert found.method == MAE.__class__(**{**vars(MAE), "mask_ratio": 0.6})
    assert (found.probe.times, found.seed) == (1, 3)


def test_an_impossible_value_is_refused_by_the_experiments_own_words():
    (trial,) = trials_of(Question("q", (Axis.over("ratio", "method.mask_ratio", [1.5]),)))
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \(0, 1\), got 1.5"):
        trial.experiment(experiment(MAE))


def test_schedules_can_be_options():
    axis = Axis("start", (Option("c", {"x": Constant(0.9)}), Option("d", {"x": Cosine(0.9, 1)})))
    assert [trial.label for trial in trials_of(Question("q", (axis,)))] == ["start c", "start d"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Axis("ratio", ()), "ratio has no value to try: give at least one"),
        (lambda: Axis.over("ratio", "x", [1, 1]), "ratio: 1, 1 name a value twice"),
        (lambda: Question("q", ()), "a sweep needs at least one setting to vary"),
        (lambda: Question("q", (RATIO,), seeds=0), "seeds must be at least 1, got 0"),
        (lambda: Question("q", (RATIO,), samples=0), "samples must be at least 1, got 0"),
        (lambda: Question("q", (RATIO,), metric="loss"), "rank_by must be one of knn, linear"),
        (
            lambda: Question("q", (Range("ratio", "method.mask_ratio", 0.1, 0.9),)),
            "a grid needs a list of values of ratio, not two bounds: give --search random",
        ),
        (
            lambda: Range("ratio", "x", 0.9, 0.1),
            "ratio: the lower bound must be below the upper one, got 0.9 0.1",
        ),
        (lambda: Range("t", "x", 0.0, 0.1, "log"), "t: the lower bound must be above 0, got 0"),
        (lambda: Range("m", "x", 0.5, 1.0, "to_one"), "m: the upper bound must be below 1, got 1"),
        (lambda: Halving(first=1.0), r"first_rung must lie in \(0, 1\), got 1.0"),
        (lambda: Halving(factor=1.0), "rung_factor must be above 1, got 1.0"),
        (
            lambda: Question("q", (RATIO,), search="population", seeds=2),
            "a population has one seed: its members show the spread",
        ),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_ranks_follow_the_mean_and_failures_come_last():
    scores = [Score("a", (0.5, 0.7)), Score("b", (), ("it broke",)), Score("c", (0.9, 0.4))]
    assert [score.label for score in ranked(scores)] == ["c", "a", "b"]
    stopped = [Score("s", (), stopped=(0.3,)), Score("t", (), stopped=(0.4,))]
    names = [score.label for score in ranked([*stopped, *scores])]
    assert names == ["c", "a", "t", "s", "b"]
    assert scores[0].spread == pytest.approx(0.1414, abs=1e-4)
    assert Score("one", (0.5,)).spread is None


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (
            [Score("a", (0.90, 0.91, 0.92)), Score("b", (0.80, 0.81, 0.82))],
            "Which? a: kNN 91.0%, 10.0 points ahead of b, more than twice the 0.8 points of "
            "noise between seeds.",
        ),
        (
            [Score("a", (0.80, 0.90)), Score("b", (0.82, 0.86))],
            "Which? a: kNN 85.0%, 1.0 points ahead of b, within twice the 5.4 points of "
            "noise between seeds: the difference may be chance.",
        ),
        (
            [Score("a", (0.8,)), Score("b", (0.7,))],
            "Which? a: kNN 80.0%, 10.0 points ahead of b. One seed cannot show whether "
            "that is chance: give --seeds 3.",
        ),
        (
            [Score("a", (0.8,)), Score("b", (), stopped=(0.9,))],
            "Which? Only a was measured to the end: kNN 80.0%.",
        ),
        (
            [Score("a", (0.8,), stopped=(0.7, 0.7)), Score("b", (0.7, 0.7))],
            "Which? a: kNN 80.0%, 10.0 points ahead of b. Too few of their seeds "
            "finished to show whether that is chance.",
        ),
        ([Score("a", (), ("x",))], "Which? No run finished, so there is no answer."),
    ],
)
def test_the_answer_tells_the_best_its_margin_and_the_noise(scores, expected):
    assert answer("Which?", scores, "knn") == expected


def test_of_a_figure_that_should_be_low_the_lowest_is_the_best():
    scores = [Score("a", (-2.0, -2.2)), Score("b", (-3.0, -3.1))]
    assert [score.label for score in ranked(scores, "uniformity")] == ["b", "a"]
    assert answer("Which?", scores, "uniformity") == (
        "Which? b: uniformity -3.05, 0.95 ahead of a, more than twice the 0.11 of noise between "
        "seeds."
    )


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 2, 4], [1, 2, 3, 4], 0.9486832980505138),
        ([1, 2], [1, 2], None),
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_the_rank_correlation_is_spearmans(first, second, expected):
    found = rank_correlation(first, second)
    assert found == (expected if expected is None else pytest.approx(expected))
    if expected is not None:
        assert found == pytest.approx(spearmanr(first, second)[0])
