"""The command `selfray`: make and check shards, export, probe and compare, look at the machine.

Only tyro is imported at the top: torch, timm, ray and mlflow take seconds, and --help needs none.
"""

import importlib.metadata
import json
import logging
import os
import platform
import posixpath
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, subcommand

from selfray import __version__
from selfray.check import require
from selfray.commands.compare import Compare
from selfray.commands.script import TrackingFlag, flag
from selfray.probes.protocol import PIXEL_BASELINE_SIZE
from selfray.storage import Location

if TYPE_CHECKING:
    from selfray.cluster.build import Manifest, Progress
    from selfray.cluster.probe_tasks import ProbeJob
    from selfray.cluster.runtime import Console
    from selfray.data.data_sets import DataSets
    from selfray.experiment import DataConfig, Experiment
    from selfray.models.encoder import Encoder
    from selfray.probes.features import ProbeResult
    from selfray.runs.checkpoint import Checkpoint

FAILED = 1
LINES_WITHOUT_TERMINAL = 10
"""Progress lines of a build whose output goes to a file."""
GIB = 2**30

log = logging.getLogger(__name__)


# shards -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildShards:
    """Turn images into Parquet shards, in parallel on all CPUs. Broken images are listed with their
    reason and stop nothing; an interrupted build goes on when the same command is given again.
    $ selfray shards build ~/scans s3://bucket/scans --max-side 512
    """

    interrupted: ClassVar[str] = "finished shards are kept, the same command goes on"

    source: Annotated[
        Positional[str],
        flag(
            """Folder of images, of WebDataset .tar or of .parquet files, or one such file; local,
            s3:// or gs://.""",
            "SRC",
        ),
    ]
    destination: Annotated[
        Positional[str],
        flag("Folder for the shards, new or empty; local, s3:// or gs://.", "DST"),
    ]
    max_side: Annotated[
        int | None,
        flag(
            """Shrink images so that their longer side has at most this many pixels, as JPEGs of
            quality 95. A crop of a fifth of a square image has 0.45 of its side: give at least
            twice the size of the views.""",
            "PIXELS",
            "keep the files' bytes as they are",
        ),
    ] = None
    labels: Annotated[
        Literal["auto", "folders", "none"],
        flag(
            """auto: class folders if every image lies one level down, .cls members of tars, a label
            column of Parquet. folders: the first folder below SRC is the class. none: no labels."""
        ),
    ] = "auto"
    shard_mib: Annotated[
        float, flag("Size of a shard in MiB; a task takes about three times this memory.", "MIB")
    ] = 128
    max_pixels: Annotated[
        int | None,
        flag(
            "Images of more pixels (width x height) are quarantined before they are decoded.",
            "N",
            "100 million",
        ),
    ] = None
    seed: Annotated[int, flag("Seed of the order in which images are spread over shards.", "N")] = 0
    image_column: Annotated[
        str | None,
        flag("Column of the images, where SRC is Parquet.", "NAME", "found by its type"),
    ] = None

    def run(self, console: "Console") -> int:
        from selfray.cluster import build, runtime

        require(self.shard_mib > 0, f"--shard-mib must be positive, got {self.shard_mib:g}")
        options = build.BuildOptions(
            max_side=self.max_side,
            shard_bytes=max(1, int(self.shard_mib * 2**20)),
            labels=self.labels,
            seed=self.seed,
            image_column=self.image_column,
        )
        if self.max_pixels is not None:
            options = replace(options, max_pixels=self.max_pixels)
        started = time.monotonic()
        line = BuildLine(console)
        with ExitStack() as stack:

            def on_progress(progress: "Progress") -> None:
                # The first report comes when the plan is made, before any task: so a wrong folder
                # is told at once and not after Ray's start.
                if line.first is None:
                    console.live("starting Ray")
                    stack.enter_context(runtime.session())
                line.show(progress)

            console.live(f"looking through {self.source}")
            manifest = build.build(self.source, self.destination, options, on_progress)
        destination = Location.of(self.destination)
        for text in _summary(manifest, destination, time.monotonic() - started):
            console.say(text)
        return 0


