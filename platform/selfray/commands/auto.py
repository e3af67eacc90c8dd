"""`selfray pretrain auto`: look at the images and the machines, propose a command, run it."""

import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfray.check import require
from selfray.cluster import runtime
from selfray.commands import early
from selfray.commands.script import log_folder, one_line_errors, run_pretrain, with_console
from selfray.recipes.proposal import Facts, Proposal, propose

if TYPE_CHECKING:
    from selfray.console import Console
    from selfray.data.data_sets import DataSets
    from selfray.experiment import DataConfig, Experiment

AUTO = """Propose a recipe and its settings for these images and these machines.

  $ selfray pretrain auto --data.path scans/            # print the proposal with its reasons
  $ selfray pretrain auto --data.path scans/ --yes      # print it and run it

Flags of the recipe may follow, such as --epochs 20: they override the proposal."""

LOOKED_AT = 64
"""How many images are sampled for the median side."""


def run(arguments: Sequence[str], prog: str) -> int:
    """Run `auto`. Returns the exit code."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(f"usage: {prog} auto --data.path PATH [--yes] [--flag value ...]\n\n{AUTO}")
        return 0
    started = time.time()

    def main() -> int:
        words = [word for word in arguments if word != "--yes"]
        given = {flag: " ".join(values) for flag, values in early.given_flags(words)}
        path, output = given.get("--data.path"), runtime.lasting(given.get("--output", "runs"))
        if not path:
            raise ValueError(f"{prog} auto needs --data.path, a folder of images or shards")
        early.check_path(path, "--data.path")
        proposed: list[str] = []
        opened: list[Opened] = []

        def look(console: "Console") -> int:
            opened.append(Opened.of(given, output, console))
            found = proposal(opened[0].sets, console)
            proposed.extend([*found.without(set(given)).words, *words])
            for reason in found.reasons:
                console.say(f"  {reason}")
            console.say(f"proposed: {prog} {shlex.join(proposed)}")
            if "--yes" not in arguments:
                console.say("add --yes to run it, or run the proposed command, changed as you like")
            return 0

        # The proposal and the run share one Ray session.
        with runtime.session():
            code = with_console(log_folder(output), look)
            if code or "--yes" not in arguments:
                return code
            return run_pretrain(proposed, AUTO, prog, started, opened=opened[0].for_run)

    return one_line_errors(main)


@dataclass(frozen=True)
class Opened:
    """The data that the proposal is for, so that the proposed run need not open it again."""

    settings: "DataConfig"
    sets: "DataSets"

    @classmethod
    def of(cls, given: Mapping[str, str], output: str, console: "Console") -> "Opened":
        """Open the data that flags name, and print what was understood of it."""
        from selfray.cluster.build import build_told
        from selfray.data.data_sets import open_data
        from selfray.experiment import DataConfig
        from selfray.runs import record
        from selfray.storage import Location

        channels = given.get("--data.channels", f"{DataConfig.channels}")
        require(channels.isdigit(), f"--data.channels takes a whole number, got {channels}")
        settings = DataConfig(
            given["--data.path"],
            given.get("--data.test-path"),
            given.get("--data.image-column"),
            label_column=given.get("--data.label-column"),
            channels=int(channels),
            group_by=given.get("--data.group-by"),
        )
        console.live("opening the data")
        folder = Location.of(output)
        with record.exclusive(folder, console.say):
            return cls(settings, open_data(settings, folder, console.say, build_told))

    def for_run(self, experiment: "Experiment") -> "DataSets | None":
        """The data sets, if this is the data of an experiment."""
        return self.sets if self.settings.opens_as(experiment.data) else None


def proposal(opened: "DataSets", console: "Console") -> Proposal:
    """The proposal for these images and the running Ray cluster. Prints the image size and the CPUs
    and GPUs that it found."""
    cluster = runtime.cluster_resources()
    facts = Facts(opened.train.rows, _side(opened), int(cluster.cpus), int(cluster.gpus))
    console.say(
        f"images of about {facts.side} pixels; {facts.cpus} CPU{'s' if facts.cpus != 1 else ''}, "
        + (f"{facts.gpus} GPU{'s' if facts.gpus != 1 else ''}" if facts.gpus else "no GPU")
    )
    return propose(facts)


def _side(data: "DataSets") -> int:
    """The median of the shorter sides of LOOKED_AT sampled images, in pixels."""
    from selfray.data.reader import read_rows, sample_rows
    from selfray.pixels.codecs import check

    sides = []
    for image in read_rows(data.train, *sample_rows(data.train, LOOKED_AT))[0]:
        try:
            info = check(image)
        except ValueError:  # a broken image, which the run will report
            continue
        sides.append(min(info.width, info.height))
    if not sides:
        raise ValueError(f"--data.path: none of {LOOKED_AT} images can be read")
    return int(statistics.median(sides))
