"""The life of a script: flags read, a quiet console, one-line errors and exit codes.

Exit code 0: done. 1: a run failed, its cause is shown. 2: bad input, nothing was started.
130: interrupted, the same command continues.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from selfray.cluster import runtime
from selfray.cluster.runtime import Console
from selfray.commands.flags import BadSetting, own_rules
from selfray.commands.start_flags import with_encoder_of_start

if TYPE_CHECKING:  # torch takes seconds to import, and `selfray shards` needs none
    from selfray.cluster.launch import RunResult
    from selfray.experiment import Experiment

BAD_INPUT = 2


INTERRUPTED = 130


log = logging.getLogger(__name__)


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
    recipes = with_encoder_of_start(recipes, sys.argv[1:])
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
        registry=own_rules(),
    )
    return replace(experiment, output=runtime.lasting(experiment.output))


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
