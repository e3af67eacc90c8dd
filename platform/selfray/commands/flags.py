"""Declares and parses command-line flags with tyro: help as paragraphs, errors as one line."""

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

from selfray.check import require
from selfray.commands.words import nearest


def require_positive(settings: Any, names: Sequence[str], prefix: str = "") -> None:
    """ValueError that names the flag, such as --PREFIXbatch-size, unless these fields of a command
    are positive or None."""
    for name in names:
        value = getattr(settings, name)
        flag_name = f"--{prefix}{name.replace('_', '-')}"
        require(value is None or value > 0, f"{flag_name} must be positive, got {value}")


def flag(text: str, metavar: str | None = None, default: str | None = None) -> Any:
    """An annotation with a flag's help; in a field's docstring tyro would keep the line breaks.

    Args:
        text: the help, whose white space is collapsed.
        metavar: the placeholder of the value, such as PATH.
        default: the default in words; None shows the value, "" shows nothing.
    """
    hint = None if default is None else f"(default: {default})" if default else ""
    return tyro.conf.arg(help=" ".join(text.split()), metavar=metavar, help_behavior_hint=hint)


TrackingFlag = Annotated[
    str | None,
    flag("MLflow's tracking URI.", "URI", "MLFLOW_TRACKING_URI, else runs/mlflow.db"),
]

ImageColumnFlag = Annotated[
    str | None, flag("Parquet column of the images.", "NAME", "found by its type")
]
LabelColumnFlag = Annotated[
    str | None, flag("Parquet column of the labels.", "NAME", "found by its name")
]
GroupByFlag = Annotated[
    str | None,
    flag(
        """Keep all images of a patient, slide or scene on one side of the held-out split: a Parquet
        column that names it, or a regular expression with a group in parentheses that finds it in
        the images' paths, such as '(patient[0-9]+)'.""",
        "COLUMN|REGEX",
        "images are held out one by one",
    ),
]
DeviceGpusFlag = Annotated[
    float | None,
    flag(
        "GPUs of each task that computes features, such as 0.5 for two tasks on each GPU.",
        "GPUS",
        "1 if the cluster has a GPU, else 0",
    ),
]
JsonFlag = Annotated[
    str | None, flag("Also write the numbers to this JSON file.", "FILE", "not written")
]

CheckpointArgument = Annotated[
    Positional[str],
    flag(
        """Run folder (of which the newest complete checkpoint is used), or one checkpoint's folder,
        local, s3:// or gs://; or mlruns:/RUN_ID for a run in MLflow.""",
        "CHECKPOINT",
    ),
]


class BadSetting(Exception):  # noqa: N818 - names the bad thing, as KeyError does
    """A command line or config value is invalid; the message names the field and a remedy in one
    line. Not a ValueError, because tyro would catch that and print a framed message of its own."""


def read(kind: Any, arguments: Sequence[str], prog: str, **settings: Any) -> Any:
    """Parse a command line into an instance of `kind`.

    Args:
        kind: a dataclass, or a union of sub-commands.
        arguments: the words after the command.
        prog: the command, as help and messages show it.
        settings: further arguments of `tyro.cli`, such as description, default and config.

    Raises:
        BadSetting: one line with the flag, the value it takes, and the nearest name for a typo.
        SystemExit: with code 0, after help was shown.
    """

    def refuse(event: tyro_errors.ParseErrorEvent) -> NoReturn:
        raise BadSetting(_worded(event, partial(_names, kind, settings)))

    with tyro_errors.on_parse_error(refuse):
        # Help texts of sub-commands keep their line breaks; those of config fields are re-wrapped.
        rules = None if "config" in settings and "default" not in settings else own_rules()
        return tyro.cli(kind, args=arguments, prog=prog, registry=rules, **settings)


EXPERIMENT_FLAGS = (tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed)
"""The recipe fixes the type of a schedule; only its numbers are flags."""


def flags_with_values(default: Any) -> dict[str, str]:
    """Flags that set a config's fields -> the type of value each takes, such as FLOAT."""
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
        # Deprecated, but tyro offers no replacement that lists the names of all flags.
        warnings.simplefilter("ignore", DeprecationWarning)
        return tyro.extras.get_parser(kind, registry=own_rules(), **settings)


def _worded(event: tyro_errors.ParseErrorEvent, names: Callable[[], list[str]]) -> str:
    """The one-line message for a parse error of tyro."""
    where = f"see {event.prog} --help"
    match event:
        case tyro_errors.UnrecognizedArgs(tokens=tokens):
            flag = next((t for t in tokens if t.startswith("-")), tokens[0]).partition("=")[0]
            return f"{flag} is not a flag of {event.prog}{nearest(flag, names())}"
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
    return f"{event.prog} cannot parse its arguments: {where}"


def _called(argument: Any) -> str:
    """An argument's name as the user types it: its flag, or the placeholder of a positional one."""
    name = argument.lowered.name_or_flags[0]
    return name if name.startswith("-") else str(argument.lowered.metavar)


def own_rules() -> ConstructorRegistry:
    """A registry of tyro that shows every field's docstring as one paragraph, and passes on the
    message of a config that refuses a value.

    tyro by itself joins the lines of a docstring only if they are not indented, which a field's
    always are, and omits the docstring of a field whose type is a union, such as Schedule.
    """
    registry = ConstructorRegistry()
    asking_tyro = False

    @registry.struct_rule
    def dataclass_in_our_words(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking_tyro
        if asking_tyro or not is_dataclass(info.type):
            return None
        asking_tyro = True  # skips this rule in the nested call, so that tyro's own rule applies
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
