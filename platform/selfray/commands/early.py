"""Checks of a command line before torch is imported: an unknown recipe or flag, a missing path.

torch takes seconds to import and Ray longer to start; a typo is reported before either.
`flags.json` lists each recipe's flags; `make flags` writes it from the recipes, and a test compares
the two.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from selfray.check import require
from selfray.commands.words import nearest

TABLE = "flags.json"
OF_ALL = "*"
BEFORE_FLAGS = ("--config", "--print-config", "--plugin", "--tracking", "--yes")
"""Flags of the command itself, which every recipe takes."""


def refuse(arguments: Sequence[str], recipes: Iterable[str], prog: str) -> None:
    """Raise ValueError for an unknown recipe or flag or a bad number, FileNotFoundError for a
    missing path.

    Args:
        arguments: the recipe's name, then flags as `--flag value` or `--flag=value`.
        recipes: names that may be given.
        prog: the command, for messages.
    """
    if not arguments or "--plugin" in arguments or "--help" in arguments or "-h" in arguments:
        return
    if not arguments[0].startswith("-"):
        recipe = arguments[0]
        names = sorted(recipes)
        require(recipe in names, f"there is no recipe {recipe}{nearest(recipe, names)}")
    elif "--config" not in arguments:
        raise ValueError(
            f"{arguments[0]}: the recipe comes first: {prog} RECIPE {arguments[0]} ..."
        )
    else:
        return  # the flags depend on the file, which is read later
    known = flags_of(recipe)
    if known is None:
        return
    given = given_flags(arguments[1:])
    for flag, values in given:
        if flag in BEFORE_FLAGS:
            continue
        require(flag in known, f"{flag} is not a flag of {recipe}{nearest(flag, known)}")
        _check_values(flag, values, known[flag])
    for flag, values in given:
        if flag in ("--data.path", "--data.test-path") and values:
            check_path(values[0], flag)


def refuse_mlflow_ids() -> None:
    """Raise ValueError for variables by which MLflow's users name a run or an experiment by id. A
    run of selfray has a run of its own, which it finds again by its folder."""
    for name, instead in (
        ("MLFLOW_RUN_ID", "each run of selfray has one of its own: unset it"),
        ("MLFLOW_EXPERIMENT_ID", "name the experiment by MLFLOW_EXPERIMENT_NAME and unset it"),
    ):
        require(not os.environ.get(name), f"{name} is set, but {instead}")


def flags_of(recipe: str) -> Mapping[str, str] | None:
    """A recipe's flags with the type of value each takes, such as FLOAT; None for an unknown
    recipe."""
    table = json.loads(resources.files("selfray.commands").joinpath(TABLE).read_text("utf-8"))
    own = table["recipes"].get(recipe)
    return None if own is None else table["flags"][OF_ALL] | table["flags"][own]


def given_flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Flags with their values; a word that begins with two dashes is a flag."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found.append((flag.replace("_", "-"), [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise ValueError(f"{word}: a flag such as --epochs is missing before it")
    return found


def _check_values(flag: str, values: Sequence[str], takes: str) -> None:
    kind = {"INT": int, "FLOAT": float}.get(takes)
    if kind is not None:
        require(len(values) == 1, f"{flag} takes one number, got {' '.join(values) or 'none'}")
        try:
            kind(values[0])
        except ValueError:
            words = "a whole number" if kind is int else "a number"
            raise ValueError(f"{flag} takes {words}, got {values[0]}") from None
    elif takes.startswith("{") and takes.endswith("}") and "[" not in takes:
        choices = takes[1:-1].split(",")
        require(
            len(values) == 1 and values[0] in choices,
            f"{flag} must be one of {', '.join(choices)}, got {' '.join(values) or 'nothing'}",
        )


def check_path(path: str, flag: str) -> None:
    """FileNotFoundError for a missing local path. URLs and glob patterns are checked later."""
    if "://" in path or "*" in path or path.startswith("embedded:") or not path:
        return
    if not os.path.exists(os.path.expanduser(path)):
        raise FileNotFoundError(
            f"{flag} {path} does not exist: give a folder of images or Parquet files, local, "
            "s3:// or gs://"
        )


def table(recipes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `flags.json`: the flags that all recipes share under OF_ALL, and the further
    flags of each group of recipes with the same flags, under the name of the group's first recipe.
    """
    from selfray.commands.flags import flags_with_values

    found = {name: flags_with_values(recipe) for name, recipe in recipes.items()}
    shared = dict(set.intersection(*(set(flags.items()) for flags in found.values())))
    groups: dict[str, str] = {}
    flags: dict[str, dict[str, str]] = {OF_ALL: dict(sorted(shared.items()))}
    of: dict[str, str] = {}
    for name, own in sorted(found.items()):
        rest = {flag: takes for flag, takes in sorted(own.items()) if flag not in shared}
        of[name] = groups.setdefault(json.dumps(rest), name)
        flags[of[name]] = rest
    return {"recipes": of, "flags": flags}


def main() -> None:
    from selfray.recipes import every

    sys.stdout.write(json.dumps(table(every()), indent=1) + "\n")


if __name__ == "__main__":
    main()