@dataclass(frozen=True)
class CheckShards:
    """Compare shards with their manifest: existence, size, sha256, structure. The exit code is 0
    where all is well, 1 where something is wrong, 2 where there is no such folder.
    $ selfray shards check s3://bucket/scans --deep
    """

    interrupted: ClassVar[str] = "nothing was changed"

    destination: Annotated[
        Positional[str], flag("Folder that `selfray shards build` has written.", "DST")
    ]
    deep: Annotated[
        bool, flag("Decode every image, too; takes about as long as the build.", default="")
    ] = False

    def run(self, console: "Console") -> int:
        from selfray.cluster import build, runtime

        started = time.monotonic()

        def on_progress(progress: "Progress") -> None:
            console.live(f"{progress.shards_done:,} of {progress.shards_total:,} shards checked")

        with ExitStack() as stack:
            if (Location.of(self.destination) / build.MANIFEST).exists():
                console.live("starting Ray")
                stack.enter_context(runtime.session())
            report = build.check(self.destination, on_progress, self.deep)
        for problem in report.problems:
            console.say(f"problem: {problem}")
        found = len(report.problems)
        console.say(
            f"{report.destination}: {report.images:,} images in {report.shards:,} shards, "
            f"{_size(report.bytes)}: "
            + ("no problems" if report.ok else f"{found:,} problem{'s' if found > 1 else ''}")
            + ("" if self.deep else "; images not decoded (--deep does)" if report.ok else "")
            + f"; {time.monotonic() - started:.0f} s"
        )
        return 0 if report.ok else FAILED


class BuildLine:
    """The progress of a build: one live line, or a handful of lines where nobody watches."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self.first: Progress | None = None
        """What was there at the start: it says nothing about the speed."""
        self._started = 0.0
        self._shown = 0

    def show(self, progress: "Progress") -> None:
        if progress.note:
            self._console.say(progress.note)
        if self.first is None:
            self.first, self._started = progress, time.monotonic()
        line = self._line(progress, self.first)
        if self._console.is_terminal:
            self._console.live(line)
            return
        tenth = progress.shards_done * LINES_WITHOUT_TERMINAL // max(1, progress.shards_total)
        if tenth > self._shown:
            if progress is not self.first:
                self._console.say(line)
            self._shown = tenth

    def _line(self, now: "Progress", first: "Progress") -> str:
        seconds = time.monotonic() - self._started
        total = f" of {now.images_total:,}" if now.images_total is not None else ""
        parts = [f"{now.images_done:,}{total} images"]
        if now.shards_done > first.shards_done:
            images = (now.images_done - first.images_done) / seconds
            size = (now.bytes - first.bytes) / seconds
            left = seconds * (now.shards_total - now.shards_done)
            left /= now.shards_done - first.shards_done
            parts += [f"{images:,.0f} images/s", f"{size / 1e6:,.1f} MB/s", f"{_clock(left)} left"]
        return "  ".join([*parts, f"{now.quarantined:,} quarantined"])


def _summary(manifest: "Manifest", destination: Location, seconds: float) -> Iterator[str]:
    """What a build came to, and the command that uses it."""
    from selfray.cluster.build import QUARANTINE

    yield (
        f"{destination}: {manifest.images:,} images in {len(manifest.shards):,} shards, "
        f"{_size(manifest.bytes)}, {seconds:.0f} s"
    )
    width, height = manifest.image_width, manifest.image_height
    yield (
        f"pixels (min / median / max): width {width.min} / {width.median} / {width.max}, "
        f"height {height.min} / {height.median} / {height.max}"
    )
    if manifest.labels is None:
        yield "labels: none, so the encoder cannot be probed on these images"
    else:
        counts = sorted(manifest.labels.counts.values())
        unlabelled = manifest.labels.unlabelled
        sizes = f"{counts[0]:,}" + (f" to {counts[-1]:,}" if counts[0] < counts[-1] else "")
        yield f"labels: {len(counts):,} classes of {sizes} images" + (
            f"; {unlabelled:,} images without" if unlabelled else ""
        )
    quarantined = manifest.quarantined
    if quarantined.count:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in quarantined.reasons.items())
        yield f"quarantined: {reasons}; see {destination / QUARANTINE}"
    else:
        yield "quarantined: none"
    yield (
        "next: python experiments/pretrain.py mae-imagenet --data.path "
        f"{shlex.quote(destination.uri)}"
    )


# export -----------------------------------------------------------------------------------------

CheckpointArgument = Annotated[
    Positional[str],
    flag(
        """Run folder (its newest whole checkpoint is taken), or one checkpoint's folder; local,
        s3:// or gs://; or mlruns:/RUN_ID for a run in MLflow.""",
        "CHECKPOINT",
    ),
]


