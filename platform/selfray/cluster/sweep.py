"""A question -> Ray Tune -> runs -> an answer: the life of a sweep as its driver sees it."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune

from selfray import config, pictures
from selfray.cluster import runtime
from selfray.cluster.command import asking_mlflow
from selfray.cluster.launch import PartOf, RunFailed, launch, place
from selfray.cluster.runtime import Console, Resources
from selfray.cluster.tracking import Status, Tracker, environment_tags, tracking_uri
from selfray.experiment import Experiment
from selfray.storage import Location
from selfray.sweep import Question, Score, Trial, answer, rank_correlation, ranked

log = logging.getLogger(__name__)

TRIAL_CPUS = 0.01
"""A trial only waits for the Ray Train run that it started, whose workers take the CPUs."""
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Outcome:
    """What a trial leaves: its file in the sweep's folder."""

    label: str
    seed: int
    run: str | None
    """The run's folder; None where it could not be begun."""
    knn: float | None
    linear: float | None
    untrained_knn: float | None
    untrained_linear: float | None
    rankme: float | None
    uniformity: float | None
    alignment: float | None
    images_per_second: float | None
    failure: str | None
    """The cause in one line where the run did not end well."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to."""

    folder: str
    outcomes: list[Outcome]
    scores: list[Score]
    """The best first."""
    answer: str


def sweep(
    base: Experiment,
    question: Question,
    asked: str,
    console: Console,
    tracking: str | None = None,
    at_once: int | None = None,
) -> SweepResult:
    """Carry out all runs of a sweep on the Ray that is running, or go on where it stopped.

    Args:
        base: the experiment that is varied.
        question: what is varied, and how often.
        asked: the question in words; the answer begins with it.
        console: where progress is shown.
        tracking: MLflow tracking URI, as for `launch`.
        at_once: runs at a time; None takes as many as the cluster holds.

    Raises:
        ValueError: bad input, before any run is started.
    """
    trials = question.trials
    experiments = [trial.experiment(base) for trial in trials]  # refused here, if at all
    folder = Location.of(base.output) / "sweeps" / f"{question.name}-{_identity(experiments)}"
    folder.make_folder()
    cluster = runtime.cluster_resources()
    at_once = at_once or _fitting(base, cluster)
    console.say(
        f"{question.name}: {len(trials)} runs of {base.name}, {at_once} at a time: "
        f"{', '.join(axis.name for axis in question.axes)}"
        + (f", {question.seeds} seeds" if question.seeds > 1 else "")
    )
    console.say(f"folder: {folder}")
    uri = tracking_uri(Location.of(base.output), tracking)
    tracker = _parent(base, question, asked, folder, uri, console)
    tracker.start()
    status: Status = "FAILED"
    watch = _Watch(folder, trials, console)
    watch.start()
    try:
        parent = tracker.wait_for_run(30)
        tasks = [
            _Task(
                str(folder / "trials" / f"{number:04d}.json"),
                str(folder / "logs" / f"{number:04d}.log"),
                trial.label,
                trial.seed,
                config.dumps(_placed(experiment, cluster, at_once)),
                os.getcwd(),
                uri,
                parent,
                {f"sweep.{name}": option.label for name, option in trial.choice.items()},
            )
            for number, (trial, experiment) in enumerate(zip(trials, experiments, strict=True))
        ]
        _run_all(tasks, folder, at_once)
        outcomes = watch.finish()
        result = _result(folder, question, asked, trials, outcomes)
        _report(result, question, base, tracker, console)
        status = "FINISHED"
        return result
    except KeyboardInterrupt:
        status = "KILLED"
        _mark_killed(uri, tracker.run_id)
        raise
    finally:
        watch.finish()
        tracker.finish(status)


# One trial, in a process of its own


@dataclass(frozen=True)
class _Task:
    """What a trial is told. Plain values, so that any process can unpickle it."""

    file: str
    """Where the outcome is written."""
    log: str
    label: str
    seed: int
    experiment: str
    """As JSON."""
    folder: str
    """The driver's current one: relative paths of the experiment begin there."""
    tracking: str
    parent_run_id: str | None
    params: dict[str, str]


def _run_trial(setting: dict[str, Any]) -> dict[str, Any]:
    """What Tune runs for each trial. A failure is an outcome: it does not take the sweep down."""
    task: _Task = setting["task"]
    experiment: Experiment = config.loads(task.experiment)
    if Path(task.folder).is_dir():
        os.chdir(task.folder)  # Tune has gone into a folder of its own
    part = PartOf(task.parent_run_id, task.params)
    try:
        with _LogConsole(task.log) as console:
            result = launch(experiment, console, task.tracking, part_of=part)
        probe, untrained = result.final_probe, result.probes.get(0)
        found = Outcome(
            task.label,
            task.seed,
            result.folder,
            probe and probe.knn,
            probe and probe.linear,
            untrained and untrained.knn,
            untrained and untrained.linear,
            probe and probe.rankme,
            probe and probe.uniformity,
            probe and probe.alignment,
            result.images_per_second,
            None,
        )
    except (RunFailed, ValueError, OSError) as error:
        log.exception("%s, seed %d", task.label, task.seed)
        found = _failed(task.label, task.seed, str(error))
    Location.of(task.file).write_json(asdict(found))
    return {"done": True}


