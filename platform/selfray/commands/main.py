"""The command `selfray`: its table of sub-commands, and how one is parsed and run.

Of the heavy packages only tyro is imported at the top: torch, timm, ray and mlflow take seconds,
and --help works without them.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

from tyro.conf import FlagCreatePairsOff, Positional, subcommand

from selfray import __version__, caches, plugins, signals
from selfray.check import require
from selfray.commands.check_method import CheckMethod
from selfray.commands.compare import Compare
from selfray.commands.doctor import Doctor
from selfray.commands.embed import Embed
from selfray.commands.evaluate import Evaluate
from selfray.commands.export import Export
from selfray.commands.flags import flag, read
from selfray.commands.pretrain import pretrain, train_tokenizer
from selfray.commands.probe import Probe
from selfray.commands.script import FAILED, one_line_errors, with_console
from selfray.commands.shards import BuildShards, CheckShards
from selfray.commands.shards_dedup import DedupShards
from selfray.commands.shards_show import ShowShards
from selfray.commands.sweeps import SWEEPS, run
from selfray.commands.words import nearest
from selfray.storage import last_line

if TYPE_CHECKING:
    from selfray.console import Console


log = logging.getLogger(__name__)


SHARDS = """Build, look at and check Parquet shards of images for training.
$ selfray shards build ~/scans s3://bucket/scans"""


@dataclass(frozen=True)
class Elsewhere:
    """A sub-command whose flags depend on a recipe; another module parses them. Here it only
    appears in the help."""

    words: Annotated[
        Positional[tuple[str, ...]], flag("Name of a recipe or sweep, then its flags.", "NAME")
    ] = ()


COMMANDS: dict[str, Any] = {
    "pretrain": Elsewhere,
    "tokenizer": Elsewhere,
    "sweep": Elsewhere,
    "shards": {
        "build": BuildShards,
        "check": CheckShards,
        "show": ShowShards,
        "dedup": DedupShards,
    },
    "evaluate": Evaluate,
    "embed": Embed,
    "export": Export,
    "probe": Probe,
    "compare": Compare,
    "check-method": CheckMethod,
    "doctor": Doctor,
}
PRETRAIN_IN_SHORT = """Pretrain an encoder with a recipe, a file or both.
$ selfray pretrain mae-imagenet --data.path scans/"""
TOKENIZER_IN_SHORT = """Train the tokenizer whose tokens BEiT predicts.
$ selfray tokenizer tokenizer-imagenet --data.path scans/"""


def _sweeps() -> str:
    names = ", ".join(SWEEPS)
    return (
        f"Vary one setting of a recipe, probe every run and rank the runs: {names}.\n"
        "$ selfray sweep mask-ratio --data scans/ --seeds 3"
    )


def _as_subcommands(commands: dict[str, Any], described: dict[str, str]) -> Any:
    """A table of commands as a union type, for which tyro prints the help."""
    kinds = [
        Annotated[
            _as_subcommands(kind, {}) if isinstance(kind, dict) else kind,
            subcommand(name, description=described.get(name)),
        ]
        for name, kind in commands.items()
    ]
    return Union[tuple(kinds)]  # noqa: UP007 - made from a table


DESCRIBED = {
    "pretrain": PRETRAIN_IN_SHORT,
    "tokenizer": TOKENIZER_IN_SHORT,
    "sweep": _sweeps(),
    "shards": SHARDS,
}
Command = _as_subcommands(COMMANDS, DESCRIBED)


DESCRIPTION = """Self-supervised pretraining of vision encoders, from a laptop to a Ray cluster.

Paths may be local, s3:// or gs://. RAY_ADDRESS names a cluster to work on; without it, a local Ray
is started and stopped. SELFRAY_VERBOSE=1 shows the output of libraries."""


def main() -> int:
    """Run the command line in sys.argv. Returns the exit code: 0 done, 1 failed, 2 bad input, 130
    interrupted."""
    words = sys.argv[1:] or ["--help"]
    if words[0] in ("--version", "-V"):
        return one_line_errors(_version)
    if words[0] == "pretrain":
        return pretrain(words[1:], prog="selfray pretrain")
    if words[0] == "tokenizer":
        return train_tokenizer(words[1:], prog="selfray tokenizer")
    if words[0] == "sweep" and len(words) > 1 and not words[1].startswith("-"):
        return one_line_errors(lambda: _sweep(words[1], words[2:]))
    return one_line_errors(lambda: _quietly(parse(plugins.take(words))))


def _version() -> int:
    print(f"selfray {__version__}")
    return 0


def _sweep(name: str, words: Sequence[str]) -> int:
    require(name in SWEEPS, f"selfray sweep has no {name}{nearest(name, SWEEPS)}")
    kind = SWEEPS[name]
    return run(kind, words, kind.__doc__ or "", f"selfray sweep {name}")


def parse(arguments: Sequence[str]) -> Any:
    """Parse arguments into a command. BadSetting and ValueError are one line that names the bad
    word or flag."""
    kind: Any = COMMANDS
    words, prog = list(arguments), "selfray"
    while isinstance(kind, dict) and words and not words[0].startswith("-"):
        name = words.pop(0)
        require(name in kind, f"{prog} has no {name}{nearest(name, kind)}")
        kind, prog = kind[name], f"{prog} {name}"
    if isinstance(kind, dict):  # --help, or a word is missing
        kind, words, prog = Command, arguments, "selfray"
    described = DESCRIPTION if kind is Command else DESCRIBED.get(prog.removeprefix("selfray "))
    settings = {} if described is None else {"description": described}
    return read(kind, words, prog, config=(FlagCreatePairsOff,), **settings)


def _quietly(command: Any) -> int:
    """Run a command; the console shows only its own messages, the log file everything."""

    def body(console: "Console") -> int:
        try:
            return command.run(console)
        except KeyboardInterrupt:
            console.say(f"interrupted: {command.interrupted}")
            return signals.exit_code()
        except (ValueError, OSError):
            raise
        except Exception as error:
            # The traceback goes to the log; the console says where that is.
            log.exception("failed")
            console.say(f"error: {last_line(error)}")
            if console.log is not None:
                console.say(f"the full log: {console.log}")
            return FAILED

    return with_console(_log_folder(), body)


def _log_folder() -> Path:
    """runs/logs, or a private temporary folder if that cannot be made, as in a read-only folder."""
    folder = Path("runs/logs").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return caches.private(iter([caches.temporary()])) / "logs"
    return folder


if __name__ == "__main__":
    sys.exit(main())
