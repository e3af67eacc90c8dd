"""Numbers that cannot mean anything are refused by the name of their field."""

import math
from dataclasses import replace

import pytest

from helpers import MAE, SIMCLR, VIT, all_methods, experiment, tiny
from selfray import config
from selfray.experiment import Experiment
from selfray.limits import numbers
from selfray.methods.byol import BYOLConfig
from selfray.methods.dino import DINOConfig
from selfray.recipes import every
from selfray.schedules import Constant, Cosine, Piecewise, Ramp

BYOL, DINO = experiment(tiny(BYOLConfig)), experiment(tiny(DINOConfig), VIT)


def test_every_recipe_is_possible():
    assert all(isinstance(recipe, Experiment) for recipe in every().values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", all_methods(), ids=lambda method: method.name)
def test_no_number_of_any_config_may_be_nan_or_infinite(method, bad):
    wanted = experiment(method)
    for name in {name for name, _, value in numbers(wanted) if isinstance(value, float)}:
        held = wanted
        for part in name.split("."):
            held = getattr(held, part)
        value = tuple(bad for _ in held) if isinstance(held, tuple) else bad
        with pytest.raises(ValueError):  # noqa: PT011 - a config may say it in its own words
            config.override(wanted, **{name: value})


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (BYOL, {"method.momentum": Constant(2.0)}, r"method.momentum.value must be .*\[0, 1\]"),
        (BYOL, {"method.momentum": Cosine(-0.1, 1.0)}, "method.momentum.start must be a number in"),
        (BYOL, {"method.momentum": Cosine(0.9, 1.5)}, "method.momentum.end must be a number in"),
        (BYOL, {"method.momentum": Piecewise((0.9, 7.0))}, "method.momentum.values must be"),
        (DINO, {"method.teacher_temperature": Ramp(0.0, 0.07)}, "teacher_temperature.start must"),
        (DINO, {"method.teacher_temperature": Constant(-1.0)}, "teacher_temperature.value must"),
        (DINO, {"optimizer.weight_decay": Constant(-1.0)}, "optimizer.weight_decay.value must"),
        (DINO, {"optimizer.momentum": 2.0}, "optimizer.momentum must"),
        (DINO, {"optimizer.betas": (0.9, 2.0)}, "betas must"),
        (DINO, {"encoder.depth": 0}, "encoder.depth must"),
        (DINO, {"encoder.depth": -1}, "encoder.depth must"),
        (DINO, {"encoder.heads": -1}, "heads"),
        (DINO, {"method.local_crops": 2**40}, "local_crops must"),
        (DINO, {"probe.train_limit": 0}, "probe.train_limit must"),
        (DINO, {"probe.test_limit": -1}, "probe.test_limit must"),
        (DINO, {"data_cpus": -1.0}, "data_cpus must"),
        (DINO, {"name": "../x"}, "name must be a folder's name without slashes, got '../x'"),
        (DINO, {"name": ""}, "name must be a folder's name"),
        (experiment(SIMCLR), {"method.temperature": 0.0}, "temperature"),
        (experiment(MAE), {"method.decoder_heads": 0}, "decoder_heads"),
        (experiment(MAE), {"method.decoder_depth": -1}, "decoder_depth must"),
    ],
)
def test_what_cannot_mean_anything_is_refused_by_name(base, changes, message):
    with pytest.raises(ValueError, match=message):
        config.override(base, **changes)


def test_a_ramps_share_of_the_run_is_no_momentum():
    assert replace(BYOL, optimizer=replace(BYOL.optimizer, weight_decay=Ramp(0.0, 5.0, 0.5)))
