"""Launches a run: Experiment -> TorchTrainer -> result, from the driver's side."""

import logging
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from selfray import config, plugins
from selfray.cluster import local_ray, runtime
from selfray.cluster.build import build_told
from selfray.cluster.endings import RunFailed
from selfray.cluster.fit import fit
from selfray.cluster.monitor import Monitor
from selfray.cluster.origin import chosen, description, given_by_user, outcome, tracker_of
from selfray.cluster.pictures import log_pictures
from selfray.cluster.placement import PROBE_CPUS, Placement, place
from selfray.cluster.preflight import check_init_from, check_output, checkpoint_bytes, located
from selfray.cluster.probe_tasks import ProbeJob
from selfray.cluster.task import WorkerTask
from selfray.cluster.tracking import Tracker
from selfray.console import Console
from selfray.data.data_sets import DataSets, as_started, open_data, remember
from selfray.data.plan import ReadPlan
from selfray.data.source import source_of
from selfray.experiment import Experiment
from selfray.probes.features import ProbeResult
from selfray.probes.protocol import PIXEL_BASELINE_SIZE
from selfray.runs import checkpoint, record, starting
from selfray.runs.folder import STOP
from selfray.runs.history import History
from selfray.runs.milestones import milestones
from selfray.storage import Location
from selfray.tokenizer import TokenizerConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """The result of a finished run, also stored in its run.json."""

    folder: str
    seconds: float
    """Wall time of all attempts, from the command to the last checkpoint."""
    images_per_second: float
    """Images trained per second, median over the run."""
    first_step_seconds: float
    """From the command to the first optimizer step."""
    probes: dict[int, ProbeResult]
    """Probes by step; 0 is the encoder before training."""

    history: History
    """The points of its curves."""
    images_seen: int = 0
    """Images seen up to the last checkpoint."""
    stopped: str | None = None
    """Why the run was stopped early, with a checkpoint to resume from; None if it was not."""

    @property
    def final_probe(self) -> ProbeResult | None:
        return self.probes[max(self.probes)] if self.probes else None


@dataclass(frozen=True)
class PartOf:
    """The sweep or evaluation that a run belongs to."""

    parent_run_id: str | None
    """The sweep's MLflow run; None if the server was not reached."""
    params: Mapping[str, str]
    """Further parameters for MLflow: the values that the sweep tries in this run."""
    title: str | None = None
    """The run's name in MLflow; None takes its folder's name."""
    folder: str | None = None
    """The run's folder, if the sweep chooses it; None takes the run's own."""
    until_step: int | None = None
    """The step at which the run pauses, with a checkpoint; None trains to the end."""
    stop_file: str | None = None
    """The run ends, with a checkpoint, soon after this file appears; it holds {"reason": ...}."""
    on_probe: Callable[[int, ProbeResult], None] | None = None
    """Called with (images seen, result) of every probe, in the probes' thread. On resume it is
    first called for the probes already recorded."""
    brief: bool = False
    """Whether the console shows only the run's title, its progress and what goes wrong, and no
    pictures are drawn."""

    def remark(self, console: Console) -> Callable[[str], None]:
        """Where lines go that a person needs only for a run that was started by itself."""
        return log.info if self.brief else console.say

    def stop_reason(self) -> str | None:
        """The reason in the stop file; None while there is no such file."""
        if self.stop_file is None or not Location.of(self.stop_file).exists():
            return None
        return str(Location.of(self.stop_file).read_json()["reason"])


