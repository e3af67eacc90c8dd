"""How flags are declared and read: help in flowing text, and one line for whatever is refused."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from functools import partial
from typing import Annotated, Any, NoReturn

import tyro
from tyro import _errors as tyro_errors  # 1.0.17 has no public way to word an error
from tyro.conf import Positional
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from selfray.commands.words import nearest


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

ImageColumnFlag = Annotated[
    str | None, flag("Parquet column of the images.", "NAME", "found by its type")
]
LabelColumnFlag = Annotated[
    str | None, flag("Parquet column of the labels.", "NAME", "found by its name")
]
DeviceGpusFlag = Annotated[
    float | None,
    flag(
        "GPUs of each task that computes features, such as 0.5 for two tasks on each GPU.",
        "GPUS",
        "1 if there is any, else 0",
    ),
]
JsonFlag = Annotated[
    str | None, flag("Write the numbers to this file, too.", "FILE", "not written")
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


def read(kind: Any, arguments: Sequence[str], prog: str, **settings: Any) -> Any:
    """What a command line asks for.

    Args:
        kind: a dataclass, or a union of sub-commands.
        arguments: the words after the command.
        prog: the command, as help and messages show it.
        settings: more of `tyro.cli`, such as description, default and config.

    Raises:
        BadSetting: one line with the flag, what it takes, and the nearest name for a typo.
        SystemExit: with code 0, after help was shown.
    """

    def refuse(event: tyro_errors.ParseErrorEvent) -> NoReturn:
        raise BadSetting(_worded(event, partial(_names, kind, settings)))

    with tyro_errors.on_parse_error(refuse):
        # Sub-commands show their docstrings as they are written; fields of configs flow.
        rules = None if "config" in settings and "default" not in settings else own_rules()
        return tyro.cli(kind, args=arguments, prog=prog, registry=rules, **settings)


EXPERIMENT_FLAGS = (tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed)
"""A schedule's kind stays what the recipe has; only its numbers are flags."""


def flags_with_values(default: Any) -> dict[str, str]:
    """The flags that set a config's fields, each with what it takes, such as FLOAT."""
    found = {}
    for action in _parser(type(default), default=default, config=EXPERIMENT_FLAGS)._actions:
        for flag in action.option_strings:
            if flag not in ("-h", "--help"):
                found[flag] = "" if action.metavar is None else str(action.metavar)
    return found


def _names(kind: Any, settings: dict[str, Any]) -> list[str]:
    known = {name: settings[name] for name in ("default", "config") if name in settings}
    return [flag for action in _parser(kind, **known)._actions for flag in action.option_strings]


def _parser(kind: Any, **settings: Any) -> Any:
    with warnings.catch_warnings():
        # Deprecated for no successor: what else tells the names of all flags?
        warnings.simplefilter("ignore", DeprecationWarning)
        return tyro.extras.get_parser(kind, registry=own_rules(), **settings)


def _worded(event: tyro_errors.ParseErrorEvent, names: Callable[[], list[str]]) -> str:
    """A refused command line in one line."""
    where = f"see {event.prog} --help"
    match event:
        case tyro_errors.UnrecognizedArgs(tokens=tokens):
            flag = next((t for t in tokens if t.startswith("-")), tokens[0]).partition("=")[0]
            return f"{flag} is no flag of {event.prog}{nearest(flag, names())}"
        case tyro_errors.MissingArgs(missing_arguments=missing):
            given = ", ".join(_called(a.arg) for a in missing)
            return f"{given} is missing: {where}"
        case tyro_errors.MissingSubcommand(subcommand_spec=spec, found_token=token):
            known = list(spec.parser_from_name)
            if token is None:
                return f"{event.prog} needs one of {', '.join(known)}"
            return f"{event.prog} has no {token}{nearest(token, known)}"
        case tyro_errors.InvalidChoice(argument=argument, value=value, choices=choices):
            return f"{_called(argument)} must be one of {', '.join(choices)}, got {value}"
        case tyro_errors.BadValue(argument=argument, offending_value=value):
            if value is None and argument.is_positional():
                return f"{_called(argument)} is missing: {where}"
            taken = value or "too few values"
            return f"{_called(argument)} takes {argument.lowered.metavar}, got {taken}"
        case tyro_errors.InstantiationFailure(message=message, argument=argument):
            flag = "" if argument is None else f"{_called(argument)}: "
            return flag + " ".join(str(message).split())
    return f"{event.prog} does not understand this: {where}"


def _called(argument: Any) -> str:
    """An argument as its user knows it."""
    name = argument.lowered.name_or_flags[0]
    return name if name.startswith("-") else str(argument.lowered.metavar)


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