@dataclass(frozen=True)
class Export:
    """Write a pretrained encoder as one file that plain timm loads, prove that it does, and print
    the Python lines that load it.
    $ selfray export runs/mae-imagenet-1a2b3c4d --to timm --output encoder.safetensors
    """

    interrupted: ClassVar[str] = "nothing was written"

    checkpoint: CheckpointArgument
    to: Annotated[Literal["timm"], flag("What is to load the file.")]
    output: Annotated[
        str | None,
        flag("Local file to write.", "FILE", "RUN-STEP.safetensors in this folder"),
    ] = None
    force: Annotated[bool, flag("Overwrite an existing file.", default="")] = False
    tracking: TrackingFlag = None

    def run(self, console: "Console") -> int:
        if self.output is not None:
            _require_local_safetensors(self.output)
        console.live("loading torch and timm")
        from selfray.models.encoder import timm_recipe

        checkpoint = _open_checkpoint(self.checkpoint, self.tracking, console)
        experiment, encoder = checkpoint.experiment(), checkpoint.encoder()
        name = f"{_name_of(checkpoint)}.safetensors"
        file = Path(os.path.abspath(os.path.expanduser(self.output or name)))
        if file.exists() and not self.force:
            raise FileExistsError(f"{file} exists: give --force to overwrite it, or --output FILE")
        verdict = _write_verified(file, encoder, _metadata(checkpoint, experiment))
        console.say(
            f"{file}: {_size(file.stat().st_size)}, {_described(experiment)}, "
            f"step {checkpoint.step:,}"
        )
        console.say(verdict)
        console.say("\n" + timm_recipe(encoder.config, str(file)) + "\n")
        side, (mean, std) = encoder.config.image_size, (experiment.data.mean, experiment.data.std)
        console.say(
            f"images: RGB, {side} x {side}, scaled to 0..1, minus {_plain(mean)}, "
            f"divided by {_plain(std)}"
        )
        return 0


def _require_local_safetensors(output: str) -> None:
    require(
        "://" not in output,
        f"--output must be a local file, got {output}: timm reads no other; copy it afterwards",
    )
    require(
        output.endswith(".safetensors"),
        f"--output must end in .safetensors, got {output}: timm tells the format by the name",
    )


def _metadata(checkpoint: "Checkpoint", experiment: "Experiment") -> dict[str, str]:
    """What the file's header says of its origin; safetensors holds text only."""
    from selfray.models.encoder import as_code

    return {
        "format": "pt",  # transformers and others ask for it
        "selfray_version": __version__,
        "method": experiment.method.name,
        "encoder": experiment.encoder.name,
        "options": json.dumps(experiment.encoder.options, default=as_code),
        "small_stem": json.dumps(experiment.encoder.small_stem),
        "image_size": str(experiment.encoder.image_size),
        "mean": json.dumps(experiment.data.mean),
        "std": json.dumps(experiment.data.std),
        "step": str(checkpoint.step),
        "images_seen": str(checkpoint.images_seen),
        "run": experiment.run_name,
    }


def _write_verified(file: Path, encoder: "Encoder", metadata: Mapping[str, str]) -> str:
    """Write the file under its name only when timm has loaded it. Returns what was verified."""
    import safetensors.torch

    from selfray.models.encoder import export_weights

    # In the same folder, so that it can be renamed; with this suffix, since timm goes by it.
    scratch = file.with_name(f".{file.stem}.{os.getpid()}.safetensors")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        data = safetensors.torch.save(export_weights(encoder), dict(metadata))
        Location.of(scratch).write_bytes(data)
        verdict = _verify(scratch, encoder)
        os.replace(scratch, file)
    except OSError as error:
        raise OSError(
            f"{file} cannot be written ({error.strerror or error}): give --output another file"
        ) from None
    finally:
        if scratch.exists():
            scratch.unlink()
    return verdict


def _verify(file: Path, encoder: "Encoder") -> str:
    """Run the very lines that are printed, and compare features. RuntimeError where they differ."""
    import torch

    from selfray.models.encoder import timm_recipe

    scope: dict[str, object] = {}
    # Nothing of a stranger is run: a checkpoint's encoder name is one of timm's, and its options
    # and the path enter as literals.
    exec(timm_recipe(encoder.config, str(file)), scope)
    model = scope["model"]
    assert isinstance(model, torch.nn.Module)
    side = encoder.config.image_size
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))

    def same(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
        return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-3, atol=1e-4)

    with torch.no_grad():
        ours, theirs = encoder(images), model(images)
        if same(theirs, ours.cls):
            return "verified: timm loads it with no key missing and gives the same features"
        tokens = model.forward_features(images)  # type: ignore[operator]
    # A ResNet's map is [B, D, h, w]; a ViT's tokens are [B, P + N, D].
    patches = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
    if not same(patches[:, -ours.patches.shape[1] :], ours.patches):
        raise RuntimeError(f"timm gives other features for {encoder.config.name}: please report it")
    return (
        "verified: timm loads it with no key missing; model.forward_features(images) gives the "
        "pretrained features, the pooling behind it is not pretrained"
    )


