"""The recipes: every method has one for digits, CIFAR-10 and ImageNet, and each can be built."""

from dataclasses import replace

import pytest
import torch

from helpers import batches, tokenizer_run
from selfray import config
from selfray.experiment import Experiment
from selfray.methods.beit import BEiTConfig
from selfray.optim import follow_schedules, learning_rate_at
from selfray.recipes import every
from selfray.schedules import Progress

RECIPES = every()
METHODS = "simclr mocov1 mocov2 mocov3 byol dino mae tokenizer beit dinov2"

every_recipe = pytest.mark.parametrize("name", RECIPES)


@pytest.mark.parametrize("data", ["digits", "cifar10", "imagenet"])
def test_every_method_has_a_recipe(data):
    assert {f"{method}-{data}" for method in METHODS.split()} <= RECIPES.keys()


@every_recipe
def test_a_recipe_is_called_by_its_own_name_and_survives_json(name):
    assert RECIPES[name].name == name
    assert config.loads(config.dumps(RECIPES[name])) == RECIPES[name]


@every_recipe
def test_a_recipes_learning_rate_rises_to_its_peak_and_never_beyond(name):
    recipe = RECIPES[name]
    rates = [
        learning_rate_at(recipe.optimizer, recipe.batch_size, Progress(seen, 1000, 0))
        for seen in range(0, 1001, 5)
    ]
    peak = recipe.optimizer.peak_learning_rate(recipe.batch_size)
    assert max(rates) == pytest.approx(peak, rel=0.01)
    assert rates[-1] < 0.02 * peak


@every_recipe
def test_a_recipes_method_and_optimizer_can_be_built(name):
    recipe = RECIPES[name]
    if isinstance(recipe.method, BEiTConfig):
        recipe = _with_tokenizer(recipe)
    with torch.device("meta"):
        method = recipe.method.build(recipe.encoder.build())
    optimizer = recipe.optimizer.build(method)
    follow_schedules(optimizer, 0.1, 0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) > 10


def _with_tokenizer(recipe: Experiment) -> Experiment:
    """The same with the tests' tokenizer, whose grid is 4 x 4."""
    assert recipe.encoder.grid is not None
    side = 4 * recipe.encoder.patch
    return replace(
        recipe,
        method=config.override(recipe.method, tokenizer=tokenizer_run()),
        encoder=replace(recipe.encoder, image_size=side),
    )


@pytest.mark.parametrize("data", ["digits", "cifar10", "imagenet"])
def test_a_tokenizer_and_its_beit_cut_images_alike(data):
    tokenizer, beit = RECIPES[f"tokenizer-{data}"], RECIPES[f"beit-{data}"]
    assert tokenizer.encoder.grid == beit.encoder.grid
    assert (tokenizer.data.mean, tokenizer.data.std) == (beit.data.mean, beit.data.std)
    masks = next(batches(replace(beit, batch_size=4)))["global_mask"]
    assert isinstance(beit.method, BEiTConfig)
    assert masks.float().mean() == pytest.approx(beit.method.mask_ratio, abs=0.03)
