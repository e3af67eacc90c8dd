"""Recipes: a named Experiment for each method and data set, with notes on its source."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import
    from selfray.experiment import Experiment

METHODS = [
    "simclr",
    "mocov1",
    "mocov2",
    "mocov3",
    "byol",
    "dino",
    "mae",
    "beit",
    "dinov2",
    "tokenizer",
]
DATA_SETS = ("digits", "cifar10", "imagenet")
NAMES = (
    *(f"{method}-{data}" for method in METHODS for data in DATA_SETS),
    "dinov2-imagenet-512",
    "dinov2-adapt",
    "dino-adapt",
    "mae-adapt",
    "simclr-adapt",
)
"""The names of all recipes, available without importing torch; `every` returns the recipes."""


def every() -> "dict[str, Experiment]":
    """All recipes by name."""
    from selfray.recipes import adapt, cifar10, digits, imagenet

    return digits.RECIPES | cifar10.RECIPES | imagenet.RECIPES | adapt.RECIPES


def by_name(*recipes: "Experiment") -> "dict[str, Experiment]":
    return {recipe.name: recipe for recipe in recipes}