# probe ------------------------------------------------------------------------------------------


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

        checkpoint = _open_checkpoint(self.checkpoint, self.tracking, console)
        experiment = checkpoint.experiment()
        chosen = self._data(experiment)
        with ExitStack() as stack:
            if any(_is_converted(path) for path in (chosen.path, chosen.test_path) if path):
                console.live("starting Ray")
                stack.enter_context(runtime.session())
            data = _open_labelled(chosen, _output_of(checkpoint), console)
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
            data = replace(data, path=self.data, test_path=self.test, image_column=None)
        if self.test is not None:
            data = replace(data, test_path=self.test)
        if self.image_column is not None:
            data = replace(data, image_column=self.image_column)
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


def _is_converted(path: str) -> bool:
    """Whether a path holds images to be made into shards, which takes Ray. Whatever else is wrong
    with a path is told without it."""
    from selfray.data.data_sets import EMBEDDED
    from selfray.data.reader import parquet_files

    if path.startswith(EMBEDDED) or "*" in path:
        return False
    return Location.of(path).exists() and not parquet_files(path)


def _open_labelled(data: "DataConfig", output: Location, console: "Console") -> "DataSets":
    from selfray.data.data_sets import open_data

    try:
        opened = open_data(data, output, console.say)
    except (ValueError, OSError) as error:
        # The flags of this command are named otherwise than those of pretrain.py.
        text = str(error).replace("data.test-path", "test").replace("data.path", "data")
        raise type(error)(text.replace("data.image-column", "image-column")) from None
    if not opened.can_probe:
        path = data.path if not opened.train.has_labels else data.test_path or data.path
        raise ValueError(
            f"{path} has no labels, and a probe needs them: give labelled images with --data, as "
            "class folders, .cls members of tars or an integer Parquet column named label"
        )
    names = opened.train.label_names
    if opened.test is not None and names and opened.test.label_names not in (None, names):
        raise ValueError(
            f"the classes of train ({_shown(names)}) and of test "
            f"({_shown(opened.test.label_names or ())}) differ: give images of the same classes"
        )
    return opened


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... {len(names)} in all" if len(names) > 3 else "")


def _table(
    results: Sequence[Judged],
    checkpoint: "Checkpoint",
    experiment: "Experiment",
    data: "DataConfig",
) -> Iterator[str]:
    first = results[0].result
    yield f"{_name_of(checkpoint)}: {_described(experiment)}"
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
    from selfray.cluster.probe_tasks import metrics_of, tags_of
    from selfray.cluster.tracking import (
        RUN_RECORD,
        SHIPPED,
        SPOOL,
        Tracker,
        is_training,
        tracking_uri,
    )
    from selfray.commands.script import mlflow_tags
    from selfray.runs.spool import SpoolWriter

    run = _run_folder(checkpoint)
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
    uri = tracking_uri(_output_of(checkpoint), tracking or known)
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


# A checkpoint by any name -----------------------------------------------------------------------

MLRUNS = "mlruns:"


def _open_checkpoint(reference: str, tracking: str | None, console: "Console") -> "Checkpoint":
    """A checkpoint's or a run's folder, or mlruns:/RUN_ID. ValueError and OSError say what it is
    instead, or why it is out of reach."""
    from selfray.runs import checkpoint
    from selfray.runs.checkpoint import Checkpoint

    path = reference
    if reference.startswith(MLRUNS):
        path = _folder_of_run(reference.removeprefix(MLRUNS).strip("/"), tracking)
    try:
        found = Checkpoint.open(path)
    except FileNotFoundError as error:
        if path == reference:
            raise
        raise FileNotFoundError(
            f"MLflow says that {reference} lies in {path}, and this machine sees nothing there: "
            "give the folder's path on this machine"
        ) from error
    newest = checkpoint.all_of(Location.of(path))[-1:]
    if newest and newest[0].step > found.step:
        console.say(f"{newest[0].location} is damaged: taking the one before, step {found.step:,}")
    return found