class _LogConsole(Console):
    """What a single run would tell a person, in a file."""

    def __init__(self, path: str) -> None:
        local = Path(path) if "://" not in path else Path(os.devnull)
        local.parent.mkdir(parents=True, exist_ok=True)
        self.file = local.open("a", encoding="utf-8")
        super().__init__(self.file, None)

    def __enter__(self) -> "_LogConsole":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


# All trials


def _run_all(tasks: Sequence[_Task], folder: Location, at_once: int) -> None:
    """Let Tune run what has no outcome yet. A run that was under way goes on from its checkpoint,
    since `launch` does so: the sweep keeps no second record of it."""
    left = [task for task in tasks if not Location.of(task.file).exists()]
    if not left:
        return
    tuner = tune.Tuner(
        tune.with_resources(_run_trial, {"cpu": TRIAL_CPUS}),
        param_space={"task": tune.grid_search(left)},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once, reuse_actors=False),
        run_config=tune.RunConfig(
            name=f"tune-{os.getpid()}", storage_path=(folder / "tune").uri, verbose=0
        ),
    )
    for result in tuner.fit():
        if result.error is not None:
            log.error("a trial's process died: %s", result.error)


def _mark_killed(uri: str, parent_run_id: str | None) -> None:
    """Say in MLflow that the runs under way were stopped: their processes end with this one."""
    if parent_run_id is None:
        return
    children = f"tags.`mlflow.parentRunId` = '{parent_run_id}' and status = 'RUNNING'"
    try:
        with asking_mlflow(uri) as (client, _):
            experiment = client.get_run(parent_run_id).info.experiment_id
            for run in client.search_runs([experiment], children):
                client.set_terminated(run.info.run_id, "KILLED")
    except OSError:
        log.exception("MLflow cannot be told that the runs were stopped")