def launch(
    experiment: Experiment,
    console: Console,
    tracking: str | None = None,
    started: float | None = None,
    part_of: PartOf | None = None,
    opened: DataSets | None = None,
) -> RunResult:
    """Run an experiment on the running Ray, or resume it where it stopped.

    Args:
        experiment: what to run.
        console: where progress is shown.
        tracking: MLflow tracking URI; None takes MLFLOW_TRACKING_URI, else a SQLite store in the
            output folder.
        started: time.time() of the command, for the time to the first step.
        part_of: the sweep that the run belongs to, if any.
        opened: the data sets, if the caller has opened them; None opens experiment.data.

    Raises:
        ValueError, FileNotFoundError: bad input; no worker was started.
        RunFailed: the run failed, with the cause in one line; the last good checkpoint is kept.
    """
    started = started or time.time()
    experiment = located(experiment)
    output = Location.of(experiment.output)
    part = part_of or PartOf(None, {})
    run = Location.of(part.folder) if part.folder else output / experiment.run_name
    if experiment.guard.worse_than_start and part.stop_file is None:
        part = replace(part, stop_file=(run / STOP).uri)
    check_init_from(experiment)
    check_output(run, checkpoint_bytes(experiment))
    remark = part.remark(console)
    started_from = starting.keep(experiment, run, remark)
    if opened is None:
        console.live("opening the data")
        with record.exclusive(output, console.say):
            opened = open_data(experiment.data, output, console.say, build_told)
    data = opened
    experiment = starting.normalized(experiment, data.statistics, run, console.say)
    used = experiment.method.provenance(experiment.encoder, experiment.data.normalization)
    if checkpoint.all_of(run):
        data = replace(data, train=as_started(data.train, run, console.say))
    plan = source_of(experiment, data.train).plan
    placement = place(experiment, runtime.cluster_resources())
    _say_plan(console, experiment, plan, data, run, part)
    with record.alone(run):
        finished = _finished_result(run, part)
        if finished is not None:
            remark(
                f"this run is complete, nothing to do: {run}; change a setting, such as --seed "
                f"{experiment.seed + 1}, for another"
            )
            return finished
        remember(data.train, run)
        tags = {**used, **started_from}
        tracker = tracker_of(experiment, run, plan, data, tags, tracking, part, console)
        return _carry_out(experiment, console, run, data, plan, placement, tracker, started, part)


def _carry_out(
    experiment: Experiment,
    console: Console,
    run: Location,
    data: DataSets,
    plan: ReadPlan,
    placement: Placement,
    tracker: Tracker,
    started: float,
    part: PartOf,
) -> RunResult:
    found = checkpoint.latest(run)
    if found is not None:
        console.say(
            f"continuing from step {found.step:,} of {plan.total_steps:,} "
            f"({found.location.name}), epoch {found.images_seen / plan.images_per_epoch:.1f}"
        )
    settings = record.write_config(run, experiment)
    failed_before = record.read(run).get("status") == "failed"
    record.write(run, experiment, "running", given=given_by_user(experiment))
    if failed_before:
        tracker.set_tags({"failure": ""})  # that of an earlier start
    # Runs of a sweep are compared at fixed steps, so their milestones are not adapted.
    is_own = part.parent_run_id is None and not part.params
    events = milestones(experiment, plan.total_steps, chosen(experiment) if is_own else None)
    if events.note:
        console.say(events.note)
    job = _probe_job(experiment, data) if experiment.probe.times else None
    monitor = Monitor(
        console,
        run,
        experiment,
        plan,
        tracker,
        job,
        events.probes,
        started,
        part.on_probe,
        part.stop_file,
    )
    monitor.start()
    status: Any = "FAILED"

    def failed(cause: str) -> None:
        record.write_failure(run, experiment, cause, given=given_by_user(experiment))
        with suppress(OSError):
            tracker.set_tags({"failure": cause})

    def lost(cause: str) -> None:
        """Record the cause: Ray has ended and will end this process in a moment."""
        failed(cause)
        console.say(f"error: {cause}")
        monitor.stop("FAILED")

    goal = part.until_step or plan.total_steps
    watching = local_ray.exit_when_lost(lost)
    try:
        with watching:
            if found is None or (found.step < goal and part.stop_reason() is None):
                task = WorkerTask(
                    config.dumps(experiment),
                    data.train,
                    run.uri,
                    placement.cpus_per_worker,
                    placement.data_cpus / placement.workers,
                    events.checkpoints,
                    part.until_step,
                    part.stop_file,
                )
                fit(experiment, run, placement, task, console)
            monitor.training_ended()
        reached = checkpoint.latest(run)
        if reached is None:
            raise RunFailed("the run ended before its first checkpoint")
        is_whole = reached.step == plan.total_steps
        stopped = None if is_whole else part.stop_reason()
        if is_whole and not part.brief:
            log_pictures(experiment, run, data, plan, monitor.history, tracker, console)
        if stopped is not None:
            tracker.set_tags({"stopped": stopped})
        tracker.describe_run(description(experiment, plan, outcome(monitor)))
        status = "FINISHED"
    except RunFailed as error:
        failed(str(error))
        tracker.describe_run(description(experiment, plan, f"Failed: {error}"))
        raise
    except OSError as error:
        cause = f"{error}; fix it and start the same command again"
        failed(cause)
        raise RunFailed(cause) from error
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        monitor.stop(status)
    result = RunResult(
        run.uri,
        monitor.seconds,
        monitor.images_per_second,
        monitor.first_step_seconds,
        monitor.probes,
        monitor.history,
        reached.images_seen,
        stopped,
    )
    ended = "finished" if is_whole else "stopped" if stopped else "paused"
    record.write(run, experiment, ended, given=given_by_user(experiment), result=asdict(result))
    remark = part.remark(console)
    remark(monitor.summary(placement.data_cpus, placement.gpus_per_worker > 0))
    remark(tracker.describe())
    remark(f"again, with another seed: {_repeat_command(experiment, settings)}")
    ending = stopped and f"stopped early: {stopped}"
    for line in filter(None, (ending, monitor.verdict())):
        console.say(line)
    return result