def _folder_of_run(run_id: str, tracking: str | None) -> str:
    from selfray.cluster.tracking import tracking_uri
    from selfray.commands.script import mlflow_tags

    require(run_id != "", f"{MLRUNS}/RUN_ID needs the id of a run, as MLflow's page shows it")
    uri = tracking_uri(Location.of("runs"), tracking)
    tags = mlflow_tags(uri, run_id)
    if "run.folder" not in tags:
        raise ValueError(
            f"MLflow run {run_id} has no tag run.folder, so it is no run of selfray's: give the "
            "run's folder"
        )
    return tags["run.folder"]


def _run_folder(checkpoint: "Checkpoint") -> Location | None:
    """The run that a checkpoint lies in; None for a copy elsewhere."""
    from selfray.runs.checkpoint import FOLDER

    place = checkpoint.location
    outer = posixpath.dirname(place.path.rstrip("/"))
    if posixpath.basename(outer) != FOLDER:
        return None
    uri = posixpath.dirname(posixpath.dirname(place.uri.rstrip("/")))
    return Location(place.filesystem, posixpath.dirname(outer), uri)


def _output_of(checkpoint: "Checkpoint") -> Location:
    """The folder that holds the run: converted data sets lie there, too."""
    run = _run_folder(checkpoint)
    return Location.of("runs" if run is None else posixpath.dirname(run.uri))


def _name_of(checkpoint: "Checkpoint") -> str:
    run = _run_folder(checkpoint)
    return f"{run.name}-{checkpoint.location.name}" if run else checkpoint.location.name


def _described(experiment: "Experiment") -> str:
    encoder = experiment.encoder
    return (
        f"{experiment.method.name}, {encoder.name} at {encoder.image_size} x {encoder.image_size}"
    )


# doctor -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doctor:
    """Look at this machine: Python, packages, CPUs, memory, GPUs, disk, Ray, MLflow, S3. The exit
    code is 1 where something must be mended before anything can be trained.
    $ selfray doctor
    """

    interrupted: ClassVar[str] = "not everything was looked at"

    tracking: TrackingFlag = None

    def run(self, console: "Console") -> int:
        worst = 0
        checks: list[tuple[str, Callable[[], Finding]]] = [
            ("Python", _python),
            ("packages", _packages),
            ("CPUs", _cpus),
            ("memory", _memory),
            ("disk", _disk),
            ("S3", _s3),
            ("GPUs", _gpus),
            ("Ray", _ray),
            ("MLflow", lambda: _mlflow(self.tracking)),
        ]
        for name, check in checks:
            console.live(f"...   {name}")
            try:
                finding = check()
            except Exception as error:
                # Whatever is broken on this machine is what the user came to hear.
                log.exception(name)
                finding = Finding("fail", f"{type(error).__name__}: {_one_line(error)}")
            console.say(f"{finding.status:4}  {name:8}  {finding.text}")
            worst = max(worst, FAILED if finding.status == "fail" else 0)
        return worst


class Finding(NamedTuple):
    status: Literal["ok", "warn", "fail"]
    text: str


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info >= (3, 14):
        return Finding("warn", f"{version}: selfray is tested with 3.11 to 3.13; use one of them")
    return Finding("ok", f"{version}, selfray {__version__} in {Path(__file__).parent}")


def _packages() -> Finding:
    from packaging.requirements import Requirement

    try:
        requirements = importlib.metadata.requires("selfray") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("warn", "selfray is on the path but not installed: pip install -e .")
    shown, missing, other = [], [], []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(requirement))
            continue
        shown.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            other.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if missing:
        return Finding("fail", f"missing: pip install {shlex.join(missing)}")
    if other:
        return Finding("warn", f"{'; '.join(other)}: pip install --upgrade selfray")
    return Finding("ok", ", ".join(shown))


def _cpus() -> Finding:
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if usable < 2:
        return Finding("warn", "1: training and data would share it; give this machine two or more")
    return Finding("ok", f"{usable}")


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f}"
    if memory.available < 2 * GIB:
        return Finding("warn", f"{text}: little for Ray, workers and data; close other programs")
    return Finding("ok", text)


def _disk() -> Finding:
    folder = Path("runs").absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    if not os.access(folder, os.W_OK):
        return Finding("fail", f"{folder} cannot be written: start in another folder, or --output")
    text = f"{free:.1f} GiB free for ./runs"
    if free < 5:
        return Finding("warn", f"{text}: checkpoints may not fit; make room, or give --output")
    return Finding("ok", text)


