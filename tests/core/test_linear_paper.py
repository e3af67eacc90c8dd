"""The published linear evaluation: its grid, each layer's own learning, and what it sees."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from selfray.contract import RESNET, VIT
from selfray.experiment import DataConfig
from selfray.probes.embedding import EARLIER, EMBEDDING, PATCH_MEAN, Contents, embedded
from selfray.probes.finetuning import Placing
from selfray.probes.linear_paper import (
    Choice,
    Grid,
    LinearOnViews,
    LinearPaper,
    LinearPaperConfig,
    tokens,
)
from selfray.schedules import Progress
from selfray.train import TrainState

DEEP = replace(VIT, depth=4)
NOW = Progress(0, 100, 0)


def state_of(encoder, optimizer="sgd", images=40):
    protocol = LinearOnViews(optimizer, epochs=2, batch_size=8, least_steps=1)
    data, run = DataConfig("x"), Placing("runs")
    experiment = protocol.experiment(encoder, data, (3, 7), images, run, "w.safetensors")
    return TrainState.start(experiment, images)


def test_a_vits_grid_has_every_input_at_every_rate_and_a_resnets_one_input():
    config = LinearPaperConfig((0, 1), (0.1, 1.0))
    grid = config.grid(DEEP)
    assert len(grid) == 2 * 2 * 2
    assert Choice(4, True, 0.1) in grid
    assert config.grid(RESNET) == [Choice(1, False, 0.1), Choice(1, False, 1.0)]


def test_the_layers_are_trained_and_judged_on_the_same_features():
    encoder = DEEP.build().eval()
    views = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), np.uint8)
    mean, std = (0.5,) * 3, (0.25,) * 3
    contents = Contents(patch_mean=True, earlier_layers=True)
    kept = embedded(encoder, views, mean, std, contents)
    images = (torch.from_numpy(views) / 255 - 0.5) / 0.25
    with torch.no_grad():
        seen = tokens(encoder, images)
    columns = np.concatenate([kept[name] for name in (EARLIER, EMBEDDING, PATCH_MEAN)], 1)
    assert np.allclose(seen.numpy(), columns, atol=1e-5)


def test_each_layer_sees_its_part_of_the_features():
    choices = [Choice(1, False, 1), Choice(1, True, 1), Choice(4, False, 1), Choice(4, True, 1)]
    grid = Grid(2, 3, choices, LinearPaperConfig((0, 1, 2)))
    features = torch.arange(10.0)[None]
    parts = [grid._seen(features, choice)[0].tolist() for choice in choices]
    assert parts == [[6, 7], [6, 7, 8, 9], list(range(8)), list(range(10))]


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_every_layer_learns_at_its_own_rate_and_the_encoder_not_at_all(optimizer):
    state = state_of(DEEP, optimizer)
    method = state.method
    assert isinstance(method, LinearPaper)
    rate = {id(p): group["rate"] for group in state.optimizer.param_groups for p in group["params"]}
    for layer, choice in zip(method.heads.layers, method.heads.choices, strict=True):
        assert rate[id(layer.weight)] == choice.rate
    assert not any(id(p) in rate for p in method.encoder.parameters())
    assert (method.heads.norm.state_dict() != {}) == (optimizer == "lars")


def test_a_layer_has_the_gradient_that_it_has_alone():
    method = state_of(DEEP).method
    assert isinstance(method, LinearPaper)
    images = torch.randn(4, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 7, -1, 7])
    method({"global": images, "label": labels}, NOW)[0].backward()
    place = 5
    layer, choice = method.heads.layers[place], method.heads.choices[place]
    with torch.no_grad():
        features = tokens(method.encoder, images[:, 0])
    weight = layer.weight.detach().clone().requires_grad_(True)
    seen = method.heads._seen(features, choice)[labels >= 0]
    logits = seen @ weight.T + layer.bias.detach()
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1])).backward()
    assert torch.allclose(layer.weight.grad, weight.grad, atol=1e-6)


def test_mae_is_judged_as_its_paper_does():
    of_mae, of_dino = LinearOnViews.of("mae"), LinearOnViews.of("dino")
    assert (of_mae.optimizer, of_mae.epochs, of_mae.batch_size) == ("lars", 90, 16_384)
    assert (of_dino.optimizer, of_dino.epochs) == ("sgd", 10)


def test_a_shallow_vit_is_refused_by_name():
    encoder = replace(VIT, depth=2).build()
    with pytest.raises(ValueError, match="last 4 blocks"):
        tokens(encoder, torch.zeros(1, 3, 16, 16))
