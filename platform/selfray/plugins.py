"""Methods, encoders and protocols of a user's own package, which selfray imports by module name.

A config's JSON names types, and reading it imports their modules. So only modules that the user
named are allowed: by --plugin my_package.barlow, by SELFRAY_PLUGINS, or by installing a package
with an entry point in the group `selfray.plugins`. The driver passes the names to workers in
SELFRAY_PLUGINS; a file alone can never add one.
"""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

VARIABLE = "SELFRAY_PLUGINS"
GROUP = "selfray.plugins"
FLAG = "--plugin"


def named() -> tuple[str, ...]:
    """The modules that the user named, in flags or in the environment."""
    return tuple(filter(None, os.environ.get(VARIABLE, "").split(",")))


@lru_cache
def installed() -> tuple[str, ...]:
    """The modules that installed packages register."""
    return tuple(point.module for point in importlib.metadata.entry_points(group=GROUP))


def allows(module: str) -> bool:
    """Whether a config may name types of a module: one of selfray, a plugin, or one inside it."""
    if module.split(".")[0] == "selfray":
        return True
    inside = (*named(), *installed())
    return any(module == name or module.startswith(f"{name}.") for name in inside)


def take(arguments: Sequence[str]) -> list[str]:
    """Load each `--plugin MODULE` of a command line, also for child processes, and return the other
    arguments. Raises ValueError if a module is missing or cannot be imported."""
    rest, words = [], iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != FLAG:
            rest.append(word)
            continue
        module = value if equals else next(words, "")
        if not module or module.startswith("-"):
            raise ValueError(f"{FLAG} takes a module of your own, such as my_package.barlow")
        load(module)
    return rest


def load(module: str) -> ModuleType:
    """Import a plugin and allow its types from now on. Raises ValueError with the reason if it
    cannot be imported."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` does
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{FLAG} {module} cannot be imported ({error}): install its package, or start in the "
            "folder that holds it"
        ) from None
    if module not in named():
        os.environ[VARIABLE] = ",".join((*named(), module))
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if os.getcwd() not in folders and (getattr(found, "__file__", None) or "").startswith(
        os.getcwd() + os.sep
    ):
        # Workers that Ray starts on this machine look there.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (*folders, os.getcwd())))
    return found


def loaded() -> list[ModuleType]:
    """All plugins, imported: what they register, such as encoders of timm, is known then."""
    return [importlib.import_module(name) for name in dict.fromkeys((*named(), *installed()))]


def recipes() -> dict:
    """Experiments by name, from the variable RECIPES of each plugin."""
    return _variables("RECIPES")


def protocols() -> dict:
    """Protocols of `selfray evaluate` by name, from the variable PROTOCOLS of each plugin."""
    return _variables("PROTOCOLS")


def _variables(variable: str) -> dict:
    found: dict = {}
    for module in loaded():
        found |= getattr(module, variable, {})
    return found
