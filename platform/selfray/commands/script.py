"""What the commands share: flags, a quiet console, one-line errors and exit codes.

Exit code 0: done. 1: a run failed, its cause is shown. 2: bad input, nothing was started.
130: interrupted, the same command continues.
"""

import logging
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from selfray import config
from selfray.cluster import runtime
from selfray.cluster.runtime import Console

if TYPE_CHECKING:  # torch takes seconds to import, and `selfray shards` needs none
    from mlflow import MlflowClient

    from selfray.cluster.launch import RunResult
    from selfray.experiment import Experiment
    from selfray.sweeps.question import Axis, Question, Range

BAD_INPUT = 2
INTERRUPTED = 130

log = logging.getLogger(__name__)


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


def run_experiment(
    recipes: "Mapping[str, Experiment]",
    description: str,
    ray: runtime.Starting,
    started: float,
    then: "Callable[[Experiment, RunResult, Console], None] | None" = None,
) -> int:
    """`pretrain.py`'s whole life: parse, launch, report, and `then`. Returns the exit code."""

    def main() -> int:
        try:
            experiment = parse(recipes, description)
            return with_console(
                log_folder(experiment.output),
                lambda console: _launch(experiment, console, ray, started, then),
            )
        finally:
            ray.stop()

    return one_line_errors(main)


def parse(recipes: "Mapping[str, Experiment]", description: str) -> "Experiment":
    """The Experiment that the command line asks for; argparse's exit code 2 where it is wrong."""
    named = {name: replace(recipe, name=name) for name, recipe in recipes.items()}
    command = tyro.extras.subcommand_type_from_defaults(
        named, {name: _first_line(recipe) for name, recipe in named.items()}
    )
    # A schedule's kind stays what the recipe has; only its numbers are flags.
    settings = (tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed)
    experiment = tyro.cli(
        command,  # type: ignore[arg-type]
        description=description,
        config=settings,
        registry=_own_rules(),
    )
    return replace(experiment, output=runtime.lasting(experiment.output))


def _own_rules() -> ConstructorRegistry:
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


class BadSetting(Exception):  # noqa: N818 - it is the setting that is bad
    """A value that a config refuses. No ValueError, which tyro would frame and give its own words:
    a config's message names the field and the way out in one line."""


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


def _first_line(experiment: "Experiment") -> str:
    return (
        f"{experiment.method.name} on {experiment.encoder.name} at {experiment.encoder.image_size} "
        f"pixels, {experiment.epochs} epochs of batch {experiment.batch_size}"
    )


def _launch(
    experiment: "Experiment",
    console: Console,
    ray: runtime.Starting,
    started: float,
    then: "Callable[[Experiment, RunResult, Console], None] | None",
) -> int:
    from selfray.cluster.launch import launch

    with ray.session():
        result = launch(experiment, console, started=started)
    if then is not None:
        then(experiment, result, console)
    return 0


SHORT_EPOCHS = 20
"""Epochs of each run of a sweep over the embedded digits, where none are given: minutes in all."""


@dataclass(frozen=True)
class SweepFlags:
    """What all sweeps have in common; each script adds what it varies."""

    recipe: str = ""
    """The recipe that is varied."""
    data: str | None = None
    """Images: as --data.path of pretrain.py; None takes the recipe's."""
    test_data: str | None = None
    """Labelled images for the probes' test, where `data` holds none of its own."""
    epochs: int | None = None
    """Epochs of each run; None takes 20 for the embedded digits, else the recipe's."""
    batch_size: int | None = None
    """None takes the recipe's."""
    workers: int | str | None = None
    """Train workers of each run, such as 2 or 1:4; None takes the recipe's."""
    seeds: int = 1
    """Runs of each value, with seeds 0, 1, ...: what tells a difference from chance."""
    probes: int = 4
    """Checkpoints of each run, every one of them probed beside the training."""
    search: Literal["grid", "random", "optuna", "population"] = "grid"
    """Which values are tried: all that are given; some of them, or some between two bounds, drawn
    at random; drawn where the ones before did well (Optuna's TPE); or runs side by side, of which
    the worse take over from the better and vary (population-based training, for schedules)."""
    samples: int = 8
    """Values that a search draws, or members of a population."""
    rank_by: Literal["knn", "linear", "rankme", "uniformity", "alignment"] | None = None
    """What ranks the runs; None takes the probe that judges the method, and RankMe where the
    images have no labels (not for MAE and BEiT, which it misleads about)."""
    stop_worse: bool = False
    """Stop runs that are not among the best at a rung (ASHA), judged at their checkpoints."""
    stop_by: Literal["knn", "linear", "rankme", "uniformity", "alignment"] | None = None
    """What runs are stopped by; None takes what ranks."""
    first_rung: float = 0.25
    """Share of the images that every run sees before it may be stopped."""
    rung_factor: float = 2.0
    """One run in this many goes on from each rung."""
    at_once: int | None = None
    """Runs at a time; None takes as many as the cluster holds."""
    output: str = "runs"
    """Folder of everything that is written; local, s3:// or gs://. A job's relative one is kept
    under ~/selfray of the machine that runs the job."""

    def base(self, recipes: "Mapping[str, Experiment]", *methods: str) -> "Experiment":
        """The recipe with these flags. ValueError where it is none, or of no method that fits."""
        fitting = [name for name, r in recipes.items() if r.method.name in methods]
        if self.recipe not in fitting:
            raise ValueError(
                f"--recipe {self.recipe} cannot be swept here: give one of {', '.join(fitting)}"
            )
        recipe = recipes[self.recipe]
        given = {
            "data.path": self.data,
            "data.test_path": self.test_data,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "workers": self.workers,
            "probe.times": self.probes,
            "output": runtime.lasting(self.output),
        }
        changes = {path: value for path, value in given.items() if value is not None}
        base = config.override(recipe, **changes)
        if self.epochs is None and base.data.path.startswith("embedded:"):
            base = replace(base, epochs=min(SHORT_EPOCHS, base.epochs))
        return base

    def question(self, name: str, *axes: "Axis | Range") -> "Question":
        """What these flags ask of some axes. ValueError where it makes no sense."""
        from selfray.sweeps.question import Halving, Question

        halving = Halving(self.stop_by, self.first_rung, self.rung_factor)
        if not self.stop_worse and self.stop_by is not None:
            raise ValueError(f"--stop-by {self.stop_by} stops nothing without --stop-worse")
        return Question(
            name,
            axes,
            self.rank_by,
            self.seeds,
            self.search,
            self.samples,
            self.probes if self.search == "population" else 4,
            halving if self.stop_worse else None,
        )


def run_sweep(
    flags: SweepFlags,
    base: "Experiment",
    question: "Question",
    words: str,
    ray: runtime.Starting,
) -> int:
    """A sweep script's life after its flags are read. Returns the exit code."""
    from selfray.cluster.sweep.run import sweep

    def body(console: Console) -> int:
        with ray.session():
            result = sweep(base, question, words, console, at_once=flags.at_once)
        return 1 if any(outcome.failure for outcome in result.outcomes) else 0

    try:
        return with_console(log_folder(base.output), body)
    finally:
        ray.stop()


def log_folder(output: str) -> Path:
    """Where a command's own log lies: on this machine, wherever its output goes."""
    return Path(output if "://" not in output else runtime.lasting("runs")) / "logs"


def with_console(folder: Path, body: Callable[[Console], int]) -> int:
    """Run `body` with everything but its own words going to a log file in `folder`."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"--output: {folder} cannot be made ({error.strerror}): give --output another folder"
        ) from None
    with runtime.quiet_console(folder / name) as console:
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        # `ray job stop`, a batch system and `kill` send SIGTERM: the run is to end as by Ctrl-C.
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            return body(console)
        except KeyboardInterrupt:
            console.say("interrupted: the same command continues from the last checkpoint")
            return INTERRUPTED
        except RuntimeError as error:
            from selfray.cluster.endings import RunFailed

            if not isinstance(error, RunFailed):
                raise
            console.say(f"error: {error}")
            console.say(f"the full log: {console.log}")
            return 1
        except (ValueError, OSError) as error:
            log.exception("bad input")
            console.say(f"error: {error}")
            return BAD_INPUT


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def one_line_errors(main: Callable[[], int]) -> int:
    """Run `main`; bad input is one line on standard error, and exit code 2."""
    try:
        code = main()
        if code == INTERRUPTED:
            # Threads of Ray and MLflow may still be in native code, and Python's own way out would
            # then abort with exit code -6.
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code
    except (BadSetting, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def mlflow_tags(uri: str, run_id: str) -> dict[str, str]:
    """The tags of an MLflow run. ValueError where there is no such run, ConnectionError where
    there is no answer."""
    with asking_mlflow(uri) as (client, where):
        from mlflow.exceptions import MlflowException

        try:
            return client.get_run(run_id).data.tags
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
    raise ValueError(
        f"there is no MLflow run {run_id} in {where}: name the store that has it with --tracking "
        "or MLFLOW_TRACKING_URI"
    )


def count_mlflow_experiments(uri: str) -> tuple[str, int]:
    """(the store without its password, how many experiments it has at most 1000). ConnectionError
    where there is no answer."""
    with asking_mlflow(uri) as (client, where):
        return where, len(client.search_experiments(max_results=1000))


@contextmanager
def asking_mlflow(uri: str) -> "Iterator[tuple[MlflowClient, str]]":
    """A client that asks once and does not wait for minutes."""
    from selfray.cluster.tracking import QUIET_AND_QUICK, database_file, without_password

    for name, value in QUIET_AND_QUICK.items():
        os.environ.setdefault(name, value)
    where = without_password(uri)
    database = database_file(uri)
    if database is not None and not Path(database).exists():  # MLflow would make an empty one
        raise ConnectionError(
            f"there is no MLflow store at {database}: name one with --tracking or "
            "MLFLOW_TRACKING_URI"
        )
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield MlflowClient(tracking_uri=uri), where
    except (MlflowException, SQLAlchemyError) as error:
        log.exception("MLflow")
        text = str(error).replace(uri, where)
        refused = re.search(r"Caused by .*: (.*?)[\"')]*$", text)
        cause = refused[1] if refused else textwrap.shorten(text, 160, placeholder=" ...")
        raise ConnectionError(
            f"the MLflow store {where} cannot be used ({cause}): start or mend it, or name another "
            "with --tracking or MLFLOW_TRACKING_URI"
        ) from None
