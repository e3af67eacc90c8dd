"""`--init-from` with public weights: takes their encoder, unless --encoder.name is given."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfray.experiment import Experiment


def with_encoder_of_start(
    recipes: "Mapping[str, Experiment]", arguments: Sequence[str]
) -> "Mapping[str, Experiment]":
    """The recipes, but the one that `arguments` name gets the encoder of the public weights in
    `--init-from`, as the default of its encoder flags. Unchanged if `arguments` name an encoder, or
    start from weights that are not public ones.

    FileNotFoundError or ValueError if there are no such weights.
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
    """The value of a flag, given as `--flag VALUE` or `--flag=VALUE`, with - or _ between words;
    None if the flag is missing."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            return value if equals else next(iter(arguments[place + 1 :]), None)
    return None
