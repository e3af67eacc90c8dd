"""The command `selfray`: what it can do, and how a sub-command is run.

Only tyro is imported at the top: torch, timm, ray and mlflow take seconds, and --help needs none.
"""

import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, subcommand

from selfray.commands.compare import Compare
from selfray.commands.doctor import Doctor
from selfray.commands.evaluate import Evaluate
from selfray.commands.export import Export
from selfray.commands.probe import Probe
from selfray.commands.shards import BuildShards, CheckShards
from selfray.commands.words import one_line

if TYPE_CHECKING:
    from selfray.cluster.runtime import Console

FAILED = 1

log = logging.getLogger(__name__)


SHARDS = """Make and check Parquet shards of images: what encoders are trained on.
$ selfray shards build ~/scans s3://bucket/scans"""


Command = (
    Annotated[
        Annotated[BuildShards, subcommand("build")] | Annotated[CheckShards, subcommand("check")],
        subcommand("shards", description=SHARDS),
    ]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Probe, subcommand("probe")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Doctor, subcommand("doctor")]
)


AnyCommand = BuildShards | CheckShards | Evaluate | Export | Probe | Compare | Doctor


DESCRIPTION = """Self-supervised pretraining of vision encoders, from a laptop to a Ray cluster.

Training itself is started by experiments/pretrain.py; this command does what comes before and after
it. Paths may be local, s3:// or gs://. RAY_ADDRESS names a cluster to work on; without it, a local
Ray is started and stopped. SELFRAY_VERBOSE=1 shows what libraries print."""


def main() -> int:
    """Do what the command line says. Returns the exit code: 0 done, 1 failed, 2 bad input, 130
    interrupted."""
    return _quietly(parse(sys.argv[1:] or ["--help"]))


def parse(arguments: Sequence[str]) -> AnyCommand:
    """The command that arguments ask for; argparse's SystemExit where they ask for none."""
    return tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="selfray",
        description=DESCRIPTION,
        args=arguments,
        config=(FlagCreatePairsOff,),
    )


def _quietly(command: AnyCommand) -> int:
    """Run a command with nothing but its own words on the console."""
    from selfray.commands.script import INTERRUPTED, one_line_errors, with_console

    def body(console: "Console") -> int:
        try:
            return command.run(console)
        except KeyboardInterrupt:
            console.say(f"interrupted: {command.interrupted}")
            return INTERRUPTED
        except (ValueError, OSError):
            raise
        except Exception as error:
            # The traceback is for the log; a user needs to know where it is.
            log.exception("failed")
            console.say(f"error: {one_line(error)}")
            if console.log is not None:
                console.say(f"the full log: {console.log}")
            return FAILED

    return one_line_errors(lambda: with_console(_log_folder(), body))


def _log_folder() -> Path:
    """runs/logs, or a temporary folder where that cannot be written: an export needs no runs."""
    folder = Path("runs/logs").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir()) / "selfray-logs"
    return folder


if __name__ == "__main__":
    sys.exit(main())
