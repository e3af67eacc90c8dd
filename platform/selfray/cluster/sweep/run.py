"""Runs a sweep: question -> Ray Tune -> runs -> answer, from the driver's side."""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from selfray import config
from selfray.cluster import runtime
from selfray.cluster.build import build_told
from selfray.cluster.mlflow_store import asking_mlflow, experiment_name, tracking_uri
from selfray.cluster.shipping import Status
from selfray.cluster.sweep.generations import evolve
from selfray.cluster.sweep.plan import Asking, SweepPlan, asked, fitting, placed
from selfray.cluster.sweep.report import SweepResult, report, result_of
from selfray.cluster.sweep.trial import Outcome, Task, failed
from selfray.cluster.sweep.tune import Rungs, TaskSource, run_tasks
from selfray.cluster.tracking import Tracker
from selfray.console import Console
from selfray.data.data_sets import as_started, open_data, remember
from selfray.data.plan import ReadPlan
from selfray.data.source import source_of
from selfray.experiment import Experiment
from selfray.metrics import PROBES
from selfray.pace import clock
from selfray.runs.environment import environment_tags
from selfray.runs.folder import TRIALS
from selfray.storage import Location
from selfray.sweeps.possible import refuse_impossible
from selfray.sweeps.question import Question
from selfray.sweeps.searches import SEARCHES

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0


def sweep(
    base: Experiment,
    question: Question,
    words: str,
    console: Console,
    tracking: str | None = None,
    at_once: int | None = None,
) -> SweepResult:
    """Carry out all runs of a sweep on the running Ray, or resume it where it stopped.

    Args:
        base: the experiment that is varied.
        question: what is varied, how it is searched, and how often.
        words: the question in words; the answer begins with it.
        console: where progress is shown.
        tracking: MLflow tracking URI, as for `launch`.
        at_once: runs at a time; None takes as many as the cluster holds.

    Raises:
        ValueError, FileNotFoundError: bad input; no run was started.
    """
    output = Location.of(base.output)
    base = _probed_at_every_checkpoint(base)
    refuse_impossible(base, question)
    # Opened and converted once, not by each run; a wrong path is reported before any run starts.
    data = open_data(base.data, output, console.say, build_told)
    question = _with_metrics(question, base, data.can_probe)
    folder = output / "sweeps" / f"{question.name}-{_identity(base, question)}"
    (folder / TRIALS).make_folder()
    # Steps of generations and rungs follow from the data that the sweep started with.
    shards = as_started(data.train, folder, console.say)
    remember(shards, folder)
    read_plan = source_of(base, shards).plan
    cluster = runtime.cluster_resources()
    fits = fitting(base, cluster)
    at_once = at_once or fits
    try:
        base = placed(base, cluster, at_once)
    except ValueError as error:
        if at_once <= fits:
            raise
        raise ValueError(
            f"--at-once {at_once} is more than the cluster holds: give {fits} or less, or add "
            f"nodes ({error})"
        ) from None
    _say_plan(console, base, question, folder, at_once)
    uri = tracking_uri(output, tracking)
    tracker = _parent(base, question, words, folder, uri, console)
    tracker.start()
    status: Status = "FAILED"
    watch = _Watch(folder / TRIALS, question.runs, console)
    watch.start()
    try:
        plan = SweepPlan(folder.uri, base, question, uri, tracker.wait_for_run(30))
        _run(plan, read_plan, at_once, console)
        outcomes = _in_order(plan, watch.finish())
        result = result_of(plan, words, outcomes)
        report(result, plan, tracker, console)
        status = "FINISHED"
        return result
    except KeyboardInterrupt:
        status = "KILLED"
        _mark_killed(uri, tracker.run_id)
        raise
    finally:
        watch.finish()
        tracker.finish(status)


def _run(plan: SweepPlan, read_plan: ReadPlan, at_once: int, console: Console) -> None:
    """Run everything that has no outcome yet. `launch` resumes an interrupted run from its
    checkpoint, so the sweep needs no record of it."""
    question, folder = plan.question, plan.location
    search = SEARCHES[question.search]
    if search.is_population:
        evolve(plan, read_plan.total_steps, at_once, console.say)
        return
    source = Asking(plan) if search.ask else TaskSource(_left(plan))
    scheduler = None
    if question.halving is not None:
        record, stops = folder / "rungs.json", folder / "stops"
        scheduler = Rungs(question.halving, read_plan.total_images, record, stops)
    if not source.is_done:
        run_tasks(source, scheduler, folder, at_once)


def _left(plan: SweepPlan) -> list[Task]:
    tasks = [
        task
        for number, choice in enumerate(plan.question.choices)
        for task in plan.tasks_of(number, choice)
    ]
    return [task for task in tasks if plan.outcome(task.number) is None]


def _in_order(plan: SweepPlan, found: Mapping[int, Outcome]) -> list[Outcome]:
    """An outcome for each run of the sweep; a failure for a run whose process died."""
    question = plan.question
    search = SEARCHES[question.search]
    if search.is_population:
        return [found[number] for number in sorted(found)]
    choices = asked(plan) if search.ask else question.choices
    trials = [trial for choice in choices for trial in question.trials(choice)]
    return [
        found.get(number) or failed(trial.label, trial.seed, "its process died")
        for number, trial in enumerate(trials)
    ]


# Before anything is run


