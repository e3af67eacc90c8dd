"""Runs a script from its flags to its exit code: quiet console, log file, one-line errors.

Exit code 0: done. 1: a run failed and its cause is shown. 2: bad input, nothing was started.
130: interrupted, the same command continues.
"""

import errno
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from selfray import config, plugins, signals
from selfray.cluster import runtime
from selfray.commands import early
from selfray.commands.config_file import read_config
from selfray.commands.flags import EXPERIMENT_FLAGS, BadSetting, read
from selfray.commands.start_flags import with_encoder_of_start
from selfray.commands.words import nearest
from selfray.console import Console, LogFormatter, discard, printable, quiet_console
from selfray.imports import uncollected
from selfray.recipes import NAMES, every
from selfray.storage import Location

if TYPE_CHECKING:  # torch takes seconds to import, and `selfray shards` needs none
    from selfray.cluster.launch import RunResult
    from selfray.data.data_sets import DataSets
    from selfray.experiment import Experiment

FAILED = 1
BAD_INPUT = 2


INTERRUPTED = signals.INTERRUPTED


log = logging.getLogger(__name__)


def run_pretrain(
    arguments: Sequence[str],
    description: str,
    prog: str,
    started: float,
    recipes: "Callable[[], Mapping[str, Experiment]]" = every,
    then: "Callable[[Experiment, RunResult, Console], None] | None" = None,
    opened: "Callable[[Experiment], DataSets | None]" = lambda _: None,
) -> int:
    """Run a pretraining command: parse, launch, report, and call `then`. Returns the exit code.

    Args:
        arguments: a recipe's name and flags.
        description: the text of its help.
        prog: the command, as help and messages show it.
        started: time.time() at the command's start, from which the time to the first step counts.
        recipes: returns the recipes that the command accepts; called late, as it imports torch.
        then: called with the experiment and its result after the run has finished.
        opened: returns the experiment's data sets if the caller has opened them, else None.
    """

    def main() -> int:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_help(description, prog))
            return 0
        # Before Ray starts, so that its workers load the plugins as well.
        words = plugins.take(arguments)
        own = plugins.recipes()
        early.refuse(words, (*NAMES, *own), prog)
        early.refuse_mlflow_ids()
        ray = runtime.Starting()  # Ray's processes start while torch is imported
        try:
            with uncollected():
                experiment = parse({**recipes(), **own}, words, description, prog)
            return with_console(
                log_folder(experiment.output),
                lambda console: _launch(experiment, console, ray, started, then, opened),
            )
        finally:
            ray.stop()

    return one_line_errors(main)


def _help(description: str, prog: str) -> str:
    columns = [name.partition("-") for name in NAMES]
    methods = dict.fromkeys(method for method, _, _ in columns)
    rows = [
        f"  {method:10} " + "  ".join(f"{m}-{d}" for m, _, d in columns if m == method)
        for method in methods
    ]
    return (
        f"usage: {prog} RECIPE [--flag value ...]\n"
        f"       {prog} --config FILE [--flag value ...]\n\n{description.strip()}\n\n"
        "recipes:\n" + "\n".join(rows) + f"\n\n{prog} RECIPE --help shows the recipe's flags."
    )


def parse(
    recipes: "Mapping[str, Experiment]", arguments: Sequence[str], description: str, prog: str
) -> "Experiment":
    """The Experiment of a recipe, a file and flags; flags override the file, which overrides the
    recipe.

    BadSetting and ValueError are one line that names the flag or field, also where the encoder
    cannot be built or cannot take the images. SystemExit(0) after
    `--help` or `--print-config`.
    """
    words, file, shows = _own_flags(arguments, prog)
    recipes = {name: replace(recipe, name=name) for name, recipe in recipes.items()}
    words = _with_given_statistics(words)
    base = None
    if words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in recipes:
            raise ValueError(f"{prog}: there is no recipe {name}{nearest(name, recipes)}")
        base = with_encoder_of_start(recipes, [name, *words])[name]
    if file is not None:
        base = read_config(file, base, recipes)
    assert base is not None, "early.refuse asks for a recipe or a file"
    text = f"{description.strip()}\n\n{base.name}: {_first_line(base)}"
    experiment = read(
        type(base),
        words,
        f"{prog} {base.name}",
        default=base,
        description=text,
        config=EXPERIMENT_FLAGS,
    )
    experiment = replace(experiment, output=runtime.lasting(experiment.output))
    from selfray.models import on_meta

    on_meta.require_encoder_of(experiment)
    if shows:
        print(config.to_yaml(experiment), end="")
        raise SystemExit(0)
    return experiment


