"""One run of a sweep, in its own process: its task and its outcome."""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray import tune

from selfray import config
from selfray.cluster.endings import RunFailed
from selfray.cluster.launch import PartOf, launch
from selfray.console import Console
from selfray.experiment import Experiment
from selfray.metrics import PROBES
from selfray.probes.features import ProbeResult, described
from selfray.storage import Location

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """The input of a sweep's run. Plain values, so that any process can unpickle it."""

    number: int
    """Its index in the sweep, used in the names of its files."""
    label: str
    """The tried values, without the seed."""
    seed: int
    experiment: str
    """The Experiment as JSON."""
    outcome: str
    """The file to which the outcome is written."""
    log: str
    """The file for the console output of the run."""
    stop_file: str
    """See PartOf."""
    cwd: str
    """The driver's current folder, to which the experiment's paths are relative."""
    tracking: str
    parent_run_id: str | None
    params: Mapping[str, str]
    report: str | None = None
    """The figure reported to Tune at every probe, for a scheduler; None reports nothing."""
    run_folder: str | None = None
    """See PartOf.folder."""
    until_step: int | None = None
    """See PartOf."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a sweep's run, stored as a file in the sweep's folder."""

    label: str
    seed: int
    run: str | None
    """The run's folder; None if it could not be started."""
    probes: tuple[Mapping[str, Any], ...] = ()
    """`images_seen` and the probes' figures, in order; the first is the untrained encoder's."""
    images_seen: int = 0
    images_per_second: float | None = None
    seconds: float = 0.0
    """Wall time of the whole trial."""
    training_seconds: float = 0.0
    """From the first optimizer step to the last."""
    stopped: str | None = None
    """Why the sweep stopped it early; None if it did not."""
    failure: str | None = None
    """The cause of a failure in one line; None without one."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Outcome":
        return cls(**{**value, "probes": tuple(value["probes"])})

    def final(self, metric: str) -> float | None:
        """The figure of the last probe of the trained encoder; None without one."""
        trained = [p.get(metric) for p in self.probes if p["images_seen"] > 0]
        return trained[-1] if trained else None

    def untrained(self, metric: str) -> float | None:
        return next((p.get(metric) for p in self.probes if p["images_seen"] == 0), None)

    @property
    def described(self) -> str:
        """One line for the console."""
        name = f"{self.label}, seed {self.seed}"
        if self.failure is not None:
            return f"{name} failed: {self.failure}"
        if not self.probes:
            return f"{name}: not probed"
        last = described(self.probes[-1])
        stop = f", stopped: {self.stopped}" if self.stopped else ""
        return f"{name}: {last}{stop}"


def failed(label: str, seed: int, cause: str) -> Outcome:
    return Outcome(label, seed, None, failure=cause)


def run_trial(setting: dict[str, Any]) -> dict[str, Any]:
    """The function that Tune runs for each task. A failed run is an outcome and does not end the
    sweep."""
    task: Task = setting["task"]
    started = time.time()
    experiment: Experiment = config.loads(task.experiment)
    if Path(task.cwd).is_dir():
        os.chdir(task.cwd)  # Tune changes to its own folder
    part = PartOf(
        task.parent_run_id,
        task.params,
        f"{task.label}, seed {task.seed}" if task.run_folder is None else None,
        task.run_folder,
        task.until_step,
        task.stop_file,
        _reporter(task) if task.report else None,
    )
    try:
        with _LogConsole(task.log) as console:
            result = launch(experiment, console, task.tracking, part_of=part)
        found = Outcome(
            task.label,
            task.seed,
            result.folder,
            tuple(
                {
                    "images_seen": step * experiment.batch_size,
                    **probe.values,
                }
                for step, probe in sorted(result.probes.items())
            ),
            result.images_seen,
            result.images_per_second,
            time.time() - started,
            max(0.0, result.seconds - result.first_step_seconds),
            result.stopped,
        )
    except (RunFailed, ValueError, OSError) as error:
        log.exception("%s, seed %d", task.label, task.seed)
        found = failed(task.label, task.seed, str(error))
    Location.of(task.outcome).write_json(asdict(found))
    return {"done": True}


def _reporter(task: Task) -> Any:
    """A function that reports a probe to Tune, for `Rungs`."""
    metric = task.report
    assert metric is not None

    def report(images_seen: int, probe: ProbeResult) -> None:
        value = probe.values[metric]
        if value is not None and images_seen > 0:
            tune.report(
                {
                    "number": task.number,
                    "images_seen": images_seen,
                    "value": PROBES[metric].sign * value,
                }
            )

    return report


class _LogConsole(Console):
    """A console that writes to a file."""

    def __init__(self, path: str) -> None:
        local = Path(path) if "://" not in path else Path(os.devnull)
        local.parent.mkdir(parents=True, exist_ok=True)
        self.file = local.open("a", encoding="utf-8")
        super().__init__(self.file, None)

    def __enter__(self) -> "_LogConsole":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
