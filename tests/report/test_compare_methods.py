import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

import compare_methods
from compare_methods import TOKENIZER, Comparison, Outcome, choose, needs_tokenizer, run_one
from selfray.cluster.launch import RunResult
from selfray.console import Console
from selfray.methods.mae import MAEConfig
from selfray.probes.features import ProbeResult
from selfray.recipes import digits
from selfray.runs.history import History

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class TokensConfig(MAEConfig):
    """A method that predicts a tokenizer's tokens, as BEiT does."""

    tokenizer: str = ""


TOKENS = replace(digits.MAE, name="tokens-digits", method=TokensConfig())
RECIPES = {
    "simclr-digits": digits.SIMCLR,
    "tokens-digits": TOKENS,
    TOKENIZER: replace(digits.MAE, name=TOKENIZER),
    "mae-digits": digits.MAE,
}


# Which runs


def test_every_recipe_is_run_unless_it_is_skipped():
    recipes = choose(digits.RECIPES, Comparison())
    assert set(recipes) == set(digits.RECIPES)
    left = choose(digits.RECIPES, Comparison(skip=("mae-digits",)))
    assert set(left) == set(digits.RECIPES) - {"mae-digits"}
    assert list(choose(RECIPES, Comparison(only=("mae-digits",)))) == ["mae-digits"]


def test_the_tokenizer_comes_first_where_a_method_needs_it():
    assert list(choose(RECIPES, Comparison())) == [
        TOKENIZER,
        "simclr-digits",
        "tokens-digits",
        "mae-digits",
    ]
    assert list(choose(RECIPES, Comparison(only=("tokens-digits",)))) == [
        TOKENIZER,
        "tokens-digits",
    ]
    assert not needs_tokenizer(replace(TOKENS, method=TokensConfig(tokenizer="somewhere")))


def test_epochs_and_output_hold_for_every_run():
    recipes = choose(RECIPES, Comparison(epochs=2, output="elsewhere"))
    assert {(recipe.epochs, recipe.output) for recipe in recipes.values()} == {(2, "elsewhere")}
    assert choose(RECIPES, Comparison())["mae-digits"].epochs == digits.MAE.epochs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Comparison(only=("mae",)), "there is no recipe 'mae'; there are simclr-digits"),
        (Comparison(skip=("x",)), "there is no recipe 'x'"),
        (Comparison(only=("mae-digits",), skip=("mae-digits",)), "leaves no recipe"),
        (Comparison(seeds=0), "--seeds must be at least 1"),
    ],
)
def test_bad_choices_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        choose(RECIPES, settings)


# Outcomes


def test_a_run_that_cannot_start_is_an_outcome_with_its_cause():
    outcome = run_one("tokens-digits", TOKENS, None, Console(io.StringIO(), None))
    assert outcome.result is None
    assert (
        outcome.failure == f"tokens-digits needs the run of {TOKENIZER}, which failed or is skipped"
    )


def probe(knn: float, linear: float) -> ProbeResult:
    return ProbeResult(knn, linear, 1200, 597, {"knn": "knn-v1", "linear": "linear-v1"})


def result(*probes: ProbeResult) -> RunResult:
    by_step = {10 * i: each for i, each in enumerate(probes)}
    return RunResult("runs/here", 9.0, 640.0, 3.0, by_step, History())


OUTCOMES = [
    Outcome(TOKENIZER, RECIPES[TOKENIZER], result(), None),
    Outcome(
        "simclr-digits",
        digits.SIMCLR,
        result(probe(0.5, 0.6), probe(0.7, 0.7), probe(0.9, 0.8)),
        None,
    ),
    Outcome("mae-digits", digits.MAE, result(probe(0.3, 0.7), probe(0.4, 0.85)), None),
    Outcome("tokens-digits", TOKENS, None, "no tokenizer"),
]


def test_the_margin_is_by_the_judging_probe_over_the_runs_own_untrained_encoder():
    table = {line["method"]: line for line in compare_methods.rows(OUTCOMES)}
    assert list(table) == ["simclr", "mae", "tokens"]
    assert table["simclr"]["margin"] == pytest.approx(0.4)
    assert table["mae"]["judged_by"] == "linear"
    assert table["mae"]["margin"] == pytest.approx(0.15)
    assert table["mae"]["steps_per_second"] == 640 / digits.MAE.batch_size
    assert table["tokens"]["failure"] == "no tokenizer"


def test_a_run_without_probes_says_so_in_its_line():
    (line,) = compare_methods.rows([Outcome("mae-digits", digits.MAE, result(), None)])
    assert "not probed" in line["failure"]


def test_seeds_are_averaged():
    other = Outcome(
        "mae-digits", replace(digits.MAE, seed=1), result(probe(0.3, 0.7), probe(0.6, 0.95)), None
    )
    (line,) = compare_methods.rows([OUTCOMES[2], other])
    assert line["pretrained"] == pytest.approx({"knn": 0.5, "linear": 0.9})
    assert line["margin"] == pytest.approx(0.2)
    assert [run["seed"] for run in line["runs"]] == [0, 1]


def test_the_table_marks_the_judging_number_and_names_the_cause_of_a_failure(tmp_path):
    table, pixels = compare_methods.rows(OUTCOMES), probe(0.97, 0.96)
    assert compare_methods.markdown(table, pixels).splitlines()[2:] == [
        "| raw pixels | | 97.0% | | 96.0% | | |",
        "| simclr | 50.0% | **90.0%** | 60.0% | 80.0% | +40.0 | 2.5 |",
        "| mae | 30.0% | 40.0% | 70.0% | **85.0%** | +15.0 | 10.0 |",
        "| tokens | failed: no tokenizer | | | | | |",
    ]
    written = io.StringIO()
    compare_methods.show(Console(written, None), table, pixels, tmp_path, 1.0)
    lines = written.getvalue().splitlines()
    assert lines[3].split() == ["simclr", "90.0%*", "50.0%", "80.0%", "60.0%", "+40.0", "2.5", "9"]
    assert lines[4].split() == ["mae", "40.0%", "30.0%", "85.0%*", "70.0%", "+15.0", "10.0", "9"]
    assert lines[5].split(maxsplit=1) == ["tokens", "failed: no tokenizer"]


def test_the_table_and_the_figure_are_written(tmp_path):
    compare_methods.write(compare_methods.rows(OUTCOMES), probe(0.97, 0.96), tmp_path)
    written = json.loads((tmp_path / "table.json").read_text())
    assert written["raw_pixels"]["knn"] == 0.97
    assert [line["method"] for line in written["methods"]] == ["simclr", "mae", "tokens"]
    Image.open(tmp_path / "comparison.png").verify()
