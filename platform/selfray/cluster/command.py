"""What the commands share: flags, a quiet console, one-line errors and exit codes.

Exit code 0: done. 1: a run failed, its cause is shown. 2: bad input, nothing was started.
130: interrupted, the same command continues.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import tyro

from selfray.cluster import runtime
from selfray.cluster.runtime import Console
from selfray.experiment import Experiment

BAD_INPUT = 2
INTERRUPTED = 130

log = logging.getLogger(__name__)


def run_experiment(recipes: Mapping[str, Experiment], description: str, started: float) -> int:
    """`pretrain.py`'s whole life: parse, launch, report. Returns the exit code."""

    def main() -> int:
        experiment = parse(recipes, description)
        return with_console(
            Path(experiment.output if "://" not in experiment.output else "runs") / "logs",
            lambda console: _launch(experiment, console, started),
        )

    return one_line_errors(main)


def parse(recipes: Mapping[str, Experiment], description: str) -> Experiment:
    """The Experiment that the command line asks for; argparse's exit code 2 where it is wrong."""
    named = {name: replace(recipe, name=name) for name, recipe in recipes.items()}
    command = tyro.extras.subcommand_type_from_defaults(
        named, {name: _first_line(recipe) for name, recipe in named.items()}
    )
    # A schedule's kind stays what the recipe has; only its numbers are flags.
    settings = (tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed)
    return tyro.cli(command, description=description, config=settings)  # type: ignore[arg-type]


def _first_line(experiment: Experiment) -> str:
    return (
        f"{experiment.method.name} on {experiment.encoder.name} at {experiment.encoder.image_size} "
        f"pixels, {experiment.epochs} epochs of batch {experiment.batch_size}"
    )


def _launch(experiment: Experiment, console: Console, started: float) -> int:
    from selfray.cluster.launch import launch

    with runtime.session():
        launch(experiment, console, started=started)
    return 0


def with_console(folder: Path, body: Callable[[Console], int]) -> int:
    """Run `body` with everything but its own words going to a log file in `folder`."""
    from selfray.cluster.launch import RunFailed

    name = f"{time.strftime('%Y%m%d-%H%M%S')}.log"
    with runtime.quiet_console(folder / name) as console:
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        try:
            return body(console)
        except KeyboardInterrupt:
            console.say("interrupted: the same command continues from the last checkpoint")
            return INTERRUPTED
        except RunFailed as error:
            console.say(f"error: {error}")
            console.say(f"the full log: {console.log}")
            return 1
        except (ValueError, OSError) as error:
            log.exception("bad input")
            console.say(f"error: {error}")
            return BAD_INPUT


def one_line_errors(main: Callable[[], int]) -> int:
    """Run `main`; bad input is one line on standard error, and exit code 2."""
    try:
        return main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT

