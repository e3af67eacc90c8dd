"""Reads an Experiment from a YAML or JSON file, such as a run's own experiment.yaml.

    recipe: mae-imagenet        # fields that the file leaves out keep the recipe's values
    epochs: 50
    data: {path: scans/}
    method: {mask_ratio: 0.6}

A complete file, as --print-config prints it, names its types and needs no recipe.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from selfray import config
from selfray.check import require
from selfray.commands.words import nearest
from selfray.storage import Location

if TYPE_CHECKING:  # torch takes seconds to import
    from selfray.experiment import Experiment

RECIPE = "recipe"


def read_config(
    path: str, base: "Experiment | None", recipes: "Mapping[str, Experiment]"
) -> "Experiment":
    """The experiment that a file describes; missing fields come from the recipe that it names, else
    from `base`.

    ValueError and FileNotFoundError name in one line the file, the key and the nearest known name.
    """
    from selfray.experiment import Experiment

    location = Location.of(path)
    if not location.exists():
        raise FileNotFoundError(f"--config {path} does not exist")
    try:
        value = yaml.safe_load(location.read_bytes().decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"--config {path} is neither YAML nor JSON: {line}") from None
    require(isinstance(value, dict), f"--config {path} must hold fields such as epochs: 50")
    try:
        if config.TYPE_KEY in value:
            whole = config.from_json(value)
            require(isinstance(whole, Experiment), f"its type is not {Experiment.__name__}")
            return whole
        name = value.pop(RECIPE, None)
        if name is not None:
            require(name in recipes, f"there is no recipe {name}{nearest(str(name), recipes)}")
            base = recipes[name]
        if base is None:
            raise ValueError("it needs a line such as `recipe: mae-imagenet`")
        return merged(base, value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--config {path}: {error}") from None


def merged(base: Any, changes: Mapping[str, Any], prefix: str = "") -> Any:
    """A copy of a config with some fields replaced, at any depth. ValueError names an unknown field
    and the nearest known one; `prefix` is the path of `base`, for messages."""
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    new = {}
    for key, value in changes.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise ValueError(f"there is no field {prefix}{key}{nearest(name, fields)}")
        held = fields[name]
        if isinstance(value, Mapping) and config.TYPE_KEY not in value:
            require(
                dataclasses.is_dataclass(held), f"{prefix}{name} is a single value, got a mapping"
            )
            new[name] = merged(held, value, f"{prefix}{name}.")
        else:
            new[name] = _typed(f"{prefix}{name}", config.from_json(value), held)
        config.require_type(type(base), name, new[name])
    return dataclasses.replace(base, **new)


def _typed(name: str, value: Any, held: Any) -> Any:
    """`value` converted to the type of `held`, the field's present value: YAML reads 1e-3 as text
    and 1 as an int, both of which a float field takes. ValueError for another type."""
    if isinstance(held, bool) or isinstance(value, bool):
        require(
            held is None or isinstance(held, bool) == isinstance(value, bool),
            f"{name} must {'be true or false' if isinstance(held, bool) else 'not be a boolean'}, "
            f"got {value}",
        )
        return value
    if isinstance(held, float) and isinstance(value, int | str):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {value}") from None
    if isinstance(held, int) and not isinstance(value, int) and name != "workers":
        raise ValueError(f"{name} must be a whole number, got {value}")
    if dataclasses.is_dataclass(held) and not dataclasses.is_dataclass(value) and value is not None:
        raise ValueError(f"{name} must be a mapping of fields, got {value}")
    return value