def _with_given_statistics(words: list[str]) -> list[str]:
    """With the flag that a mean or deviation of the user's own means."""
    flags = {word.partition("=")[0].replace("_", "-") for word in words}
    if flags & {"--data.mean", "--data.std"} and "--data.statistics" not in flags:
        return [*words, "--data.statistics", "given"]
    return words


def _own_flags(arguments: Sequence[str], prog: str) -> tuple[list[str], str | None, bool]:
    """(the other words, the file after --config, whether --print-config is given)."""
    words, file, shows = [], None, False
    rest = iter(arguments)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag == "--config":
            file = value if equals else next(rest, None)
            if not file:
                raise ValueError(f"{prog} --config takes a YAML or JSON file")
        elif flag == "--print-config":
            shows = True
        else:
            words.append(word)
    return words, file, shows


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
    opened: "Callable[[Experiment], DataSets | None]",
) -> int:
    with uncollected():
        from selfray.cluster.launch import launch

    console.live("starting Ray")
    with ray.session(console.say):
        result = launch(experiment, console, started=started, opened=opened(experiment))
    if experiment.log_model and then is None and result.stopped is None:
        from selfray.cluster.logged_model import log_encoder

        log_encoder(Location.of(result.folder), console)
    if then is not None:
        then(experiment, result, console)
    return 0


def log_folder(output: str) -> Path:
    """The folder of a command's log: always on this machine, even if the output is a URL."""
    return Path(output if "://" not in output else runtime.lasting("runs")) / "logs"


def with_console(folder: Path, body: Callable[[Console], int]) -> int:
    """Run `body` with a console for its own messages; all other output goes to a log file in
    `folder`. Returns the exit code, also for an interruption, RunFailed and bad input."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"--output: {folder} cannot be made ({error.strerror}): give --output another folder"
        ) from None
    with quiet_console(folder / name) as console:
        code = _run(body, console)
    if console.failure is not None and not isinstance(console.failure, BrokenPipeError):
        print(_unwritten(console.failure, console.log), file=sys.stderr)
        return code or FAILED
    return code


def _run(body: Callable[[Console], int], console: Console) -> int:
    """The exit code of `body`, with one line for every failure that a user can act on."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    signals.catch()
    try:
        return body(console)
    except KeyboardInterrupt:
        console.say("interrupted: the same command continues from the last checkpoint")
        return signals.exit_code()
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


def _unwritten(error: OSError, lines_are_in: Path | None = None) -> str:
    """The line for a standard output that cannot be written."""
    text = f"error: standard output cannot be written: {error.strerror}"
    return text if lines_are_in is None else f"{text}; its lines are in {lines_are_in}"


def _leave() -> None:
    """End the process at once, with the exit code of the signal that it received."""
    if "ray" in sys.modules:
        from selfray.cluster import local_ray

        local_ray.abandon()
    logging.shutdown()
    signals.leave()


def one_line_errors(main: Callable[[], int]) -> int:
    """Run `main` and return its exit code; bad input prints one line on standard error and returns
    2."""
    signals.catch()
    try:
        code = main()
        if signals.were_received():
            _leave()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if not signals.were_received():
            raise
        print("interrupted: nothing was started yet; the same command starts it", file=sys.stderr)
        _leave()
        raise
    except BrokenPipeError:  # as in `selfray pretrain --help | head`: its reader has seen enough
        discard(sys.stdout)
        return 0
    except (BadSetting, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            print(_unwritten(error), file=sys.stderr)
            discard(sys.stdout)
            return FAILED
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return BAD_INPUT
