"""Writes metrics and events of a training run to its spool, and checkpoints to its folder."""

import logging
import math
import os
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch

from selfray import distributed
from selfray.experiment import Experiment
from selfray.health import CollapsedError, CollapseGuard, feature_health
from selfray.runs import checkpoint
from selfray.runs.folder import SPOOL
from selfray.runs.spool import SpoolWriter
from selfray.schedules import Progress
from selfray.step import shard
from selfray.storage import Location
from selfray.suspects import suspect
from selfray.train import Step, TrainState

log = logging.getLogger(__name__)

LEARN_SLOWER = (
    "give a lower --optimizer.base-learning-rate, a longer --optimizer.schedule.warmup-fraction or "
    "another --seed"
)


class EndedEarly(Exception):  # noqa: N818 - not an error
    """Raised on all ranks, in the same step and after a checkpoint, if a run pauses or must
    stop."""


@dataclass
class Recorder:
    """Records a run on rank 0: metrics and events to the spool, checkpoints to the run's folder.

    Other ranks have a recorder that writes nothing, so that the loop is the same on all ranks.
    """

    experiment: Experiment
    run: Location
    checkpoint_steps: Collection[int]
    """Steps at whose end a checkpoint is written (runs/milestones.py)."""
    writes: bool
    until_step: int | None = None
    stop_file: Location | None = None
    spool: SpoolWriter = field(init=False)
    guard: CollapseGuard = field(init=False)
    window: list[Step] = field(default_factory=list)
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int | None = None
    """Step of the last checkpoint."""
    owes_checkpoint: bool = False
    """Whether a checkpoint that was due has been postponed by the guard."""

    def __post_init__(self) -> None:
        # One writer per start: two attempts may overlap until a dying worker has ended.
        self.spool = SpoolWriter(self.run / SPOOL, f"train-{time.time_ns()}")
        self.guard = CollapseGuard(self.experiment.guard)

    def started(self, state: TrainState, device: torch.device) -> None:
        self.saved_step = state.progress.step or None
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
        """Record broken images of this rank. Every rank records its own; rank 0 never sees
        others'."""
        self.spool.event("broken_images", names=", ".join(names), total=total)

    def on_step(self, state: TrainState, step: Step) -> None:
        # Without the images, which are a view into the batch: keeping them would fill a GPU.
        self.window.append(replace(step, images=step.images[:0].clone()))
        number = step.progress.step
        ends = self._ends(step)
        together = shard.is_sharded(state.method)
        if not (self.writes or together):
            self.window.clear()
            if ends:
                raise EndedEarly
            return
        logs = number == 1 or number % self.experiment.log_every == 0 or step.progress.finished
        age = time.monotonic() - self.saved_at
        saves = number in self.checkpoint_steps or age > 60 * self.experiment.checkpoint.minutes
        saves |= ends
        if together:
            # All ranks gather weights for a save, so they must agree on steps, not on clocks.
            due = number in self.checkpoint_steps or ends
            saves = distributed.any_rank(saves, step.loss.device) if logs else due
        if not (logs or saves):
            return
        # Each checkpoint's step is also a point of the metrics, so that the guard sees it first.
        loss = self._record(state, step)
        suspects = self.guard.suspects
        if together:
            suspects = distributed.any_rank(suspects and self.writes, step.loss.device)
        if suspects:
            # Checkpoints of collapsed weights must not replace the last good one.
            self.owes_checkpoint |= saves
            self.saved_at = time.monotonic()
        elif saves or self.owes_checkpoint:
            self._check_weights(state)
            self._save(state, loss, is_last=ends or state.progress.finished)
        if ends:
            raise EndedEarly

    def _ends(self, step: Step) -> bool:
        """Whether the run must end early at this step; the same on all ranks."""
        if step.progress.finished:
            return False
        number = step.progress.step
        if number == self.until_step:
            return True
        if self.stop_file is None or number % self.experiment.log_every:
            return False
        told = self.writes and self.stop_file.exists()
        return distributed.any_rank(told, step.loss.device)

    def _record(self, state: TrainState, step: Step) -> float:
        """Record one point of every metric, mostly means over the steps since the last point.
        Returns the loss. Raises if the run has diverged or collapsed."""
        seconds = sum(s.seconds for s in self.window)
        waited = sum(s.waited_seconds for s in self.window)
        images = len(self.window) * self.experiment.batch_size
        loss = float(torch.stack([s.loss for s in self.window]).mean())
        health = feature_health(state.method.encoder, step.images)
        values = {
            "loss": loss,
            "epoch": self.experiment.epochs
            * step.progress.images_seen
            / step.progress.total_images,
            "learning_rate": step.learning_rate,
            "gradient_norm": float(step.gradient_norm),
            "throughput/images_per_second": images / seconds,
            "throughput/data_wait_seconds": waited / len(self.window),
            "throughput/data_wait_fraction": waited / seconds,
            **{name: float(value) for name, value in step.metrics.items()},
            **{f"health/{name}": value for name, value in health.items()},
        }
        if not self.writes:
            self.window.clear()
            return loss
        self.spool.metrics(step.progress.images_seen, values)
        self.spool.event(
            "progress",
            step=step.progress.step,
            images_seen=step.progress.images_seen,
            images_per_second=values["throughput/images_per_second"],
            loss=loss,
        )
        self._check_window()
        self.window.clear()
        self._check_features(values, step.progress)
        return loss

    def _check_window(self) -> None:
        """Raise FloatingPointError that names the first step with a non-finite loss or gradient
        norm since the last point."""
        # Not in every step, because reading values waits for the GPU. The norm is that of the
        # ranks' mean gradient, so it also shows faults of other ranks.
        figures = torch.stack([torch.stack([s.loss, s.gradient_norm]) for s in self.window])
        for step, (loss, norm) in zip(self.window, figures.tolist(), strict=True):
            for name, value in (("loss", loss), ("gradient norm", norm)):
                if not math.isfinite(value):
                    raise FloatingPointError(
                        self._failed_at(
                            f"the {name} is {value}",
                            step.progress,
                            suspect(self.experiment, step.progress.step),
                        )
                    )

    def _check_weights(self, state: TrainState) -> None:
        """Raise FloatingPointError if any weight is not finite, also outside of the encoder."""
        tensors = [*state.method.parameters(), *state.method.buffers()]
        tensors = [distributed.own_part(tensor) for tensor in tensors]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            advice = suspect(self.experiment, state.progress.step + 1)
            raise FloatingPointError(
                self._failed_at("the weights are not finite", state.progress, advice)
            )

    def _check_features(self, values: dict[str, float], progress: Progress) -> None:
        """Raise CollapsedError if features have been collapsed for too long or at the end, and
        FloatingPointError if this step's update made features non-finite."""
        if math.isnan(values["health/effective_rank"]):
            advice = suspect(self.experiment, progress.step + 1)
            raise FloatingPointError(
                self._failed_at("the features are not finite", progress, advice)
            )
        self.guard.see(values, progress.fraction)
        if self.guard.collapsed or (self.guard.suspects and progress.finished):
            cause = self._failed_at(self.guard.verdict, progress)
            raise CollapsedError(f"{cause} (--guard.patience 0 switches this check off)")

    def _failed_at(self, cause: str, progress: Progress, advice: str = LEARN_SLOWER) -> str:
        """One line: what ended the run, which checkpoint is left, and what may help."""
        left = (
            "there is no checkpoint yet"
            if self.saved_step is None
            else f"the checkpoint of step {self.saved_step:,} is kept"
        )
        return f"{cause} at step {progress.step:,}; {left}: {advice}"

    def _save(self, state: TrainState, loss: float, is_last: bool) -> None:
        """Write a checkpoint. If the disk is full or the store fails, report it and continue
        training, except for the last checkpoint, which raises OSError."""
        if not self.writes:
            checkpoint.take_part(state)
            self.saved_at, self.owes_checkpoint = time.monotonic(), False
            return
        try:
            saved = checkpoint.save(state, self.experiment, self.run, loss)
        except OSError as error:
            log.exception("checkpoint failed")
            self.spool.event("checkpoint_failed", step=state.progress.step, message=str(error))
            if is_last:
                raise OSError(
                    f"the last checkpoint cannot be written to {self.run}: {error}; make room and "
                    "start the same command again"
                ) from error
            return
        self.saved_at = time.monotonic()
        self.saved_step = saved.step
        self.owes_checkpoint = False
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
