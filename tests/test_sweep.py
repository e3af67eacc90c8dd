"""Sweeps as data: combinations, ranks and the sentence that answers the question."""

import pytest
from scipy.stats import spearmanr

from helpers import MAE, experiment
from selfray.schedules import Constant, Cosine
from selfray.sweep import (
    Axis,
    Option,
    Question,
    Score,
    Trial,
    answer,
    rank_correlation,
    ranked,
)

RATIO = Axis.over("mask ratio", "method.mask_ratio", [0.5, 0.75, 0.9])
EPOCHS = Axis.over("epochs", "epochs", [1, 2])


def test_the_grid_has_every_combination_with_every_seed_once():
    trials = Question("q", (RATIO, EPOCHS), seeds=2, first_seed=5).trials
    assert len(trials) == 3 * 2 * 2
    assert len({(trial.label, trial.seed) for trial in trials}) == 12
    assert {trial.seed for trial in trials} == {5, 6}
    assert trials[0].label == trials[1].label == "mask ratio 0.5, epochs 1"


def test_a_random_search_draws_some_combinations_the_same_in_every_process():
    question = Question("q", (RATIO, EPOCHS), samples=4, seeds=3)
    labels = [trial.label for trial in question.trials]
    assert len(set(labels)) == 4
    assert len(labels) == 12
    assert labels == [trial.label for trial in question.trials]


def test_a_trial_is_the_experiment_with_its_options_and_seed():
    shape = Option("cosine", {"method.mask_ratio": 0.6, "probe.times": 1})
    found = Trial({"shape": shape}, seed=3).experiment(experiment(MAE))
    assert found.method == MAE.__class__(**{**vars(MAE), "mask_ratio": 0.6})
    assert (found.probe.times, found.seed) == (1, 3)


def test_an_impossible_value_is_refused_by_the_experiments_own_words():
    (trial,) = Question("q", (Axis.over("ratio", "method.mask_ratio", [1.5]),)).trials
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \(0, 1\), got 1.5"):
        trial.experiment(experiment(MAE))


def test_schedules_can_be_options():
    axis = Axis("start", (Option("c", {"x": Constant(0.9)}), Option("d", {"x": Cosine(0.9, 1)})))
    assert [trial.label for trial in Question("q", (axis,)).trials] == ["start c", "start d"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Axis("ratio", ()), "there is no value of ratio to try"),
        (lambda: Axis.over("ratio", "x", [1, 1]), "ratio: 1, 1 name a value twice"),
        (lambda: Question("q", ()), "a sweep needs something to vary"),
        (lambda: Question("q", (RATIO,), seeds=0), "seeds must be at least 1, got 0"),
        (lambda: Question("q", (RATIO,), samples=0), "samples must be at least 1, got 0"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_ranks_follow_the_mean_and_failures_come_last():
    scores = [Score("a", (0.5, 0.7)), Score("b", (), ("it broke",)), Score("c", (0.9, 0.4))]
    assert [score.label for score in ranked(scores)] == ["c", "a", "b"]
    assert scores[0].spread == pytest.approx(0.1414, abs=1e-4)
    assert Score("one", (0.5,)).spread is None


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (
            [Score("a", (0.90, 0.91, 0.92)), Score("b", (0.80, 0.81, 0.82))],
            "Which? a: kNN 91.0%, 10.0 points before b, more than twice the 0.8 points that seeds "
            "make.",
        ),
        (
            [Score("a", (0.80, 0.90)), Score("b", (0.82, 0.86))],
            "Which? a: kNN 85.0%, 1.0 points before b, within twice the 5.4 points that seeds "
            "make: the two are not told apart.",
        ),
        (
            [Score("a", (0.8,)), Score("b", (0.7,))],
            "Which? a: kNN 80.0%, 10.0 points before b. With one seed nobody can tell whether that "
            "is chance: give --seeds 3.",
        ),
        ([Score("a", (0.8,)), Score("b", ())], "Which? Only a was measured: kNN 80.0%."),
        ([Score("a", (), ("x",))], "Which? No run ended well, so there is no answer."),
    ],
)
def test_the_answer_tells_the_best_its_margin_and_the_noise(scores, expected):
    assert answer("Which?", scores, "kNN") == expected


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
