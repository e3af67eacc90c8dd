"""What was written by the first version stays readable: run ids, configs and checkpoints.

`fixtures/checkpoints-0.1` holds a checkpoint of each method after three steps, and `facts.json`
the run's name and the first features that the encoder gave then. `fixtures/run-ids.json` holds the
folder of each recipe's run: a setting that changes a recipe changes its line, on purpose.
"""

import json
from pathlib import Path

import pytest
import torch

from helpers import start, train_for
from selfray.recipes import every
from selfray.runs.checkpoint import Checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
OLD = FIXTURES / "checkpoints-0.1"
FACTS = json.loads((OLD / "facts.json").read_text())


def test_every_recipe_has_the_run_folder_that_it_had():
    expected = json.loads((FIXTURES / "run-ids.json").read_text())
    assert {name: recipe.run_name for name, recipe in every().items()} == expected


@pytest.fixture(params=FACTS)
def old(request, monkeypatch) -> tuple[Checkpoint, dict]:
    monkeypatch.chdir(OLD)  # BEiT's checkpoint names its tokenizer by a relative path
    return Checkpoint.open(OLD / request.param), FACTS[request.param]


def test_an_old_checkpoint_is_of_the_same_run(old):
    found, facts = old
    assert found.experiment().run_name == facts["run"]


def test_an_old_encoder_gives_the_features_that_it_gave(old):
    found, facts = old
    images = torch.linspace(-2, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).sin() * 1.5
    with torch.no_grad():
        features = found.encoder()(images).cls.flatten()
    assert features[:6].tolist() == pytest.approx(facts["features"], rel=1e-3, abs=1e-4)


def test_an_old_run_goes_on(old):
    found, _ = old
    experiment = found.experiment()
    state = start(experiment)
    state.load_state_dict(found.state())
    (step,) = train_for(state, experiment, 1)
    assert step.progress.step == found.step + 1
    assert torch.isfinite(step.loss)
