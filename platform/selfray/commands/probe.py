"""`selfray probe`: judges a frozen encoder on labelled images."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

from selfray.commands.flags import (
    CheckpointArgument,
    DeviceGpusFlag,
    GroupByFlag,
    ImageColumnFlag,
    JsonFlag,
    LabelColumnFlag,
    TrackingFlag,
    flag,
    require_positive,
)
from selfray.commands.labelled import (
    data_name,
    devices_of,
    evaluated,
    labelled_of,
    open_labelled,
)
from selfray.commands.reference import described, name_of, open_checkpoint, output_of, run_folder
from selfray.metrics import ACCURACIES, probe_name
from selfray.storage import Location

if TYPE_CHECKING:
    from selfray.cluster.embedding_tasks import Devices
    from selfray.cluster.evaluation import Labelled, Subject
    from selfray.console import Console
    from selfray.data.data_sets import DataSets
    from selfray.experiment import DataConfig, Experiment
    from selfray.probes.features import ProbeResult
    from selfray.runs.checkpoint import Checkpoint


@dataclass(frozen=True)
class Probe:
    """Judge a frozen encoder on labelled images by k nearest neighbours and a linear classifier,
    against two baselines: the same encoder untrained, and raw pixels.
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
            "the encoder's training data",
        ),
    ] = None
    test: Annotated[
        str | None,
        flag(
            "Labelled test images, if --data has no test split.",
            "PATH",
            "a fifth of --data is held out",
        ),
    ] = None
    image_column: ImageColumnFlag = None
    label_column: LabelColumnFlag = None
    group_by: GroupByFlag = None
    train_limit: Annotated[
        int | None, flag("Use at most this many train images.", "N", "the run's probe.train_limit")
    ] = None
    test_limit: Annotated[
        int | None, flag("Use at most this many test images.", "N", "the run's probe.test_limit")
    ] = None
    no_baselines: Annotated[bool, flag("Judge only the checkpoint.", default="")] = False
    device_gpus: DeviceGpusFlag = None
    json: JsonFlag = None
    no_track: Annotated[
        bool, flag("Do not log the numbers to the MLflow run of the checkpoint.", default="")
    ] = False
    tracking: TrackingFlag = None

    def run(self, console: "Console") -> int:
        require_positive(self, ("train_limit", "test_limit"))
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
            data = open_labelled(chosen, output_of(checkpoint), console)
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
            # The accuracy on another data set must not continue the curve of the run's own data.
            prefix = "probe/" if own else f"probe/{data_name(chosen.test_path or chosen.path)}/"
            _track(results, prefix, checkpoint, self.tracking, console)
        return 0

    def _data(self, experiment: "Experiment") -> "DataConfig":
        """The data that the flags name; by default the run's own."""
        data = experiment.data
        if self.data is not None:
            data = replace(
                data,
                path=self.data,
                test_path=self.test,
                image_column=None,
                label_column=None,
                group_by=None,
            )
        if self.test is not None:
            data = replace(data, test_path=self.test)
        if self.image_column is not None:
            data = replace(data, image_column=self.image_column)
        if self.label_column is not None:
            data = replace(data, label_column=self.label_column)
        if self.group_by is not None:
            data = replace(data, group_by=self.group_by)
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
        from selfray.cluster.evaluation import Subject
        from selfray.probes.encoders import EncoderRef

        devices = devices_of(self.device_gpus)
        labelled = labelled_of(data, "the data", *self._limits(experiment))
        home = run_folder(checkpoint) or output_of(checkpoint)
        side = experiment.encoder.image_size
        title = f"step {checkpoint.step:,}"
        todo = {"checkpoint": Subject(title, EncoderRef.of(checkpoint), home, side)}
        if not self.no_baselines:
            untrained = EncoderRef.untrained(experiment)
            todo["untrained"] = Subject("untrained encoder", untrained, home, side)
            todo["pixels"] = Subject.pixels(home, side, experiment.encoder.in_channels)
        results = []
        for key, subject in todo.items():
            started = time.monotonic()
            result = _quick(subject, labelled, console, devices)
            results.append(Judged(key, subject.title, result, time.monotonic() - started))
        return results


def _quick(
    subject: "Subject", data: "Labelled", console: "Console", devices: "Devices"
) -> "ProbeResult":
    """Judge an encoder by the protocols that run during training, so that the figures compare."""
    from selfray.cluster import evaluation
    from selfray.probes.embedding import Contents
    from selfray.probes.features import ProbeResult
    from selfray.probes.knn import KNN
    from selfray.probes.labelfree import LabelFree
    from selfray.probes.linear import Linear

    protocols = {"knn": KNN(), "linear": Linear()}
    judged = evaluated(subject, data, protocols, console, devices, Contents(of_crop=True))
    for note in judged.examined.notes:
        console.say(note)
    accuracies = (judgement.interval.value for judgement in judged.judgements)
    return ProbeResult.of(
        {**dict(zip(protocols, accuracies, strict=True)), **evaluation.label_free(judged)},
        len(judged.examined.train),
        len(judged.examined.test),
        {**{key: str(p) for key, p in protocols.items()}, "labelfree": str(LabelFree())},
        {},
    )


class Judged(NamedTuple):
    """One row of the table."""

    key: str
    """checkpoint, untrained or pixels."""
    title: str
    result: "ProbeResult"
    seconds: float
    """Time for features and classifiers together."""


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
    shown = (*ACCURACIES, "rankme")
    head = "".join(f"  {probe_name(name):>6}" for name in shown)
    yield f"{'':{width}}{head}  seconds"
    for _, title, result, seconds in results:
        accuracies = "".join(f"  {getattr(result, name):6.1%}" for name in ACCURACIES)
        yield f"{title:{width}}{accuracies}  {result.rankme or 0.0:6.1f}  {seconds:7.1f}"
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


def _track(
    results: Sequence[Judged],
    prefix: str,
    checkpoint: "Checkpoint",
    tracking: str | None,
    console: "Console",
) -> None:
    """Log to the MLflow run that trained the checkpoint, if its run folder has one."""
    from selfray.cluster.after_run import log_to_run
    from selfray.cluster.probe_tasks import metrics_of, tags_of

    run = run_folder(checkpoint)
    if run is None:
        console.say("not logged: no MLflow run belongs to this checkpoint")
        return
    names = {"checkpoint": prefix, "untrained": f"{prefix}untrained/", "pixels": f"{prefix}pixels/"}
    values = {}
    for judged in results:
        probed = metrics_of(judged.result)
        values |= {names[judged.key] + n.removeprefix("probe/"): v for n, v in probed.items()}
    tags = tags_of(results[0].result)
    log_to_run(run, checkpoint.images_seen, values, tags, tracking, console)