def _finished_result(run: Location, part: PartOf) -> RunResult | None:
    """The result of a run that has already finished, or that its sweep stopped; None if there is
    work left."""
    written = record.read(run)
    stays_stopped = written.get("status") == "stopped" and part.stop_reason() is not None
    if written.get("status") != "finished" and not stays_stopped:
        return None
    result = written["result"]
    probes = {int(step): ProbeResult(**values) for step, values in result.pop("probes").items()}
    history = History.from_json(result.pop("history"))
    return RunResult(**result, probes=probes, history=history)


def _probe_job(experiment: Experiment, data: DataSets, largest: int | None = None) -> ProbeJob:
    """Probes at the encoder's image size, but at most at side `largest` in pixels."""
    side = min(experiment.encoder.image_size, largest or experiment.encoder.image_size)
    train, test = data.samples(side, experiment.probe.train_limit, experiment.probe.test_limit)
    labelled = train if data.can_probe else None
    return ProbeJob(labelled, test, *experiment.data.normalization, cpus=PROBE_CPUS)


def baseline(experiment: Experiment, console: Console) -> ProbeResult:
    """Probe raw pixels, the baseline for encoders."""
    output = Location.of(experiment.output)
    data = open_data(experiment.data, output, console.say, build_told)
    run = output / experiment.run_name
    experiment = starting.normalized(experiment, data.statistics, run, console.say)
    if not data.can_probe:
        raise ValueError(f"--data.path {experiment.data.path} has no labels to probe with")
    return _probe_job(experiment, data, PIXEL_BASELINE_SIZE).run(None)


def _repeat_command(experiment: Experiment, settings: Location) -> str:
    """The command that repeats a run from its file with the next seed."""
    command = "tokenizer" if isinstance(experiment.method, TokenizerConfig) else "pretrain"
    words = ["selfray", command, "--config", settings.uri]
    words += [word for name in plugins.named() for word in (plugins.FLAG, name)]
    return shlex.join([*words, "--seed", str(experiment.seed + 1)])


def _say_plan(
    console: Console,
    experiment: Experiment,
    plan: ReadPlan,
    data: DataSets,
    run: Location,
    part: PartOf,
) -> None:
    tail = f" ({plan.tail:,} left over in each epoch)" if plan.tail else ""
    name = part.title if part.brief and part.title else experiment.run_name
    console.say(
        f"{name}: {plan.rows:,} images, {experiment.epochs:,} epochs of "
        f"{plan.steps_per_epoch:,} steps of {experiment.batch_size:,}{tail}, "
        f"{experiment.workers} worker{'s' if experiment.max_workers > 1 else ''}"
    )
    if not data.can_probe and experiment.probe.times:
        console.say(
            "the data has no labels: the encoder is judged by label-free figures, RankMe, "
            "alignment and uniformity"
        )
    part.remark(console)(f"folder: {run}")
