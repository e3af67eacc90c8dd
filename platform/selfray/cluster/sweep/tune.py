"""The parts that Ray Tune needs for a sweep: a source of tasks, and a scheduler that stops runs.

Tune's own snapshot of an experiment does not include the scheduler (2.60), so ASHA would lose its
rungs when the driver ends. Here everything that must survive lies in the sweep's folder: outcomes,
chosen combinations, and every judged result in order, with its verdict.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from selfray.cluster.sweep.trial import Task, run_trial
from selfray.metrics import PROBES
from selfray.storage import Location
from selfray.sweeps.question import Halving

log = logging.getLogger(__name__)

TRIAL_CPUS = 0.01
"""CPUs of a trial, which only waits for the Ray Train run that it started."""


class TaskSource(Searcher):
    """Gives tasks to Tune one by one; base class of sources that choose the next task."""

    def __init__(self, tasks: Iterable[Task] = ()) -> None:
        super().__init__()
        self._waiting: deque[Task] = deque(tasks)

    @property
    def is_done(self) -> bool:
        """Whether there are no more tasks."""
        if not self._waiting:
            self._waiting.extend(self.more())
        return not self._waiting

    def more(self) -> Sequence[Task]:
        """Further tasks after the current ones; an empty sequence ends the sweep."""
        return []

    def suggest(self, trial_id: str) -> Any:
        return Searcher.FINISHED if self.is_done else {"task": self._waiting.popleft()}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass  # outcomes are read from the sweep's folder

    def save(self, checkpoint_path: str) -> None:
        pass  # there is no state to save

    def restore(self, checkpoint_path: str) -> None:
        pass


class Rungs(FIFOScheduler):
    """Ray's ASHA with a record: every judged result is stored in `record`, and a new driver first
    judges these again in the same order.

    To stop a run, a stop file is written, and the run ends by itself with a checkpoint. Tune would
    kill it at an arbitrary moment.
    """

    def __init__(
        self, halving: Halving, total_images: int, record: Location, stops: Location
    ) -> None:
        super().__init__()
        assert halving.metric is not None
        self._judged_by, self._total = halving.metric, total_images
        self._record, self._stops = record.uri, stops.uri
        self._asha = ASHAScheduler(
            time_attr="images_seen",
            metric="value",
            mode="max",
            max_t=total_images,
            grace_period=max(1, int(halving.first * total_images)),
            reduction_factor=halving.factor,
            brackets=1,
        )
        self._judged: list[dict[str, Any]] = []
        self._known: set[str] = set()
        stops.make_folder()
        for told in _read(record):
            judged = self._judge({name: told[name] for name in ("number", "images_seen", "value")})
            if judged["stop"]:
                self._stop(judged)  # the old driver may have died before writing the stop file

    @property
    def supports_buffered_results(self) -> bool:
        return False  # late verdicts would waste steps

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "value" in result:
            told = {name: result[name] for name in ("number", "images_seen", "value")}
            seen = {(r["number"], r["images_seen"]) for r in self._judged}
            stopped = {r["number"] for r in self._judged if r["stop"]}
            if (told["number"], told["images_seen"]) not in seen and told["number"] not in stopped:
                told = self._judge(told)
                Location.of(self._record).write_json(self._judged)
                if told["stop"]:
                    self._stop(told)
        return TrialScheduler.CONTINUE

    def _judge(self, told: dict[str, Any]) -> dict[str, Any]:
        """Let ASHA judge a result and append the verdict to the record."""
        run = _Known(f"{told['number']}")
        if run.trial_id not in self._known:
            self._known.add(run.trial_id)
            self._asha.on_trial_add(None, run)  # type: ignore[arg-type]
        ended = told["images_seen"] >= self._total  # a finished run is not stopped
        verdict = self._asha.on_trial_result(None, run, dict(told))  # type: ignore[arg-type]
        judged = told | {"stop": verdict == TrialScheduler.STOP and not ended}
        self._judged.append(judged)
        return judged

    def _stop(self, told: dict[str, Any]) -> None:
        name = PROBES[self._judged_by].name
        reason = f"not among the best by {name} at {told['images_seen']:,} images"
        (Location.of(self._stops) / f"{told['number']:04d}.json").write_json({"reason": reason})

    def save(self, checkpoint_path: str) -> None:
        pass  # the record is already written

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Known:
    """The part of a trial that ASHA needs: an id that is the same in every driver."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def _read(record: Location) -> list[dict[str, Any]]:
    try:
        return record.read_json()
    except (FileNotFoundError, json.JSONDecodeError):
        return []


def run_tasks(
    source: TaskSource, scheduler: FIFOScheduler | None, folder: Location, at_once: int
) -> None:
    """Let Tune run all tasks of a source; outcomes are written to their files."""
    tuner = tune.Tuner(
        tune.with_resources(run_trial, {"cpu": TRIAL_CPUS}),
        tune_config=tune.TuneConfig(
            search_alg=source,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=at_once,
            reuse_actors=True,  # a new process would import torch, Ray Train and MLflow again
        ),
        run_config=tune.RunConfig(
            # A new name for each start; otherwise Tune would reuse the folder of an old one.
            name=f"tune-{time.time_ns()}",
            storage_path=(folder / "tune").uri,
            verbose=0,
        ),
    )
    for result in tuner.fit():
        if result.error is not None:
            log.error("a trial's process died: %s", result.error)