def _s3() -> Finding:
    named = [n for n in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_ROLE_ARN") if os.environ.get(n)]
    if named:
        return Finding("ok", f"credentials by {', '.join(named)}")
    if Path("~/.aws/credentials").expanduser().exists():
        return Finding("ok", "credentials by ~/.aws/credentials")
    return Finding(
        "ok",
        "no credentials; only s3:// paths need them: set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role",
    )


def _gpus() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        sizes = [f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in names]
        return Finding("ok", f"{len(sizes)}: {', '.join(sizes)}; CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi"):
        return Finding(
            "warn",
            f"there is nvidia-smi, but torch {torch.__version__} sees no GPU: install a CUDA build "
            "of torch that fits the driver (https://pytorch.org)",
        )
    return Finding("ok", "none: training runs on CPUs")


def _ray() -> Finding:
    from selfray.cluster import runtime

    started = time.monotonic()
    with runtime.session():
        seconds, cluster = time.monotonic() - started, runtime.cluster_resources()
    address = os.environ.get("RAY_ADDRESS")
    how = f"joined {address}" if address else "starts on this machine"
    text = f"{how} in {seconds:.1f} s: {cluster.cpus:g} CPUs, {cluster.gpus:g} GPUs"
    if seconds > 30:
        return Finding("warn", f"{text}; a machine this slow is overloaded: see `uptime`")
    return Finding("ok", text)


def _mlflow(tracking: str | None) -> Finding:
    from selfray.cluster.tracking import tracking_uri
    from selfray.commands.script import count_mlflow_experiments

    uri = tracking_uri(Location.of("runs"), tracking)
    database = uri.removeprefix("sqlite:///")
    if database != uri and not Path(database).exists():
        return Finding("ok", f"{database} is made by the first run")
    try:
        where, experiments = count_mlflow_experiments(uri)
    except OSError as error:
        return Finding("fail", str(error))
    return Finding("ok", f"{where} answers: {experiments} experiments")


# The command ------------------------------------------------------------------------------------

SHARDS = """Make and check Parquet shards of images: what encoders are trained on.
$ selfray shards build ~/scans s3://bucket/scans"""

Command = (
    Annotated[
        Annotated[BuildShards, subcommand("build")] | Annotated[CheckShards, subcommand("check")],
        subcommand("shards", description=SHARDS),
    ]
    | Annotated[Export, subcommand("export")]
    | Annotated[Probe, subcommand("probe")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Doctor, subcommand("doctor")]
)

AnyCommand = BuildShards | CheckShards | Export | Probe | Compare | Doctor

DESCRIPTION = """Self-supervised pretraining of vision encoders, from a laptop to a Ray cluster.

Training itself is started by experiments/pretrain.py; this command does what comes before and after
it. Paths may be local, s3:// or gs://. RAY_ADDRESS names a cluster to work on; without it, a local
Ray is started and stopped. SELFRAY_VERBOSE=1 shows what libraries print."""


def main() -> int:
    """Do what the command line says. Returns the exit code: 0 done, 1 failed, 2 bad input, 130
    interrupted."""
    return _quietly(parse(sys.argv[1:] or ["--help"]))


def parse(arguments: Sequence[str]) -> AnyCommand:
    """The command that arguments ask for; argparse's SystemExit where they ask for none."""
    return tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="selfray",
        description=DESCRIPTION,
        args=arguments,
        config=(FlagCreatePairsOff,),
    )


def _quietly(command: AnyCommand) -> int:
    """Run a command with nothing but its own words on the console."""
    from selfray.commands.script import INTERRUPTED, one_line_errors, with_console

    def body(console: "Console") -> int:
        try:
            return command.run(console)
        except KeyboardInterrupt:
            console.say(f"interrupted: {command.interrupted}")
            return INTERRUPTED
        except (ValueError, OSError):
            raise
        except Exception as error:
            # The traceback is for the log; a user needs to know where it is.
            log.exception("failed")
            console.say(f"error: {_one_line(error)}")
            if console.log is not None:
                console.say(f"the full log: {console.log}")
            return FAILED

    return one_line_errors(lambda: with_console(_log_folder(), body))


def _log_folder() -> Path:
    """runs/logs, or a temporary folder where that cannot be written: an export needs no runs."""
    folder = Path("runs/logs").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir()) / "selfray-logs"
    return folder


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.1f} {unit}" if unit != "bytes" else f"{count} bytes"
        count /= 1000  # type: ignore[assignment]
    return f"{count:,.1f} TB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _plain(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


if __name__ == "__main__":
    sys.exit(main())
