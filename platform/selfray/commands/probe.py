"""`selfray probe`: a frozen encoder judged on labelled images."""

import posixpath
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

from selfray.check import require
from selfray.commands.flags import CheckpointArgument, TrackingFlag, flag
from selfray.commands.reference import described, name_of, open_checkpoint, output_of, run_folder
from selfray.probes.protocol import PIXEL_BASELINE_SIZE
from selfray.storage import Location

if TYPE_CHECKING:
    from selfray.cluster.probe_tasks import ProbeJob
    from selfray.console import Console
    from selfray.data.data_sets import DataSets
    from selfray.experiment import DataConfig, Experiment
    from selfray.probes.features import ProbeResult
    from selfray.runs.checkpoint import Checkpoint


@dataclass(frozen=True)
class Probe:
    """Judge a frozen encoder on labelled images by nearest neighbours and by a linear classifier,
    beside two baselines: the same encoder untrained, and raw pixels.
    $ selfray probe runs/mae-imagenet-1a2b3c4d --data s3://bucket/labelled
    """

    interrupted: ClassVar[str] = "nothing was logged"

    checkpoint: CheckpointArgument
    data: Annotated[
        str | None,
        flag(
            """Labelled images: a folder of class folders, shards or Parquet files; local, s3:// or
            gs://. Files or folders named test or validation are the test images.""",
            "PATH",
            "what the encoder was trained on",
        ),
    ] = None
    test: Annotated[
        str | None,
        flag(
            "Labelled test images, where --data holds none of its own.",
            "PATH",
            "a fifth of --data is held out",
        ),
    ] = None
    image_column: Annotated[
        str | None, flag("Parquet column of the images.", "NAME", "found by its type")
    ] = None
    label_column: Annotated[
        str | None, flag("Column of the labels.", "NAME", "found by its name")
    ] = None
    train_limit: Annotated[
        int | None, flag("Use at most this many train images.", "N", "the run's probe.train_limit")
    ] = None
    test_limit: Annotated[
        int | None, flag("Use at most this many test images.", "N", "the run's probe.test_limit")
    ] = None
    no_baselines: Annotated[bool, flag("Judge the checkpoint alone.", default="")] = False
    device_gpus: Annotated[
        float | None,
        flag(
            "GPUs of each task that computes features, such as 0.5 for two tasks on each GPU.",
            "GPUS",
            "1 if there is any, else 0",
        ),
    ] = None
    json: Annotated[
        str | None, flag("Write the numbers to this file, too.", "FILE", "not written")
    ] = None
    no_track: Annotated[
        bool, flag("Do not log the numbers to the MLflow run of the checkpoint.", default="")
    ] = False
    tracking: TrackingFlag = None

    def run(self, console: "Console") -> int:
        for name, limit in (("train", self.train_limit), ("test", self.test_limit)):
            require(limit is None or limit > 0, f"--{name}-limit must be positive, got {limit}")
        console.live("loading torch and ray")
        from selfray.cluster import runtime
        from selfray.data.data_sets import needs_build

        checkpoint = open_checkpoint(self.checkpoint, self.tracking, console)
        experiment = checkpoint.experiment()
        chosen = self._data(experiment)
        with ExitStack() as stack:
            if any(needs_build(path) for path in (chosen.path, chosen.test_path) if path):
                console.live("starting Ray")
                stack.enter_context(runtime.session())
            data = _open_labelled(chosen, output_of(checkpoint), console)
            console.live("starting Ray")
            stack.enter_context(runtime.session())
            results = self._judge(checkpoint, experiment, data, console)
        for line in _table(results, checkpoint, experiment, chosen):
            console.say(line)
        if self.json is not None:
            Location.of(self.json).write_json(_as_json(results, checkpoint, experiment, chosen))
            console.say(f"written to {Location.of(self.json)}")
        if not self.no_track:
            own = chosen == experiment.data and self._limits(experiment) == (
                experiment.probe.train_limit,
                experiment.probe.test_limit,
            )
            # Another data set's accuracy must not continue the curve of the run's own.
            prefix = "probe/" if own else f"probe/{_slug(chosen)}/"
            _track(results, prefix, checkpoint, self.tracking, console)
        return 0

    def _data(self, experiment: "Experiment") -> "DataConfig":
        """The run's own data, or what the flags say."""
        data = experiment.data
        if self.data is not None:
            data = replace(
                data, path=self.data, test_path=self.test, image_column=None, label_column=None
            )
        if self.test is not None:
            data = replace(data, test_path=self.test)
        if self.image_column is not None:
            data = replace(data, image_column=self.image_column)
        if self.label_column is not None:
            data = replace(data, label_column=self.label_column)
        return data

    def _limits(self, experiment: "Experiment") -> tuple[int, int]:
        return (
            self.train_limit or experiment.probe.train_limit,
            self.test_limit or experiment.probe.test_limit,
        )

    def _judge(
        self,
        checkpoint: "Checkpoint",
        experiment: "Experiment",
        data: "DataSets",
        console: "Console",
    ) -> "list[Judged]":
        from selfray.cluster import runtime
        from selfray.cluster.endings import root_cause
        from selfray.cluster.probe_tasks import EncoderRef, ProbeJob

        cluster = runtime.cluster_resources()
        gpus = (1.0 if cluster.gpus >= 1 else 0.0) if self.device_gpus is None else self.device_gpus
        # Ray would wait for ever for a GPU that is not there.
        require(
            0 <= gpus <= cluster.gpus,
            f"--device-gpus {gpus:g} is asked for and the cluster has {cluster.gpus:g} GPUs: give "
            "less, or add GPU nodes",
        )

        def job(size: int, gpus: float) -> "ProbeJob":
            train, test = data.samples(size, *self._limits(experiment))
            return ProbeJob(train, test, experiment.data.mean, experiment.data.std, 1.0, gpus)

        side = experiment.encoder.image_size
        small = min(side, PIXEL_BASELINE_SIZE)
        todo: list[tuple[str, str, ProbeJob, EncoderRef | None]] = [
            ("checkpoint", f"step {checkpoint.step:,}", job(side, gpus), EncoderRef.of(checkpoint))
        ]
        if not self.no_baselines:
            untrained = EncoderRef.untrained(experiment)
            todo.append(("untrained", "untrained encoder", job(side, gpus), untrained))
            todo.append(("pixels", f"raw pixels at {small} x {small}", job(small, 0.0), None))
        results = []
        for key, title, probe_job, encoder in todo:
            console.live(f"{title}: features, then probes")
            started = time.monotonic()
            try:
                result = probe_job.run(encoder)
            except Exception as error:
                # Ray's wrappers carry a traceback of the task in their message.
                raise root_cause(error) from error
            results.append(Judged(key, title, result, time.monotonic() - started))
        return results


