"""One rank's training: build or resume the state, stream, train, checkpoint."""

import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import ray.train
import ray.train.torch
import torch

from selfray import checkpoint, config, distributed
from selfray.checkpoint import Checkpoint
from selfray.cluster import dataset
from selfray.cluster.dataset import Stream
from selfray.cluster.worker import WorkerTask
from selfray.experiment import Experiment
from selfray.health import feature_health
from selfray.method import Batch
from selfray.plan import Share, even_steps
from selfray.source import BROKEN, POSITION, source_of
from selfray.spool import SpoolWriter
from selfray.storage import Location
from selfray.train import Step, TrainState, train

SPOOL = "spool"
log = logging.getLogger(__name__)


def run(task: WorkerTask) -> None:
    """One worker's whole life in a run. Raises where the run cannot go on."""
    experiment: Experiment = config.loads(task.experiment)
    device = ray.train.torch.get_device()
    context = ray.train.get_context()
    share = Share(context.get_world_rank(), context.get_world_size(), experiment.accumulate)
    if device.type == "cpu":
        # No more threads than CPUs that are ours: OpenMP's threads wait for one another, so a step
        # whose second thread shares its core with a data task takes three times as long as a
        # step on one thread (measured).
        torch.set_num_threads(max(1, int(task.cpus)))
    run_folder = Location.of(task.run)
    source = source_of(experiment, task.shards)
    state = TrainState.start(experiment, source.plan.total_images, device)
    recorder = Recorder(experiment, run_folder, source.plan.total_steps, share.rank == 0)
    found = checkpoint.latest(run_folder)
    if found is not None:
        state.load_state_dict(found.state())
    elif experiment.init_from is not None:
        state.load_weights(Checkpoint.open(experiment.init_from).state())
    recorder.started(state, device)

    stream = Stream(source, share, state.progress.step, task.data_cpus / share.world_size)
    batches = _checked(stream, experiment, recorder)
    train(state, batches, experiment, lambda step: recorder.on_step(state, step), device)
    recorder.finished(state)


def _checked(stream: Stream, experiment: Experiment, recorder: "Recorder") -> Iterator[Batch]:
    """The stream as tensors; broken images are reported by name, too many of them end the run."""
    seen = broken = 0
    for arrays in stream:
        seen += len(arrays[BROKEN])
        if arrays[BROKEN].any():
            positions = arrays[POSITION][arrays[BROKEN]]
            broken += len(positions)
            names = [stream.source.name_of(int(position)) for position in positions]
            recorder.broken_images(names, broken)
            if broken > max(10, experiment.data.max_broken_fraction * seen):
                raise ValueError(
                    f"{broken} of the first {seen} images cannot be read, more than "
                    f"data.max_broken_fraction {experiment.data.max_broken_fraction}: the last is "
                    f"{names[-1]}; look at the data with `selfray shards check --deep`"
                )
        yield dataset.to_tensors(arrays, experiment.views)


@dataclass
class Recorder:
    """Rank 0's memory of a run: metrics and events to the spool, checkpoints to the run's folder.

    The other ranks keep one that writes nothing, so that the loop is the same on all.
    """

    experiment: Experiment
    run: Location
    total_steps: int
    writes: bool
    spool: SpoolWriter = field(init=False)
    checkpoint_steps: set[int] = field(init=False)
    window: list[Step] = field(default_factory=list)
    saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        # One writer for each start: two attempts may overlap while a dead worker is not yet gone.
        self.spool = SpoolWriter(self.run / SPOOL, f"train-{time.time_ns()}")
        self.checkpoint_steps = even_steps(self.total_steps, self.experiment.checkpoint.times)
        self.checkpoint_steps |= even_steps(self.total_steps, self.experiment.probe.times)

    def started(self, state: TrainState, device: torch.device) -> None:
        if self.writes:
            self.spool.event(
                "started",
                step=state.progress.step,
                images_seen=state.progress.images_seen,
                world_size=distributed.world_size(),
                device=str(device),
                host=socket.gethostname(),
                process=os.getpid(),
            )

    def broken_images(self, names: list[str], total: int) -> None:
        """Every rank tells of its own: a name that nobody wrote down could not be mended."""
        self.spool.event("broken_images", names=", ".join(names), total=total)

    def on_step(self, state: TrainState, step: Step) -> None:
        self.window.append(step)
        number = step.progress.step
        if not self.writes:
            self.window.clear()
            return
        if number == 1 or number % self.experiment.log_every == 0 or step.progress.finished:
            self._record(state, step)
        age = time.monotonic() - self.saved_at
        if number in self.checkpoint_steps or age > 60 * self.experiment.checkpoint.minutes:
            self._save(state, float(step.loss))

    def _record(self, state: TrainState, step: Step) -> None:
        """One point of every metric: means over the steps since the last point."""
        seconds = sum(s.seconds for s in self.window)
        waited = sum(s.waited_seconds for s in self.window)
        images = len(self.window) * self.experiment.batch_size
        loss = float(torch.stack([s.loss for s in self.window]).mean())
        values = {
            "loss": loss,
            "learning_rate": step.learning_rate,
            "gradient_norm": float(step.gradient_norm),
            "throughput/images_per_second": images / seconds,
            "throughput/data_wait_seconds": waited / len(self.window),
            "throughput/data_wait_fraction": waited / seconds,
            **{name: float(value) for name, value in step.metrics.items()},
            **{
                f"health/{name}": value
                for name, value in feature_health(state.method.encoder, step.images).items()
            },
        }
        self.window.clear()
        self.spool.metrics(step.progress.images_seen, values)
        self.spool.event(
            "progress",
            step=step.progress.step,
            images_seen=step.progress.images_seen,
            images_per_second=values["throughput/images_per_second"],
            loss=loss,
        )
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {step.progress.step}: lower "
                "--optimizer.base-learning-rate or use --precision float32"
            )

    def _save(self, state: TrainState, loss: float) -> None:
        """Write a checkpoint. A full disk or a failing store is told, and training goes on."""
        try:
            saved = checkpoint.save(state, self.experiment, self.run, loss)
        except OSError as error:
            log.exception("checkpoint failed")
            self.spool.event("checkpoint_failed", step=state.progress.step, message=str(error))
            if state.progress.finished:
                raise OSError(
                    f"the last checkpoint cannot be written to {self.run}: {error}; make room and "
                    "start the same command again"
                ) from error
            return
        self.saved_at = time.monotonic()
        self.spool.event(
            "checkpoint",
            step=saved.step,
            images_seen=saved.images_seen,
            path=saved.location.uri,
            loss=loss,
        )

    def finished(self, state: TrainState) -> None:
        if self.writes:
            self.spool.event("finished", step=state.progress.step)
        self.spool.close()
