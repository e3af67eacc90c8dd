"""The names of timm's models, read from its source without importing it, which takes seconds: a
config checks its encoder's name."""

import difflib
import importlib.util
import re
from functools import lru_cache
from pathlib import Path

from selfray import plugins

_REGISTERED = re.compile(r"^@register_model\b.*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


@lru_cache
def known() -> dict[str, str]:
    """Model name -> module of timm.models that builds it. Empty if timm's source cannot be read."""
    found = importlib.util.find_spec("timm")
    places = found.submodule_search_locations if found is not None else None
    names: dict[str, str] = {}
    for file in sorted(Path(next(iter(places or ["timm"])), "models").glob("*.py")):
        names |= dict.fromkeys(_REGISTERED.findall(file.read_text("utf-8")), file.stem)
    return names


def is_model(name: str) -> bool:
    """Whether timm builds a model of this name, with or without the tag of its weights."""
    if name.partition(".")[0] in known():
        return True
    import timm  # deprecated names, and models that the user registered

    plugins.loaded()
    return timm.is_model(name)


def built_by(name: str) -> str:
    """The module that builds a model, such as `timm.models.eva`."""
    arch = name.partition(".")[0]
    if arch in known():
        return f"timm.models.{known()[arch]}"
    import timm

    return timm.model_entrypoint(name).__module__


def similar(name: str) -> list[str]:
    """At most three known names with a similar spelling."""
    return difflib.get_close_matches(name, sorted(known()), n=3)