class Judged(NamedTuple):
    """One row of the table."""

    key: str
    title: str
    result: "ProbeResult"
    seconds: float


def _open_labelled(data: "DataConfig", output: Location, console: "Console") -> "DataSets":
    from selfray.cluster.build import build
    from selfray.data.data_sets import open_data

    try:
        opened = open_data(data, output, console.say, build)
    except (ValueError, OSError) as error:
        # The flags of this command are named otherwise than those of pretrain.py.
        text = str(error).replace("data.test-path", "test").replace("data.path", "data")
        raise type(error)(text.replace("data.label-column", "label-column")) from None
    if not opened.can_probe:
        path = data.path if not opened.train.has_labels else data.test_path or data.path
        raise ValueError(
            f"{path} has no labels, and a probe needs them: give labelled images with --data, as "
            "class folders, .cls members of tars or a Parquet column named label"
        )
    if opened.test is not None and not opened.common_classes:
        raise ValueError(
            f"no class of the test images is among those of the train images ({opened.classes()}): "
            "give images of the same classes"
        )
    return opened


def _table(
    results: Sequence[Judged],
    checkpoint: "Checkpoint",
    experiment: "Experiment",
    data: "DataConfig",
) -> Iterator[str]:
    first = results[0].result
    yield f"{name_of(checkpoint)}: {described(experiment)}"
    where = data.path + (f" and {data.test_path}" if data.test_path else "")
    yield f"{first.train_images:,} train and {first.test_images:,} test images of {where}"
    yield ""
    width = max(len(judged.title) for judged in results)
    yield f"{'':{width}}     kNN  linear  RankMe  seconds"
    for _, title, result, seconds in results:
        accuracies = f"{result.knn:6.1%}  {result.linear:6.1%}"
        yield f"{title:{width}}  {accuracies}  {result.rankme or 0.0:6.1f}  {seconds:7.1f}"
    yield ""
    yield from first.protocols.values()


