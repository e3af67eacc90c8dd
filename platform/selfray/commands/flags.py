"""How flags are declared and read: help in flowing text, a config's own words where it refuses."""

from collections.abc import Callable
from dataclasses import is_dataclass, replace
from functools import partial
from typing import Annotated, Any

import tyro
from tyro.conf import Positional
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)


def flag(text: str, metavar: str | None = None, default: str | None = None) -> Any:
    """A flag's help. Not its docstring: tyro would keep the line breaks of the source.

    `default` says in words what happens without the flag; None shows the value.
    """
    hint = None if default is None else f"(default: {default})" if default else ""
    return tyro.conf.arg(help=" ".join(text.split()), metavar=metavar, help_behavior_hint=hint)


TrackingFlag = Annotated[
    str | None,
    flag("Where MLflow is.", "URI", "MLFLOW_TRACKING_URI, else runs/mlflow.db"),
]

CheckpointArgument = Annotated[
    Positional[str],
    flag(
        """Run folder (its newest whole checkpoint is taken), or one checkpoint's folder; local,
        s3:// or gs://; or mlruns:/RUN_ID for a run in MLflow.""",
        "CHECKPOINT",
    ),
]


class BadSetting(Exception):  # noqa: N818 - it is the setting that is bad
    """A value that a config refuses. No ValueError, which tyro would frame and give its own words:
    a config's message names the field and the way out in one line."""


def own_rules() -> ConstructorRegistry:
    """tyro's own rules, but with every field's docstring as one paragraph, and a config's own
    message where it refuses a value.

    tyro joins the lines of a docstring only where they are not indented, as a field's always are;
    and it leaves the docstring out where the field's type is a union, such as Schedule.
    """
    registry = ConstructorRegistry()
    asking_tyro = False

    @registry.struct_rule
    def dataclass_in_our_words(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking_tyro
        if asking_tyro or not is_dataclass(info.type):
            return None
        asking_tyro = True  # so that this rule passes, and tyro's rule for dataclasses answers
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking_tyro = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        fields = tuple(map(_with_flowing_help, spec.fields))
        return replace(spec, instantiate=partial(_checked, spec.instantiate), fields=fields)

    return registry


def _checked(instantiate: Callable[..., Any], *values: Any, **fields: Any) -> Any:
    try:
        return instantiate(*values, **fields)
    except ValueError as error:
        raise BadSetting(str(error)) from None


def _with_flowing_help(field: StructFieldSpec) -> StructFieldSpec:
    kind = type(field.default) if is_dataclass(field.default) else field.type
    return replace(field, type=kind, helptext=partial(_one_paragraph, field.helptext))


def _one_paragraph(text: str | Callable[[], str | None] | None) -> str | None:
    text = text() if callable(text) else text  # tyro reads docstrings only when help is shown
    return None if text is None else " ".join(text.split())