def _probed_at_every_checkpoint(base: Experiment) -> Experiment:
    """Probe every checkpoint, for curves, schedulers and comparisons. Raises ValueError for runs
    without probes."""
    if base.probe.times == 0:
        raise ValueError("--probes 0: a sweep ranks runs by their probes; give at least 1")
    return config.override(
        base, **{"probe.every_checkpoint": True, "checkpoint.times": base.probe.times}
    )


def _with_metrics(question: Question, base: Experiment, labelled: bool) -> Question:
    """The question with explicit metrics for ranking and stopping. Raises ValueError if the images
    lack the labels that these need."""
    judged_by = base.method.judged_by
    metric = question.metric
    if metric is None and not labelled:
        if judged_by != "knn":
            raise ValueError(
                f"the images have no labels, and RankMe is unreliable for {base.method.name}: "
                "give labelled images with --test-data, or force --rank-by rankme"
            )
        metric = "rankme"
    metric = metric or judged_by
    halving = question.halving and replace(
        question.halving, metric=question.halving.metric or metric
    )
    for name, value in (("rank-by", metric), ("stop-by", halving and halving.metric)):
        if value is not None and PROBES[value].is_accuracy and not labelled:
            raise ValueError(
                f"--{name} {value} needs labels, but the images have none: give labelled images "
                f"with --test-data, or give --{name} rankme"
            )
    return replace(question, metric=metric, halving=halving)


def _identity(base: Experiment, question: Question) -> str:
    """Eight hex characters that differ between different sweeps."""
    asked_of = json.dumps([base.identity, config.to_json(question)], sort_keys=True)
    return hashlib.sha256(asked_of.encode()).hexdigest()[:8]


def _say_plan(
    console: Console, base: Experiment, question: Question, folder: Location, at_once: int
) -> None:
    assert question.metric is not None
    varied = "; ".join(f"{axis.name} {axis.described}" for axis in question.axes)
    console.say(
        f"{question.name}: {question.runs} runs of {base.name} by {question.search} search, "
        f"{at_once} at a time, ranked by {PROBES[question.metric].name}: {varied}"
        + (f"; {question.seeds} seeds" if question.seeds > 1 else "")
    )
    halving = question.halving
    if halving is not None:
        assert halving.metric is not None
        console.say(
            f"from {halving.first:.0%} of the images on, one run in {halving.factor:g} continues "
            f"at each rung, by {PROBES[halving.metric].name}"
        )
        if not PROBES[halving.metric].is_accuracy and base.method.judged_by != "knn":
            console.say(f"note: {PROBES[halving.metric].name} is unreliable for {base.method.name}")
    console.say(f"folder: {folder}")


def _parent(
    base: Experiment,
    question: Question,
    words: str,
    folder: Location,
    uri: str,
    console: Console,
) -> Tracker:
    params: dict[str, Any] = {
        "recipe": base.name,
        "seeds": question.seeds,
        "rank_by": question.metric,
        "search": question.search,
        "runs": question.runs,
        **{f"sweep.{axis.name}": axis.described for axis in question.axes},
    }
    tags = {**environment_tags(), "sweep.question": words, "run.folder": folder.uri}
    return Tracker(uri, experiment_name(), folder.name, folder, params, tags, say=console.say)


# While it runs


def _mark_killed(uri: str, parent_run_id: str | None) -> None:
    """Mark running trials as killed in MLflow, because their processes end with this one."""
    if parent_run_id is None:
        return
    children = f"tags.`mlflow.parentRunId` = '{parent_run_id}' and status = 'RUNNING'"
    try:
        with asking_mlflow(uri) as (client, _):
            experiment = client.get_run(parent_run_id).info.experiment_id
            for run in client.search_runs([experiment], children):
                client.set_terminated(run.info.run_id, "KILLED")
    except OSError:
        log.exception("the runs cannot be marked as killed in MLflow")


class _Watch:
    """Reports each run that ends, by watching for its outcome file."""

    def __init__(self, folder: Location, runs: int, console: Console) -> None:
        self._folder = folder
        self._runs = runs
        self._console = console
        self._found: dict[int, Outcome] = {}
        self._ended = threading.Event()
        self._before, self._began = 0, time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="selfray-sweep")

    def start(self) -> None:
        self._look(tell=False)
        for number, outcome in list(self._found.items()):
            if outcome.failure is not None:  # failed runs are tried again
                file = self._folder / _file(number)
                file.filesystem.delete_file(file.path)
                del self._found[number]
        self._before = len(self._found)
        if self._found:
            self._console.say(f"{len(self._found)} of {self._runs} runs were already done")
        self._thread.start()

    def finish(self) -> Mapping[int, Outcome]:
        """All outcomes by the runs' numbers."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._look(tell=True)
        return self._found

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            try:
                self._look(tell=True)
            except OSError:
                log.exception("the sweep's folder cannot be read now")

    def _look(self, tell: bool) -> None:
        for number in range(self._runs):
            if number in self._found:
                continue
            try:
                outcome = Outcome.from_json((self._folder / _file(number)).read_json())
            except (FileNotFoundError, json.JSONDecodeError):
                continue
            self._found[number] = outcome
            if tell:
                self._console.say(f"[{len(self._found)} of {self._runs}] {outcome.described}")
        if tell:
            self._console.live(self._progress())

    def _progress(self) -> str:
        """The number of finished runs, and the remaining time at the speed so far."""
        done = len(self._found)
        line = f"{done} of {self._runs} runs done"
        new = done - self._before
        if not new:
            return line
        left = (time.monotonic() - self._began) / new * (self._runs - done)
        return f"{line}, about {clock(left)} left"


def _file(number: int) -> str:
    return f"{number:04d}.json"