def _as_json(
    results: Sequence[Judged],
    checkpoint: "Checkpoint",
    experiment: "Experiment",
    data: "DataConfig",
) -> dict[str, object]:
    return {
        "checkpoint": checkpoint.location.uri,
        "step": checkpoint.step,
        "images_seen": checkpoint.images_seen,
        "method": experiment.method.name,
        "encoder": experiment.encoder.name,
        "data": data.path,
        "test": data.test_path,
        "results": {
            judged.key: {**asdict(judged.result), "seconds": judged.seconds} for judged in results
        },
    }


def _slug(data: "DataConfig") -> str:
    """A name for a data set in the names of metrics."""
    name = posixpath.basename((data.test_path or data.path).rstrip("/"))
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"


def _track(
    results: Sequence[Judged],
    prefix: str,
    checkpoint: "Checkpoint",
    tracking: str | None,
    console: "Console",
) -> None:
    """Log to the MLflow run that trained the checkpoint, if its run folder knows of one."""
    from selfray.cluster.mlflow_store import mlflow_tags, tracking_uri
    from selfray.cluster.probe_tasks import metrics_of, tags_of
    from selfray.cluster.tracking import Tracker
    from selfray.runs.folder import RUN_RECORD, SHIPPED, SPOOL, is_training
    from selfray.runs.spool import SpoolWriter

    run = run_folder(checkpoint)
    if run is None or not (run / RUN_RECORD).exists():
        console.say("not logged: no MLflow run belongs to this checkpoint")
        return
    names = {"checkpoint": prefix, "untrained": f"{prefix}untrained/", "pixels": f"{prefix}pixels/"}
    values = {}
    for judged in results:
        probed = metrics_of(judged.result)
        values |= {names[judged.key] + n.removeprefix("probe/"): v for n, v in probed.items()}
    writer = SpoolWriter(run / SPOOL, f"probe-{time.time_ns()}")
    writer.metrics(checkpoint.images_seen, values)
    writer.tags(tags_of(results[0].result))
    writer.close()
    if is_training(run):
        console.say("the run is still training: it sends these numbers to MLflow with its own")
        return
    record = (run / RUN_RECORD).read_json()
    # A password is not recorded; then the environment must name the server.
    known = None if "***" in record["tracking_uri"] else record["tracking_uri"]
    uri = tracking_uri(output_of(checkpoint), tracking or known)
    try:
        mlflow_tags(uri, record["run_id"])  # a Tracker would begin a second run where it is missing
    except (ValueError, OSError) as error:
        console.say(f"not logged, but kept in {run / SPOOL}: {error}")
        return
    shipped = (run / SHIPPED).read_json() if (run / SHIPPED).exists() else {}
    tracker = Tracker(uri, "selfray", run.name, run, {}, {}, say=console.say)
    console.live("logging to MLflow")
    tracker.start()
    # Logging a number does not change how the run itself has ended.
    if tracker.finish(shipped.get("status") or "KILLED"):
        console.say(f"logged as {', '.join(values)}")
        console.say(tracker.describe())
