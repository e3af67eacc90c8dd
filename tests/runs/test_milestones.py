"""When a run saves and probes: as often as was asked for, and no recipe's wish on few steps."""

import pytest

from helpers import MAE, VIT, experiment
from selfray.experiment import CheckpointConfig, ProbeConfig
from selfray.runs.milestones import milestones

WANTED = experiment(MAE, VIT, checkpoint=CheckpointConfig(times=100), probe=ProbeConfig(times=10))


def test_a_recipe_on_few_steps_saves_and_probes_less_and_says_so():
    found = milestones(WANTED, 96, chosen=[])
    assert len(found.probes) == 4
    assert found.probes <= found.checkpoints
    assert len(found.checkpoints - found.probes) <= 9
    assert max(found.probes) == max(found.checkpoints) == 96
    assert found.note.startswith(
        "9 checkpoints and 4 probes in 96 steps, instead of the recipe's 100"
    )


@pytest.mark.parametrize("chosen", [["checkpoint.times", "probe.times"], None])
def test_what_the_user_chose_stays(chosen):
    found = milestones(WANTED, 96, chosen)
    assert len(found.checkpoints) == 96
    assert len(found.probes) == 10
    assert found.note == ""


def test_one_of_both_may_be_chosen():
    found = milestones(WANTED, 96, chosen=["probe.times"])
    assert len(found.probes) == 10
    assert found.note == (
        "9 checkpoints in 96 steps, instead of the recipe's 100 for longer runs "
        "(--checkpoint.times changes this)"
    )


def test_a_long_run_is_as_the_recipe_has_it():
    found = milestones(WANTED, 10_000, chosen=[])
    assert (len(found.checkpoints), len(found.probes), found.note) == (100, 10, "")


def test_a_run_of_one_step_saves_and_probes_once():
    found = milestones(WANTED, 1, chosen=[])
    assert found.checkpoints == found.probes == {1}
