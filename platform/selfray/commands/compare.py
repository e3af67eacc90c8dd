"""`selfray compare`: its flags, the table it prints and the page it writes."""

import posixpath
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import Positional

from selfray.check import require
from selfray.commands.flags import JsonFlag, TrackingFlag, flag

if TYPE_CHECKING:
    from selfray.console import Console
    from selfray.storage import Location


@dataclass(frozen=True)
class Compare:
    """Compare runs: print a ranked table and write one self-contained HTML page with curves,
    probes, the parameters that differ and pictures. Only files are read; Ray is not started.
    $ selfray compare runs/sweeps/sweep-temperature-1a2b3c4d
    $ selfray compare runs/simclr-digits-1a2b3c4d mlruns:/RUN_ID
    """

    interrupted: ClassVar[str] = "nothing was written"

    runs: Annotated[
        Positional[tuple[str, ...]],
        flag(
            """Run folders, a sweep's folder or an output folder (all runs in it), local, s3:// or
            gs://; mlruns:/RUN_ID of a run or of a sweep; or the name of an MLflow experiment, such
            as selfray.""",
            "RUN|EXPERIMENT",
        ),
    ]
    page: Annotated[
        str | None,
        flag(
            "HTML file to write; local, s3:// or gs://.",
            "PATH",
            "comparison.html in the compared folder, or here if there are several",
        ),
    ] = None
    title: Annotated[str | None, flag("Title of the page.", "TEXT", "the folders' names")] = None
    pictures: Annotated[int, flag("Show pictures of the best runs, at most this many.", "N")] = 12
    json: JsonFlag = None
    no_track: Annotated[
        bool,
        flag(
            """Do not log the page to MLflow. Without this flag, the page of one run becomes an
            artifact of that run, and the page of one sweep's trials an artifact of the sweep; other
            pages are only written as files.""",
            default="",
        ),
    ] = False
    tracking: TrackingFlag = None

    def run(self, console: "Console") -> int:
        require(
            len(self.runs) > 0,
            "nothing to compare: give run folders, a sweep's folder, an output folder such as "
            "runs/, mlruns:/RUN_ID or an MLflow experiment",
        )
        require(self.pictures >= 0, f"--pictures must be at least 0, got {self.pictures}")
        console.live("reading the runs")
        from selfray.cluster import mlflow_runs
        from selfray.report.page import write_page
        from selfray.runs import ranking
        from selfray.storage import Location

        file = mlflow_runs.default_page(self.runs) if self.page is None else Location.of(self.page)
        _require_ours(file)
        runs = ranking.ranked(mlflow_runs.read_runs(self.runs, self.tracking, console.say))
        console.live("writing the page")
        page = write_page(runs, self.title or _title(self.runs), self.pictures)
        try:
            file.write_bytes(page.encode())
        except OSError as error:
            raise OSError(
                f"{file} cannot be written ({error.strerror or error}): give --page another file"
            ) from None
        if self.json is not None:
            Location.of(self.json).write_json(ranking.as_json(runs))
        # Write the files before printing: a reader such as `head` may close the pipe.
        for line in ranking.table(runs):
            console.say(line)
        console.say()
        for text in ranking.cautions(runs).values():
            console.say(text)
        for run in runs[: ranking.MOST_LINES]:
            if run.note:
                console.say(f"{run.title}: {run.status}: {run.note}")
        console.say(f"page: {file}")
        if self.json is not None:
            console.say(f"written to {Location.of(self.json)}")
        if not self.no_track:
            console.live("logging to MLflow")
            console.say(mlflow_runs.log_page(page, runs, self.tracking))
        return 0


def _require_ours(file: "Location") -> None:
    """FileExistsError unless the file is missing or a comparison page, which may be overwritten."""
    from selfray.report.page import MARK

    require(not file.is_folder(), f"--page {file} is a folder: give a file")
    if file.exists() and MARK.encode() not in file.read_bytes()[:1000]:
        raise FileExistsError(
            f"{file} exists and is not a page that selfray wrote: give --page another file"
        )


def _title(references: tuple[str, ...]) -> str:
    names = [posixpath.basename(reference.rstrip("/")) for reference in references]
    if len(names) > 3:
        return f"{names[0]} and {len(names) - 1} more"
    return ", ".join(names)
