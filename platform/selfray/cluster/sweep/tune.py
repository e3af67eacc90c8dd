"""What Ray Tune is given to carry out a sweep: where tasks come from, and who is stopped.

Tune's own snapshot of an experiment leaves the scheduler out (2.60), so that ASHA would forget its
rungs with the driver. Here all that has to survive lies in the sweep's folder: outcomes, what was
asked, and every result that was judged, in order, with its verdict.
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
"""A trial only waits for the Ray Train run that it started, whose workers take the CPUs."""


class TaskSource(Searcher):
    """Hands out tasks one by one; the base of those that think of the next one."""

    def __init__(self, tasks: Iterable[Task] = ()) -> None:
        super().__init__()
        self._waiting: deque[Task] = deque(tasks)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to hand out."""
        if not self._waiting:
            self._waiting.extend(self.more())
        return not self._waiting

    def more(self) -> Sequence[Task]:
        """Tasks to go on with when those at hand are used up; none ends the sweep."""
        return []

    def suggest(self, trial_id: str) -> Any:
        return Searcher.FINISHED if self.is_done else {"task": self._waiting.popleft()}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass  # outcomes are read from the sweep's folder

    def save(self, checkpoint_path: str) -> None:
        pass  # nothing here has to be remembered

    def restore(self, checkpoint_path: str) -> None:
        pass


class Rungs(FIFOScheduler):
    """Ray's ASHA, remembered: every result that it judged lies in `record`, and a new driver judges
    them again, in the same order, before anything new.

    A run that is to stop finds a file and ends by itself, with a checkpoint; Tune would kill it in
    the midst of whatever it does.
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
                self._stop(judged)  # the driver may have died before

    @property
    def supports_buffered_results(self) -> bool:
        return False  # a verdict that comes late costs steps

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
        """ASHA's verdict on a result, kept in the order of judging."""
        run = _Known(f"{told['number']}")
        if run.trial_id not in self._known:
            self._known.add(run.trial_id)
            self._asha.on_trial_add(None, run)  # type: ignore[arg-type]
        ended = told["images_seen"] >= self._total  # there is nothing left to stop
        verdict = self._asha.on_trial_result(None, run, dict(told))  # type: ignore[arg-type]
        judged = told | {"stop": verdict == TrialScheduler.STOP and not ended}
        self._judged.append(judged)
        return judged

    def _stop(self, told: dict[str, Any]) -> None:
        name = PROBES[self._judged_by].name
        reason = f"not among the best by {name} at {told['images_seen']:,} images"
        (Location.of(self._stops) / f"{told['number']:04d}.json").write_json({"reason": reason})

    def save(self, checkpoint_path: str) -> None:
        pass  # the record is written before anything follows from it

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Known:
    """What ASHA asks of a trial: a name that is the same in every driver."""

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
    """Let Tune run all tasks of a source. What came of them lies in their files."""
    tuner = tune.Tuner(
        tune.with_resources(run_trial, {"cpu": TRIAL_CPUS}),
        tune_config=tune.TuneConfig(
            search_alg=source,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=at_once,
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(
            # A new name for each start: Tune would take an old one's folder for its own.
            name=f"tune-{time.time_ns()}",
            storage_path=(folder / "tune").uri,
            verbose=0,
        ),
    )
    for result in tuner.fit():
        if result.error is not None:
            log.error("a trial's process died: %s", result.error)
