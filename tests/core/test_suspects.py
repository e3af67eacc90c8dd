"""A run that explodes names the setting that is to blame."""

import math

import pytest

from helpers import MAE, SIMCLR, VIT, experiment, tiny
from selfray import config
from selfray.methods.dino import DINOConfig
from selfray.recipes import every
from selfray.schedules import Constant
from selfray.suspects import suspect

DINO = experiment(tiny(DINOConfig), VIT)


@pytest.mark.parametrize(
    ("changes", "blamed"),
    [
        ({"data.std": (1e-30, 0.2, 0.2)}, "--data.std 1e-30 is suspect: give at least 0.01"),
        ({"data.mean": (1e5, 0.5, 0.5)}, "--data.mean 100000 is suspect: give at most 2"),
        ({"method.temperature": 1e-9}, "--method.temperature 1e-09 is suspect: give at least 0.02"),
    ],
)
def test_before_the_first_update_sizes_of_the_loss_are_suspect(changes, blamed):
    # The rate is nonsense as well, and innocent: no weight has moved.
    wanted = config.override(experiment(SIMCLR), **changes)
    wanted = config.override(wanted, **{"optimizer.base_learning_rate": 1e9})
    assert suspect(wanted, 1) == blamed


def test_a_schedule_s_number_is_named_by_its_own_flag():
    wanted = config.override(DINO, **{"method.teacher_temperature": Constant(1e-9)})
    assert "--method.teacher-temperature.value 1e-09 is suspect" in suspect(wanted, 1)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_later_on_the_learning_rate_is_and_a_peak_that_works_is_named(name):
    rate = {"optimizer.name": name, "optimizer.base_learning_rate": 1e6}
    said = suspect(config.override(experiment(SIMCLR), **rate), 2)
    assert "--optimizer.base-learning-rate 1e+06 is suspect" in said
    better = float(said.rpartition(" ")[2])
    again = config.override(experiment(SIMCLR), **rate | {"optimizer.base_learning_rate": better})
    assert "base-learning-rate 1e" not in suspect(again, 2)


def test_the_setting_that_is_farthest_off_is_named():
    both = {"method.temperature": 0.01, "optimizer.base_learning_rate": 1e6}
    assert "base-learning-rate" in suspect(config.override(experiment(SIMCLR), **both), 2)
    both = {"method.temperature": 1e-30, "optimizer.base_learning_rate": 1e6}
    assert "temperature" in suspect(config.override(experiment(SIMCLR), **both), 2)


def test_where_nothing_is_unusual_precision_images_and_clipping_are_thought_of():
    plain = experiment(MAE, VIT)
    assert suspect(config.override(plain, precision="bf16"), 1).startswith("--precision bf16")
    assert "the images or the first weights" in suspect(plain, 1)
    assert "--optimizer.clip-norm 1" in suspect(plain, 2)
    assert "clip-norm" not in suspect(config.override(plain, **{"optimizer.clip_norm": 1.0}), 2)


@pytest.mark.parametrize("name", every())
def test_no_recipe_is_suspect(name):
    assert " is suspect: give at" not in suspect(every()[name], 1)
    assert " is suspect" not in suspect(every()[name], 2)


def test_no_setting_is_too_far_off_to_be_named():
    tiny_one = math.ulp(0.0)
    wanted = config.override(experiment(SIMCLR), **{"method.temperature": tiny_one})
    assert "--method.temperature" in suspect(wanted, 1)
