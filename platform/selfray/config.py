"""Frozen dataclasses <-> JSON: how an Experiment travels to workers, checkpoints and MLflow."""

import dataclasses
import importlib
import json
import textwrap
from collections.abc import Mapping
from functools import lru_cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from selfray import plugins

TYPE_KEY = "type"
MOVED: Mapping[str, str] = {"selfray.sweep": "selfray.sweeps.question"}
"""The module name written in files -> the module that holds the config today. Run ids are hashes of
these names and checkpoints contain them, so a config that moves keeps its first name."""
_WRITTEN = {today: written for written, today in MOVED.items()}
_ADDED = "added"
PLACEMENT = frozenset(
    {
        "workers",
        "gpus_per_worker",
        "cpus_per_worker",
        "worker_resources",
        "data_cpus",
        "output",
        "max_failures",
        "log_every",
        "guard",
        "compile",
        "shard",
        "log_model",
    }
)
"""The fields of an Experiment that say where and how a run is carried out; run ids ignore them.
They are listed here because the comparison of runs does not import torch."""


_SAME: Any = object()


def added(default: Any, before: Any = _SAME) -> Any:
    """A dataclass field added after runs had been written without it.

    `before` is the value that describes those older runs; by default it is the field's default. The
    field is left out of JSON while it has this value, and a file without the field is read as
    having it. So older runs keep their ids and older checkpoints stay readable.
    """
    before = default if before is _SAME else before
    return dataclasses.field(default=default, metadata={_ADDED: before})


def type_name(kind: type) -> str:
    """The name of a config's type as files write it, such as `selfray.views:View`."""
    return f"{_WRITTEN.get(kind.__module__, kind.__module__)}:{kind.__qualname__}"


def to_json(value: Any) -> Any:
    """Convert a config into a JSON value: dataclasses become objects with a "type" key.

    Raises TypeError for values other than plain ones, sequences, mappings and dataclasses.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: to_json(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not (_ADDED in f.metadata and getattr(value, f.name) == f.metadata[_ADDED])
        }
        return {TYPE_KEY: type_name(type(value)), **fields}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a config holds plain values and dataclasses, not {type(value).__name__}")


def from_json(value: Any) -> Any:
    """The inverse of to_json; validation in __post_init__ runs again.

    Only frozen dataclasses of `selfray` and of plugins that the user named are built, so a file
    from a stranger cannot run other code. Raises ValueError for unknown types and fields.
    """
    if isinstance(value, list):
        return tuple(from_json(item) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {key: from_json(item) for key, item in value.items() if key != TYPE_KEY}
    if TYPE_KEY not in value:
        return fields
    kind = config_type(value[TYPE_KEY])
    unknown = set(fields) - {f.name for f in dataclasses.fields(kind)}
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no field {', '.join(sorted(unknown))}: "
            "the file was written by another version of selfray"
        )
    needed = {
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := needed - set(fields):
        raise ValueError(
            f"{kind.__name__} lacks {', '.join(sorted(missing))}: "
            "the file was written by another version of selfray"
        )
    for name, item in fields.items():
        require_type(kind, name, item)
    before = {f.name: f.metadata[_ADDED] for f in dataclasses.fields(kind) if _ADDED in f.metadata}
    return kind(**before | fields)


def require_type(kind: type, name: str, value: Any) -> None:
    """Raise ValueError unless a value is of the type of a config's field."""
    hint = _hints(kind).get(name, Any)
    if not _fits(value, hint):
        shown = textwrap.shorten(repr(value), 60, placeholder=" ...")
        raise ValueError(f"{kind.__name__}: {name} must be {_named(hint)}, got {shown}")


@lru_cache(maxsize=256)
def _hints(kind: type) -> Mapping[str, Any]:
    """The types of a config's fields; empty if a plugin's hints cannot be resolved here."""
    try:
        return get_type_hints(kind)
    except (NameError, TypeError):
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type. A type that is not known here fits anything."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is Literal:
        return value in inside
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inside[1:] == (...,):
            return all(_fits(item, inside[0]) for item in value)
        return len(value) == len(inside) and all(map(_fits, value, inside))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and (hint in (bool, str) or dataclasses.is_dataclass(hint)):
        return isinstance(value, hint)
    return True


def _named(hint: Any) -> str:
    """A field's type for a message."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_named, inside))
    if origin is Literal:
        return "one of " + ", ".join(map(str, inside))
    known = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    if hint in (None, type(None)):
        return "null"
    if origin is tuple:
        count = "" if inside[1:] == (...,) else f"{len(inside)} "
        return f"a list of {count}values"
    return known.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def config_type(name: object) -> type:
    """The frozen dataclass that a "type" names.

    Raises ValueError if it does not belong to selfray or to a plugin that the user named.
    """
    module, _, qualname = str(name).partition(":")
    if not plugins.allows(module):
        raise ValueError(
            f"a config may only name types of selfray, got {name}: if {module} is your plugin, "
            f"name it with --plugin {module} or in {plugins.VARIABLE}"
        )
    try:
        kind = getattr(importlib.import_module(MOVED.get(module, module)), qualname)
    except (ImportError, AttributeError):
        owner = "this version of selfray" if module.split(".")[0] == "selfray" else module
        raise ValueError(f"{owner} has no {name}") from None
    is_config = isinstance(kind, type) and dataclasses.is_dataclass(kind)
    if not (is_config and kind.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise ValueError(f"{name} is not a config")
    return kind


def dumps(value: Any) -> str:
    return json.dumps(to_json(value), indent=1)


def loads(text: str | bytes) -> Any:
    return from_json(json.loads(text))


def to_yaml(value: Any) -> str:
    """A config as YAML with its types; `from_json` takes the parsed text."""
    import yaml

    return yaml.safe_dump(to_json(value), sort_keys=False, allow_unicode=True)


def override(config: Any, **changes: Any) -> Any:
    """A copy with dotted fields replaced: override(experiment, **{"method.mask_ratio": 0.6})."""
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        names = [f.name for f in dataclasses.fields(config)]
        if head not in names:
            raise ValueError(
                f"{type(config).__name__} has no field {head!r}; it has {', '.join(names)}"
            )
        if rest:
            value = override(getattr(config, head), **{rest: value})
        config = dataclasses.replace(config, **{head: value})
    return config


def differences(ours: Any, theirs: Any) -> list[str]:
    """One line for each field that differs between two configs: `batch_size: 256, was 512`."""
    left, right = flatten(to_json(ours)), flatten(to_json(theirs))
    return [
        f"{name}: {left.get(name, 'absent')}, was {right.get(name, 'absent')}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as dotted names; lists of plain values stay whole."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if key == TYPE_KEY:
            item = str(item).rpartition(":")[2]
        flat |= flatten(item, name)
    return flat
