import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from helpers import MAE, RESNET, SIMCLR, VIT, experiment, start, train_for
from selfray.optim import (
    LARS,
    OptimizerConfig,
    clip_gradients,
    follow_schedules,
    learning_rate_at,
    parameter_groups,
)
from selfray.schedules import Constant, Cosine, Progress, WarmupCosine


def at(fraction: float) -> Progress:
    return Progress(round(fraction * 1000), 1000, 0)


# Learning rate and weight decay


@pytest.mark.parametrize(
    ("scaling", "peak"), [("linear", 0.3 * 1024 / 256), ("sqrt", 0.3 * 32), ("none", 0.3)]
)
def test_the_peak_learning_rate_follows_the_batch_size(scaling, peak):
    config = OptimizerConfig(base_learning_rate=0.3, scaling=scaling)
    assert config.peak_learning_rate(1024) == pytest.approx(peak)


def test_the_learning_rate_warms_up_and_falls_on_a_cosine():
    config = OptimizerConfig(
        base_learning_rate=0.1, schedule=WarmupCosine(warmup_fraction=0.1, final=0.0)
    )
    rates = [learning_rate_at(config, 512, at(f)) for f in (0, 0.05, 0.1, 0.55, 0.775, 1)]
    low = 0.2 * 0.5 * (1 + math.cos(0.75 * math.pi))
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.1, low, 0.0])


def test_schedules_reach_the_optimizer_and_vectors_get_no_weight_decay():
    optimizer = OptimizerConfig().build(nn.Linear(3, 2))
    follow_schedules(optimizer, learning_rate=0.7, weight_decay=0.3)
    matrices, vectors = optimizer.param_groups
    assert (matrices["lr"], matrices["weight_decay"]) == (0.7, 0.3)
    assert (vectors["lr"], vectors["weight_decay"]) == (0.7, 0.0)


def test_each_step_of_a_run_has_its_own_learning_rate_and_weight_decay():
    settings = OptimizerConfig(
        base_learning_rate=0.01,
        scaling="none",
        schedule=WarmupCosine(warmup_fraction=0.2),
        weight_decay=Cosine(0.04, 0.4),
    )
    wanted = experiment(MAE, optimizer=settings)
    state = start(wanted, steps=10)
    told = []
    for step in range(10):
        told += train_for(state, wanted, 1)
        fraction = step / 10
        expected = fraction / 0.2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 8))
        assert told[step].learning_rate == pytest.approx(0.01 * expected)
        matrices, vectors, tokens = state.optimizer.param_groups
        assert matrices["lr"] == vectors["lr"] == told[step].learning_rate
        assert matrices["weight_decay"] == pytest.approx(
            0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi * fraction))
        )
        assert vectors["weight_decay"] == 0.0
        assert tokens["weight_decay"] == matrices["weight_decay"]
    assert state.progress.finished


# Groups


@pytest.mark.parametrize("method", [SIMCLR, MAE])
def test_every_trainable_parameter_is_in_exactly_one_group(method):
    module = start(experiment(method)).method
    grouped = [p for group in parameter_groups(module) for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(id(p) for p in module.parameters() if p.requires_grad)


def test_biases_norms_and_tokens_are_vectors_and_weights_are_matrices():
    module = start(experiment(MAE)).method
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    matrices, vectors = (
        {names[id(p)] for p in group["params"]} for group in parameter_groups(module)
    )
    assert {"mask_token", "encoder.backbone.cls_token", "encoder.backbone.norm.weight"} <= vectors
    assert {name for name in names.values() if name.endswith(".bias")} <= vectors
    assert "encoder.backbone.patch_embed.proj.weight" in matrices
    assert {name for name in matrices if "norm" in name} == set()


def test_frozen_parameters_are_in_no_group():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    module[0].requires_grad_(False)
    grouped = [p for group in parameter_groups(module) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in module[1].parameters()}


def test_layer_decay_slows_a_vit_down_towards_its_input():
    module = start(experiment(SIMCLR, VIT)).method  # two blocks
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    rates = {
        names[id(p)]: group["rate"]
        for group in parameter_groups(module, layer_decay=0.5, patch_embed_rate=0.2)
        for p in group["params"]
    }
    expected = {
        "projector.0.weight": 1.0,
        "encoder.backbone.norm.weight": 1.0,
        "encoder.backbone.blocks.1.attn.qkv.weight": 0.5,
        "encoder.backbone.blocks.1.attn.qkv.bias": 0.5,
        "encoder.backbone.blocks.0.mlp.fc1.weight": 0.25,
        "encoder.backbone.cls_token": 0.125,
        "encoder.backbone.patch_embed.proj.weight": 0.125 * 0.2,
    }
    assert {name: rates[name] for name in expected} == pytest.approx(expected)


def test_a_groups_rate_is_a_factor_on_the_learning_rate():
    settings = OptimizerConfig("sgd", layer_decay=0.5)
    optimizer = settings.build(start(experiment(SIMCLR, VIT)).method)
    follow_schedules(optimizer, learning_rate=0.8, weight_decay=0.3)
    assert {group["lr"] for group in optimizer.param_groups} == {0.8, 0.4, 0.2, 0.1}


@pytest.mark.parametrize("field", ["layer_decay", "patch_embed_rate"])
def test_a_resnet_has_no_layers_for_the_rates_of_a_vit(field):
    settings = replace(OptimizerConfig(), **{field: 0.5})
    with pytest.raises(ValueError, match=f"optimizer.{field} is for ViTs, not for encoder.name re"):
        experiment(SIMCLR, RESNET, optimizer=settings)


# Clipping


def test_clipping_holds_the_norm_of_all_of_each_module_or_of_each_parameter():
    sizes = {"0.weight": 10.0, "0.bias": 0.5, "1.weight": 4.0, "1.bias": 0.1}
    expected = {
        "all": {name: size / math.hypot(*sizes.values()) for name, size in sizes.items()},
        "module": {
            "0.weight": 10 / math.hypot(10, 0.5),
            "0.bias": 0.5 / math.hypot(10, 0.5),
            "1.weight": 4 / math.hypot(4, 0.1),
            "1.bias": 0.1 / math.hypot(4, 0.1),
        },
        "parameter": {"0.weight": 1.0, "0.bias": 0.5, "1.weight": 1.0, "1.bias": 0.1},
    }
    for each, norms in expected.items():
        module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1), nn.Linear(1, 1))
        for name, size in sizes.items():
            parameter = module.get_parameter(name)
            gradient = torch.ones_like(parameter)
            parameter.grad = gradient * size / gradient.norm()
        settings = OptimizerConfig(clip_norm=1.0, clip_each=each)  # type: ignore[arg-type]
        told = clip_gradients(module, settings)
        assert float(told) == pytest.approx(math.hypot(*sizes.values()), rel=1e-5)
        found = {}
        for name in sizes:
            gradient = module.get_parameter(name).grad
            assert gradient is not None
            found[name] = float(gradient.norm())
        assert found == pytest.approx(norms, rel=1e-4), each