def _fitting(experiment: Experiment, cluster: Resources) -> int:
    """How many runs the cluster holds at a time."""
    if cluster.gpus >= 1 and experiment.gpus_per_worker != 0:
        gpus = experiment.max_workers * (experiment.gpus_per_worker or 1)
        return max(1, int(cluster.gpus // gpus))
    # Without GPUs a run uses what it gets: two cores for each worker, one of them for its data.
    return max(1, int(cluster.cpus // (2 * experiment.max_workers)))


def _placed(experiment: Experiment, cluster: Resources, at_once: int) -> Experiment:
    """The experiment with its part of the cluster written down, so that no run takes it all. One
    that does not fit is left as it is: `launch` says what is missing."""
    share = replace(
        cluster,
        cpus=(cluster.cpus - TRIAL_CPUS * at_once) / at_once,
        gpus=cluster.gpus / at_once,
    )
    try:
        placement = place(experiment, share)
    except ValueError:
        return experiment
    return replace(
        experiment,
        cpus_per_worker=placement.cpus_per_worker,
        gpus_per_worker=placement.gpus_per_worker,
        data_cpus=int(placement.data_cpus * 100) / 100,
    )


class _Watch:
    """Tells of each trial that ends, by its file."""

    def __init__(self, folder: Location, trials: Sequence[Trial], console: Console) -> None:
        self._folder = folder / "trials"
        self._trials = trials
        self._console = console
        self._found: dict[int, Outcome] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="selfray-sweep")

    def start(self) -> None:
        self._folder.make_folder()
        self._look(tell=False)
        for number, outcome in list(self._found.items()):
            if outcome.failure is not None:  # it may have been mended
                file = self._folder / f"{number:04d}.json"
                file.filesystem.delete_file(file.path)
                del self._found[number]
        if self._found:
            self._console.say(f"{len(self._found)} of {len(self._trials)} runs were done before")
        self._thread.start()

    def finish(self) -> list[Outcome | None]:
        """All outcomes in the trials' order; None for one whose process died."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._look(tell=True)
        return [self._found.get(number) for number in range(len(self._trials))]

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            try:
                self._look(tell=True)
            except OSError:
                log.exception("the sweep's folder cannot be read now")

    def _look(self, tell: bool) -> None:
        for number in range(len(self._trials)):
            if number in self._found:
                continue
            try:
                outcome = Outcome(**(self._folder / f"{number:04d}.json").read_json())
            except (FileNotFoundError, json.JSONDecodeError):
                continue
            self._found[number] = outcome
            if tell:
                self._console.say(f"[{len(self._found)} of {len(self._trials)}] {_line(outcome)}")


def _line(outcome: Outcome) -> str:
    name = f"{outcome.label}, seed {outcome.seed}"
    if outcome.failure is not None:
        return f"{name} failed: {outcome.failure}"
    if outcome.knn is None or outcome.linear is None:
        return f"{name}: not probed, the data has no labels"
    return f"{name}: kNN {outcome.knn:.1%}, linear {outcome.linear:.1%}"


# The answer


def _result(
    folder: Location,
    question: Question,
    asked: str,
    trials: Sequence[Trial],
    outcomes: Sequence[Outcome | None],
) -> SweepResult:
    ended = [
        outcome or _failed(trial.label, trial.seed, "its process died")
        for trial, outcome in zip(trials, outcomes, strict=True)
    ]
    scores = []
    for label in dict.fromkeys(trial.label for trial in trials):
        mine = [outcome for outcome in ended if outcome.label == label]
        values = [getattr(outcome, question.metric) for outcome in mine]
        failures = tuple(outcome.failure for outcome in mine if outcome.failure)
        scores.append(Score(label, tuple(v for v in values if v is not None), failures))
    scores = ranked(scores)
    name = METRIC_NAMES[question.metric]
    return SweepResult(folder.uri, ended, scores, answer(asked, scores, name))


def _failed(label: str, seed: int, cause: str) -> Outcome:
    return Outcome(label, seed, *[None] * 9, failure=cause)


def agreement(outcomes: Sequence[Outcome]) -> str:
    """How far the label-free figures order the runs as kNN does, in a line; empty for few runs."""
    # Lower is better for the last two.
    signs = {"rankme": 1, "uniformity": -1, "alignment": -1}
    parts = []
    for name, sign in signs.items():
        pairs = [(o.knn, getattr(o, name)) for o in outcomes]
        known = [(k, sign * v) for k, v in pairs if k is not None and v is not None]
        found = rank_correlation(*zip(*known, strict=True)) if known else None
        if found is not None:
            parts.append(f"{name} {found:+.2f}")
    return f"rank correlation with kNN, without labels: {', '.join(parts)}" if parts else ""


METRIC_NAMES = {"knn": "kNN", "linear": "linear"}


def table(scores: Sequence[Score], metric: str) -> str:
    """The ranks in markdown."""
    lines = [f"| | {METRIC_NAMES[metric]} | spread over seeds | runs |", "|---|---|---|---|"]
    for score in scores:
        mean = f"{score.mean:.1%}" if score.values else "-"
        spread = "-" if score.spread is None else f"{100 * score.spread:.1f}"
        failed = f", {len(score.failures)} failed" if score.failures else ""
        lines.append(f"| {score.label} | {mean} | {spread} | {len(score.values)}{failed} |")
    return "\n".join(lines)


def _report(
    result: SweepResult, question: Question, base: Experiment, tracker: Tracker, console: Console
) -> None:
    """The table, the sentence and the figure: on the console, in the folder, in MLflow."""
    text = f"{table(result.scores, question.metric)}\n\n{result.answer}\n"
    if told := agreement(result.outcomes):
        text += f"\n{told}\n"
    console.say()
    console.say(text)
    folder = Location.of(result.folder)
    (folder / "table.md").write_bytes(text.encode())
    (folder / "outcomes.json").write_json({"outcomes": [asdict(o) for o in result.outcomes]})
    tracker.set_tags({"sweep.answer": result.answer})
    if folder.is_local:
        tracker.log_artifact(Path(folder.path) / "table.md")
    measured = [score for score in result.scores if score.values]
    if measured:
        by_label = {score.label: score.values for score in measured}
        asked_order = dict.fromkeys(trial.label for trial in question.trials)
        untrained = [getattr(o, f"untrained_{question.metric}") for o in result.outcomes]
        known = [value for value in untrained if value is not None]
        figure = pictures.sweep(
            {label: by_label[label] for label in asked_order if label in by_label},
            METRIC_NAMES[question.metric],
            sum(known) / len(known) if known else None,
            f"{question.name} of {base.name}",
            result.answer,
        )
        tracker.log_picture(figure, "sweep.png")
    console.say(f"figure    {result.folder}/artifacts/sweep.png")
    console.say(tracker.describe())


def _parent(
    base: Experiment,
    question: Question,
    asked: str,
    folder: Location,
    uri: str,
    console: Console,
) -> Tracker:
    params: Mapping[str, Any] = {
        "recipe": base.name,
        "seeds": question.seeds,
        "metric": question.metric,
        **{
            f"sweep.{axis.name}": ", ".join(option.label for option in axis.options)
            for axis in question.axes
        },
    }
    tags = {**environment_tags(), "sweep.question": asked, "run.folder": folder.uri}
    return Tracker(uri, "selfray", folder.name, folder, params, tags, say=console.say)


def _identity(experiments: Sequence[Experiment]) -> str:
    """Eight characters that differ where two sweeps consist of other runs."""
    return hashlib.sha256(" ".join(e.identity for e in experiments).encode()).hexdigest()[:8]
