"""Named Experiments: one value for each method and data set, each a lab note."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import
    from selfray.experiment import Experiment


def every() -> "dict[str, Experiment]":
    """All recipes by name."""
    from selfray.recipes import adapt, cifar10, digits, imagenet

    return digits.RECIPES | cifar10.RECIPES | imagenet.RECIPES | adapt.RECIPES
