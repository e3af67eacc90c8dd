"""The driver's work while workers train: shows progress, probes checkpoints, keeps the best.

It reads the run's spool, which rank 0 writes, so it needs no connection to the workers and sees the
same after a restart.
"""

import logging
import queue
import statistics
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from selfray.cluster.probe_tasks import ProbeJob, metrics_of, tags_of
from selfray.cluster.shipping import Status
from selfray.cluster.tracking import Tracker
from selfray.console import Console
from selfray.data.plan import ReadPlan
from selfray.experiment import Experiment
from selfray.pace import clock
from selfray.probes.encoders import EncoderRef
from selfray.probes.features import ProbeResult
from selfray.probes.verdict import surely_worse, verdict, without_labels
from selfray.runs import checkpoint
from selfray.runs.bottleneck import bottleneck
from selfray.runs.checkpoint import Checkpoint
from selfray.runs.folder import SPOOL
from selfray.runs.history import History
from selfray.runs.spool import SpoolReader, SpoolWriter
from selfray.storage import Location

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
LINES_WITHOUT_TERMINAL = 10
"""Number of progress lines of a run whose output is not a terminal."""


class Monitor:
    """Watches one run from its start to its end."""

    def __init__(
        self,
        console: Console,
        run: Location,
        experiment: Experiment,
        plan: ReadPlan,
        tracker: Tracker,
        probe_job: ProbeJob | None,
        probe_steps: Collection[int],
        started: float,
        on_probe: Callable[[int, ProbeResult], None] | None = None,
        stop_file: str | None = None,
    ) -> None:
        """Checkpoints of `probe_steps` are probed. `on_probe(images_seen, result)` is called for
        every probe, in the probes' thread; on resume first for the probes already recorded. The run
        ends soon after `stop_file` is written."""
        self.console = console
        self.run = run
        self.experiment = experiment
        self.plan = plan
        self.tracker = tracker
        self.started = started
        self.probes: dict[int, ProbeResult] = {}
        self.first_step_seconds = 0.0
        self._probe_job = probe_job
        self._on_probe = on_probe
        self._stop_file = stop_file
        self._probe_steps = probe_steps
        self._writer = SpoolWriter(run / SPOOL, f"probes-{time.time_ns()}")
        self._reader = SpoolReader(run / SPOOL)
        self._offsets: dict[str, int] = {}
        self.history = History()
        self._rates: list[float] = []
        self._waits: list[float] = []
        self._losses: dict[int, float] = {}
        self._to_probe: queue.Queue[tuple[EncoderRef, int, int] | None] = queue.Queue()
        self._pending: set[int] = set()
        self._shown = 0
        self._finished_at: float | None = None
        self._workers = 0
        self._tracking = False
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, daemon=True, name="selfray-monitor"),
            threading.Thread(target=self._probe_all, daemon=True, name="selfray-probes"),
        ]

    @property
    def _start(self) -> str:
        return "untrained" if self.experiment.init_from is None else "starting weights"

    @property
    def seconds(self) -> float:
        return (self._finished_at or time.time()) - self.started

    @property
    def images_per_second(self) -> float:
        return statistics.median(self._rates) if self._rates else 0.0

    def start(self) -> None:
        # Records of earlier starts of this run are history: their losses and probes are kept, but
        # nothing is shown or probed again.
        records, self._offsets = self._reader.read({})
        for record in records:
            self._remember(record)
        for thread in self._threads:
            thread.start()

    def training_ended(self) -> None:
        """Read the last records and wait for running probes."""
        self._ended.set()
        self._threads[0].join()
        self._finished_at = time.time()
        self._to_probe.put(None)
        if self._pending:
            self.console.live("probing the last checkpoint")
        self._threads[1].join()
        self._retain()

    def stop(self, status: Status) -> None:
        """End watching and close the MLflow run."""
        self._ended.set()
        self._to_probe.put(None)
        self._writer.close()
        self._start_tracking()
        self.tracker.finish(status)

    def summary(self, data_cpus: float, has_gpu: bool) -> str:
        """One line with time, speed and bottleneck of the run, whose views `data_cpus` CPUs
        drew."""
        waited = statistics.mean(self._waits) if self._waits else 0.0
        line = (
            f"trained in {self.seconds:.0f} s at {self.images_per_second:,.0f} images/s; "
            f"first step after {self.first_step_seconds:.0f} s"
        )
        could_colour = has_gpu and self.experiment.data.photometric == "cpu"
        advice = bottleneck(waited, self.images_per_second, data_cpus, could_colour)
        return f"{line}; {advice}"

    # --- the watching thread

    def _watch(self) -> None:
        while True:
            ended = self._ended.is_set()
            try:
                records, self._offsets = self._reader.read(self._offsets)
            except OSError:
                log.exception("the spool cannot be read now")
                records = []
            for record in records:
                self._remember(record)
                self._react(record)
            if ended:
                return
            self._ended.wait(POLL_SECONDS)

    def _remember(self, record: dict[str, Any]) -> None:
        if record["kind"] == "metrics":
            values, images = record["values"], record["images_seen"]
            if "loss" in values:
                self.history.loss.append((images, values["loss"]))
            if "throughput/images_per_second" in values:
                self._rates.append(values["throughput/images_per_second"])
                self._waits.append(values["throughput/data_wait_fraction"])
        elif record["kind"] == "probe":
            result = {k: v for k, v in record.items() if k not in ("kind", "time", "step")}
            protocols = {
                name.removeprefix("protocol_"): result.pop(name)
                for name in list(result)
                if name.startswith("protocol_")
            }
            hits = {
                name.removeprefix("hits_"): result.pop(name)
                for name in list(result)
                if name.startswith("hits_")
            }
            images = result.pop("images_seen")
            counts = result.pop("train_images"), result.pop("test_images")
            known = ProbeResult.of(result, *counts, protocols, hits)
            if record["step"] not in self.probes:
                self._keep_probe(record["step"], images, known)

    def _keep_probe(self, step: int, images_seen: int, result: ProbeResult) -> None:
        self.probes[step] = result
        if result.knn is not None and result.linear is not None:
            self.history.knn.append((images_seen, result.knn))
            self.history.linear.append((images_seen, result.linear))

    def _react(self, record: dict[str, Any]) -> None:
        match record["kind"]:
            case "started":
                self._on_started(record)
            case "progress":
                self._on_progress(record)
            case "checkpoint":
                self._on_checkpoint(record)
            case "checkpoint_failed":
                self.console.say(
                    f"the checkpoint of step {record['step']:,} could not be written "
                    f"({record['message']}): training continues, earlier checkpoints are intact"
                )
            case "broken_images":
                self.console.say(f"cannot be read, left out: {record['names']}")

    def _on_started(self, record: dict[str, Any]) -> None:
        before, self._workers = self._workers, record["world_size"]
        if before and before != self._workers:
            self.console.say(
                f"{self._workers} worker{'s' if self._workers > 1 else ''} now, {before} before: "
                f"continuing from step {record['step']:,}"
            )
        elif self.first_step_seconds:
            self.console.say(f"a worker died: restarted from step {record['step']:,}")

    def _on_progress(self, record: dict[str, Any]) -> None:
        if not self.first_step_seconds:
            self.first_step_seconds = time.time() - self.started
            # MLflow and the first probe take seconds of CPU, so they start after training does.
            self._start_tracking()
            if self._probe_job is not None and 0 not in self.probes:
                self._ask_probe(EncoderRef.start(self.experiment, self.run), 0, 0)
        seen, total = record["images_seen"], self.plan.total_images
        epoch = min(self.experiment.epochs, seen // self.plan.images_per_epoch + 1)
        rate = statistics.median(self._rates[-10:]) if self._rates else record["images_per_second"]
        left = (total - seen) / rate if rate else 0.0
        line = (
            f"epoch {epoch}/{self.experiment.epochs}  step {record['step']:,}/"
            f"{self.plan.total_steps:,}  loss {record['loss']:.3f}  {rate:,.0f} images/s  "
            f"{clock(left)} left"
        )
        self.console.live(line)
        if not self.console.is_terminal and seen * LINES_WITHOUT_TERMINAL // total > self._shown:
            self._shown = seen * LINES_WITHOUT_TERMINAL // total
            self.console.say(line)

    def _on_checkpoint(self, record: dict[str, Any]) -> None:
        self._losses[record["step"]] = record["loss"]
        all_of_them = self.experiment.probe.every_checkpoint
        if self._probe_job is not None and (all_of_them or record["step"] in self._probe_steps):
            encoder = EncoderRef.of(Checkpoint.open(record["path"]))
            self._ask_probe(encoder, record["step"], record["images_seen"])
        self._retain()

    def _ask_probe(self, encoder: EncoderRef, step: int, images_seen: int) -> None:
        self._pending.add(step)
        self._to_probe.put((encoder, step, images_seen))

    def _start_tracking(self) -> None:
        if not self._tracking:
            self._tracking = True
            self.tracker.start()

    def verdict(self) -> str | None:
        """One line on whether training improved the weights that the run started from; None for a
        run from random weights, and if there are not enough probes."""
        if self.experiment.init_from is None:
            return None
        found = verdict(self.probes, self.experiment.method.judged_by)
        return without_labels(self.probes) if found is None else found.described

    def _retain(self) -> None:
        try:
            best = self._best_step()
            if best in self.probes:
                checkpoint.mark_best(self.run, best)
            checkpoint.retain(self.run, self.experiment.checkpoint.keep, best, set(self._pending))
        except OSError:
            log.exception("old checkpoints could not be removed")

    def _best_step(self) -> int | None:
        """The step of the checkpoint with the best probe or, without probes, the lowest loss."""
        by = self.experiment.method.judged_by
        judged = {s: result.values[by] for s, result in self.probes.items() if s > 0}
        known = {step: value for step, value in judged.items() if value is not None}
        if known:
            return max(known, key=lambda step: (known[step], step))
        return min(self._losses, key=lambda step: self._losses[step], default=None)

    # --- the probing thread

    def _probe_all(self) -> None:
        """Run requested probes one after the other; a None in the queue ends it."""
        images = self.experiment.batch_size
        for step in sorted(self.probes):  # an earlier start may have ended before it reported them
            self._notify(step * images, self.probes[step])
        while (asked := self._to_probe.get()) is not None:
            self._probe(*asked)

    def _probe(self, encoder: EncoderRef, step: int, images_seen: int) -> None:
        assert self._probe_job is not None
        try:
            result = self._probe_job.run(encoder)
        except Exception as error:
            # No failure of a probe may end the run.
            log.exception("probe failed")
            self.console.say(f"the probe of step {step:,} failed: {str(error).splitlines()[-1]}")
            return
        finally:
            self._pending.discard(step)
        self._keep_probe(step, images_seen, result)
        self._writer.metrics(images_seen, metrics_of(result))
        self._writer.tags(tags_of(result))
        self._writer.event(
            "probe",
            step=step,
            images_seen=images_seen,
            **result.values,
            train_images=result.train_images,
            test_images=result.test_images,
            **{f"protocol_{name}": text for name, text in result.protocols.items()},
            **{f"hits_{name}": text for name, text in result.hits.items()},
        )
        epoch = images_seen / self.plan.images_per_epoch
        self.console.say(
            f"epoch {epoch:g}: {result.described}" + (f" ({self._start})" if step == 0 else "")
        )
        self._notify(images_seen, result)
        self._retain()
        self._end_where_worse()

    def _end_where_worse(self) -> None:
        """Write the stop file if the last probes are all significantly worse than the start's."""
        patience = self.experiment.guard.worse_than_start
        by = self.experiment.method.judged_by
        if self._stop_file is not None and surely_worse(self.probes, by, patience):
            reason = (
                f"{patience} successive probes are worse than that of the starting weights: "
                "give a lower --optimizer.base-learning-rate or a longer --warm-up-head"
            )
            Location.of(self._stop_file).write_json({"reason": reason})

    def _notify(self, images_seen: int, result: ProbeResult) -> None:
        if self._on_probe is not None:
            self._on_probe(images_seen, result)