# The optimizers


def test_the_named_optimizer_is_built_with_its_settings():
    module = nn.Linear(3, 2)
    adamw = OptimizerConfig("adamw", betas=(0.9, 0.95)).build(module)
    assert isinstance(adamw, AdamW)
    assert adamw.defaults["betas"] == (0.9, 0.95)
    sgd = OptimizerConfig("sgd", momentum=0.8).build(module)
    assert isinstance(sgd, SGD)
    assert sgd.defaults["momentum"] == 0.8
    lars = OptimizerConfig("lars", momentum=0.8, trust_coefficient=0.02).build(module)
    assert isinstance(lars, LARS)
    assert (lars.defaults["momentum"], lars.defaults["trust_coefficient"]) == (0.8, 0.02)


def test_lars_is_its_formula():
    torch.manual_seed(0)
    module = nn.Linear(4, 3, dtype=torch.float64)
    optimizer = LARS(parameter_groups(module), momentum=0.9, trust_coefficient=0.02)
    weight, bias = (p.detach().numpy().copy() for p in (module.weight, module.bias))
    weight_velocity, bias_velocity = np.zeros_like(weight), np.zeros_like(bias)
    rng = np.random.default_rng(0)
    for rate, decay in ((0.5, 0.1), (0.4, 0.1), (0.3, 0.2), (0.2, 0.0), (0.1, 0.3)):
        weight_gradient, bias_gradient = rng.normal(size=(3, 4)), rng.normal(size=3)
        module.weight.grad = torch.from_numpy(weight_gradient)
        module.bias.grad = torch.from_numpy(bias_gradient)
        follow_schedules(optimizer, rate, decay)
        optimizer.step()

        update = weight_gradient + decay * weight
        update *= 0.02 * np.sqrt((weight**2).sum()) / np.sqrt((update**2).sum())
        weight_velocity = 0.9 * weight_velocity + update
        weight = weight - rate * weight_velocity
        bias_velocity = 0.9 * bias_velocity + bias_gradient  # neither decay nor trust ratio
        bias = bias - rate * bias_velocity
        np.testing.assert_allclose(module.weight.detach().numpy(), weight, rtol=1e-12)
        np.testing.assert_allclose(module.bias.detach().numpy(), bias, rtol=1e-12)


def test_lars_moves_a_matrix_of_zeros_and_stays_finite_without_a_gradient():
    module = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(module.weight)
    optimizer = LARS(parameter_groups(module), momentum=0.0)
    follow_schedules(optimizer, learning_rate=0.1, weight_decay=0.0)
    module.weight.grad = torch.zeros(2, 3)
    optimizer.step()
    assert torch.equal(module.weight, torch.zeros(2, 3))
    module.weight.grad = torch.ones(2, 3)
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), torch.full((2, 3), -0.1))


def test_a_parameter_without_a_gradient_stays_as_it_is():
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    optimizer = OptimizerConfig("lars").build(module)
    follow_schedules(optimizer, learning_rate=1.0, weight_decay=1.0)
    optimizer.step()
    assert torch.equal(module.weight, before)


def test_adamw_decays_matrices_and_leaves_vectors():
    module = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = OptimizerConfig("adamw").build(module)
    follow_schedules(optimizer, learning_rate=0.1, weight_decay=0.5)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(module.bias, before["bias"])


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_learning_rate": 0.0}, "optimizer.base_learning_rate must be positive, got 0.0"),
        ({"clip_norm": 0.0}, "optimizer.clip_norm must be positive, got 0.0"),
        ({"momentum": 1.0}, r"optimizer.momentum must lie in \[0, 1\), got 1.0"),
        ({"name": "adam"}, "optimizer.name"),
        ({"scaling": "cubic"}, "optimizer.scaling"),
        ({"clip_each": "block"}, "optimizer.clip_each"),
        ({"layer_decay": 0.0}, r"optimizer.layer_decay must lie in \(0, 1\], got 0.0"),
        ({"patch_embed_rate": -1.0}, "optimizer.patch_embed_rate must be at least 0, got -1.0"),
    ],
)
def test_settings_outside_their_range_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings, weight_decay=Constant(0.0))
