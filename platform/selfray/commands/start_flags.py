"""`--init-from` with public weights: the encoder is theirs, unless it is named."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfray.experiment import Experiment


def with_encoder_of_start(
    recipes: "Mapping[str, Experiment]", arguments: Sequence[str]
) -> "Mapping[str, Experiment]":
    """The recipes with the encoder of the public weights that the arguments start from, as the
    default of its flags; as they are where an encoder is named, or cannot be known.

    FileNotFoundError or ValueError where there are no such weights.
    """
    start = _value_of(arguments, "--init-from")
    if start is None or _value_of(arguments, "--encoder.name") is not None:
        return recipes
    from selfray.models import weights

    if not weights.is_public(start):
        return recipes
    chosen = {name for name in recipes if name in arguments}
    return {
        name: replace(recipe, encoder=weights.encoder_of(start, recipe.encoder))
        if name in chosen
        else recipe
        for name, recipe in recipes.items()
    }


def _value_of(arguments: Sequence[str], flag: str) -> str | None:
    """What a flag is given, as `--flag VALUE` or `--flag=VALUE`, with - or _ between words."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            return value if equals else next(iter(arguments[place + 1 :]), None)
    return None
