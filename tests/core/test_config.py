import json
from dataclasses import dataclass

import pytest

from helpers import MAE, SIMCLR, experiment
from selfray import config
from selfray.experiment import Experiment
from selfray.methods.mae import MAEConfig
from selfray.schedules import Constant, Cosine
from selfray.views import ColorJitter, View


@pytest.mark.parametrize("method", [SIMCLR, MAE])
def test_an_experiment_survives_json_unchanged(method):
    wanted = experiment(method)
    again = config.loads(config.dumps(wanted))
    assert again == wanted
    assert hash(again) == hash(wanted), "tuples came back as something else"


def test_json_names_the_type_of_every_dataclass():
    value = config.to_json(View(color_jitter=ColorJitter()))
    assert value["type"] == "selfray.views:View"
    assert value["color_jitter"]["type"] == "selfray.views:ColorJitter"


def test_a_field_may_hold_one_of_several_types():
    wanted = [Constant(0.1), Cosine(0.9, 1.0)]
    assert config.loads(config.dumps(wanted)) == tuple(wanted)


def test_validation_runs_again_when_a_config_is_read():
    text = config.dumps(MAE).replace('"mask_ratio": 0.75', '"mask_ratio": 1.2')
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \(0, 1\), got 1\.2"):
        config.loads(text)


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:dict",
        "subprocess:Popen",
        "helpers:Enough",
        "selfrayed.views:View",
        "tests.selfray:View",
    ],
)
def test_a_config_can_name_no_code_outside_selfray(name):
    with pytest.raises(ValueError, match="may only name types of selfray"):
        config.from_json({"type": name, "args": ["true"]})


@pytest.mark.parametrize(
    "name",
    [
        "selfray.storage:Path",  # imported there, but no dataclass
        "selfray.views:require",
        "selfray.train:TrainState",  # a dataclass, but not frozen
    ],
)
def test_only_frozen_dataclasses_are_built(name):
    with pytest.raises(ValueError, match="is not a config"):
        config.from_json({"type": name})


@pytest.mark.parametrize("name", ["selfray.views:Gone", "selfray.gone:View", "selfray.views"])
def test_a_type_that_this_version_lacks_is_named(name):
    with pytest.raises(ValueError, match=f"this version of selfray has no {name}"):
        config.from_json({"type": name})


def test_a_field_that_this_version_lacks_is_named():
    value = config.to_json(MAE) | {"mask_shape": "round"}
    with pytest.raises(ValueError, match=r"MAEConfig has no field mask_shape.*another version"):
        config.from_json(value)


def test_a_file_that_lacks_a_needed_field_is_refused_with_its_name():
    value = config.to_json(experiment())
    del value["method"]
    with pytest.raises(ValueError, match="method"):
        config.from_json(value)


def test_values_that_json_cannot_carry_are_refused():
    @dataclass(frozen=True)
    class Holder:
        thing: object

    with pytest.raises(TypeError, match="not set"):
        config.to_json(Holder({1, 2}))


def test_override_replaces_nested_fields_and_leaves_the_original_alone():
    wanted = experiment(MAE)
    changed = config.override(
        wanted, **{"method.mask_ratio": 0.6, "epochs": 3, "optimizer.weight_decay": Constant(0.2)}
    )
    assert isinstance(changed, Experiment)
    assert isinstance(changed.method, MAEConfig)
    assert (changed.method.mask_ratio, changed.epochs) == (0.6, 3)
    assert changed.optimizer.weight_decay == Constant(0.2)
    assert wanted == experiment(MAE)


def test_override_names_a_field_that_does_not_exist_and_those_that_do():
    with pytest.raises(ValueError, match="MAEConfig has no field 'mask_ration'; it has mask_ratio"):
        config.override(experiment(MAE), **{"method.mask_ration": 0.6})


def test_override_validates():
    with pytest.raises(ValueError, match="mask_ratio"):
        config.override(experiment(MAE), **{"method.mask_ratio": 1.2})


def test_differences_are_one_line_for_each_field():
    ours = experiment(MAE, epochs=7)
    theirs = config.override(ours, **{"epochs": 9, "method.mask_ratio": 0.5})
    assert config.differences(ours, theirs) == [
        "epochs: 7, was 9",
        "method.mask_ratio: 0.75, was 0.5",
    ]
    assert config.differences(ours, ours) == []


def test_differences_between_methods_name_what_only_one_of_them_has():
    lines = config.differences(experiment(MAE), experiment(SIMCLR))
    assert "method.type: MAEConfig, was SimCLRConfig" in lines
    assert "method.temperature: absent, was 0.1" in lines


def test_flat_names_are_dotted_and_carry_short_type_names():
    flat = config.flatten(config.to_json(experiment(MAE)))
    assert flat["method.type"] == "MAEConfig"
    assert flat["optimizer.betas"] == [0.9, 0.999]
    assert flat["encoder.image_size"] == 16
    assert all(not isinstance(value, dict) for value in flat.values())
    json.dumps(flat)


@dataclass(frozen=True)
class Grown:
    kept: int = config.added(1)
    changed: bool = config.added(False, before=True)


def test_a_field_that_came_later_is_what_it_was_before_where_a_file_lacks_it(monkeypatch):
    monkeypatch.setattr(config, "config_type", lambda name: Grown)
    assert set(config.to_json(Grown(1, True))) == {"type"}
    assert config.to_json(Grown())["changed"] is False
    assert config.from_json({"type": "selfray.x:Grown"}) == Grown(1, True)
    assert config.loads(config.dumps(Grown(2, False))) == Grown(2, False)


def test_a_value_of_another_type_is_refused_by_the_field_s_name() -> None:
    written = config.to_json(experiment())
    for field, value, kind in (
        ("epochs", "many", "a whole number"),
        ("epochs", True, "a whole number"),
        ("worker_resources", 1, "text"),
        ("data", {"path": "x"}, "a DataConfig"),
        ("precision", "float1", "one of float32"),
    ):
        with pytest.raises(ValueError, match=rf"Experiment: {field} must be {kind}.*, got "):
            config.from_json(written | {field: value})
