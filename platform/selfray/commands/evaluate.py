"""`selfray evaluate`: judges frozen encoders on labelled images by several protocols."""

import io
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import Positional, UseAppendAction

from selfray import plugins
from selfray.check import require
from selfray.commands.evaluation_text import (
    as_json,
    label_curves,
    metrics_of,
    pictures_of,
    report,
    tags_of,
)
from selfray.commands.finetune_flags import (
    FineTuned,
    FineTuneFlags,
    LinearPaperFlags,
    with_finetuning,
    with_linear_paper,
)
from selfray.commands.flags import (
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
    data_names,
    devices_of,
    evaluated,
    labelled_of,
    open_labelled,
    slug,
)
from selfray.commands.subjects import Named, open_subjects
from selfray.commands.words import nearest
from selfray.storage import Location

if TYPE_CHECKING:
    from selfray.cluster.evaluation import Judged, Labelled
    from selfray.cluster.finetuning import Labels
    from selfray.console import Console
    from selfray.experiment import DataConfig
    from selfray.probes.suite import Suite

PROTOCOLS = (
    "knn", "linear", "logistic", "retrieval", "low-shot", "linear-paper", "finetune", "segmentation"
)  # fmt: skip
Few = Literal["logistic", "finetune"]


@dataclass(frozen=True)
class Evaluate:
    """Judge encoders on labelled images: accuracies with 95 % intervals, and which differences are
    significant. Features are computed once and cached in the run's folder; `--by finetune` trains
    the encoder itself, and for comparison the same network from scratch.
    $ selfray evaluate runs/mae-imagenet-1a2b3c4d untrained --data s3://bucket/labelled
    $ selfray evaluate runs/dino-1a2b3c4d timm:resnet50.a1_in1k --by knn logistic --labels 10 50 200
    $ selfray evaluate runs/mae-imagenet-1a2b3c4d --data labelled/ --by finetune low-shot \\
        --low-shot-by logistic finetune
    """

    interrupted: ClassVar[str] = "computed features are kept; the same command resumes"

    encoders: Annotated[
        Positional[tuple[str, ...]],
        flag(
            """Run folder or checkpoint, local, s3:// or gs://; mlruns:/RUN_ID; a file or folder
            that `selfray export` wrote; timm:NAME with its published weights; or
            untrained, the encoder of each of the runs before its first step. Several encoders share
            one table.""",
            "ENCODER",
            "",
        ),
    ]
    data: Annotated[
        UseAppendAction[tuple[str, ...]],
        flag(
            """Labelled images: a folder of class folders, shards or Parquet files; local, s3:// or
            gs://. Files or folders named test or validation are the test images. Repeat the flag
            for several data sets.""",
            "PATH",
            "the training data of the first run",
        ),
    ] = ()
    test: Annotated[
        str | None,
        flag(
            "Labelled test images, if the only --data has no test split.",
            "PATH",
            "a fifth of --data is held out",
        ),
    ] = None
    masks: Annotated[
        str | None,
        flag(
            """For `segmentation`: a folder of PNG masks with the names of --data's images. Either
            255 is the object and 0 the background, or 0, 1, 2, ... are classes and 255 is none.""",
            "PATH",
            "none",
        ),
    ] = None
    by: Annotated[
        tuple[str, ...],
        flag(
            """Protocols: knn, linear, logistic, retrieval, low-shot, linear-paper, finetune, or
            segmentation alone (docs/evaluation.md); or of a plugin (docs/your-method.md).""",
            "PROTOCOL",
        ),
    ] = (
        "knn",
        "linear",
        "logistic",
        "retrieval",
    )
    labels: Annotated[
        tuple[int, ...],
        flag("Numbers of labels for a label-efficiency curve.", "N", "no curve"),
    ] = ()
    low_shot_by: Annotated[
        tuple[Few, ...],
        flag("Learners for few labels, in `low-shot` and the curve.", "LEARNER"),
    ] = ("logistic",)
    shares: Annotated[
        tuple[float, ...], flag("Shares of the labels that `low-shot` uses.", "SHARE")
    ] = (0.01, 0.1)
    subsets: Annotated[int, flag("Random subsets of labels at each size.", "N")] = 3
    finetune: FineTuneFlags = field(default_factory=FineTuneFlags)
    linear_paper: LinearPaperFlags = field(default_factory=LinearPaperFlags)
    image_size: Annotated[
        int | None,
        flag("Side in pixels that images are resized to.", "PIXELS", "each encoder's own"),
    ] = None
    image_column: ImageColumnFlag = None
    label_column: LabelColumnFlag = None
    group_by: GroupByFlag = None
    train_limit: Annotated[int | None, flag("Use at most this many train images.", "N", "all")] = (
        None
    )
    test_limit: Annotated[int | None, flag("Use at most this many test images.", "N", "all")] = None
    pixels: Annotated[bool, flag("Also judge raw pixels, as a baseline.", default="")] = False
    device_gpus: DeviceGpusFlag = None
    json: JsonFlag = None
    pictures: Annotated[
        str | None,
        flag(
            "Folder for confusion matrices and curves.", "FOLDER", "evaluation in the output folder"
        ),
    ] = None
    no_track: Annotated[
        bool, flag("Do not log the numbers to the encoders' MLflow runs.", default="")
    ] = False
    tracking: TrackingFlag = None

    def run(self, console: "Console") -> int:
        self._check()
        console.live("loading torch and ray")
        if self.masks is not None:
            from selfray.commands.segmentation import judge_segmentation

            return judge_segmentation(self, self.masks, console)
        self.judge(console)
        return 0

    def judge(self, console: "Console") -> "list[list[Judged]]":
        """Carry out all protocols but segmentation, print a table, write the files that the flags
        ask for, and log to MLflow. Returns results [encoder][data set]."""
        from selfray.cluster import runtime
        from selfray.data.data_sets import needs_build

        suite = self._suite()
        with ExitStack() as stack:
            named = open_subjects(self.encoders, self.image_size, self.tracking, console)
            chosen = self._data(named)
            if any(needs_build(p) for d in chosen for p in (d.path, d.test_path) if p):
                console.live("starting Ray")
                stack.enter_context(runtime.session())
            names = data_names([data.test_path or data.path for data in chosen])
            sets = [
                self._open(data, name, named, console)
                for data, name in zip(chosen, names, strict=True)
            ]
            console.live("starting Ray")
            stack.enter_context(runtime.session())
            results, scratch = self._judge(named, sets, suite, console)
        for line in report(results, sets):
            console.say(line)
        if self.json is not None:
            Location.of(self.json).write_json(as_json(results, sets, chosen))
            console.say(f"written to {Location.of(self.json)}")
        self._draw(named, results, console)
        if not self.no_track:
            self._track(named, results, scratch, console)
        return results

    def _draw(
        self, named: Sequence[Named], results: "list[list[Judged]]", console: "Console"
    ) -> None:
        """Write the pictures of all data sets as PNG files into one folder."""
        chosen = self.pictures or (named[0].output / "evaluation").uri
        folder = Location.of(chosen)
        folder.make_folder()
        written = []
        for column in zip(*results, strict=True):
            pictures = {f"{column[0].data.name}-{n}": p for n, p in label_curves(column).items()}
            for judged in column:
                title = slug(judged.subject.title)
                for name, picture in pictures_of(judged).items():
                    if name != "labels.png":
                        pictures[f"{judged.data.name}-{title}-{name}"] = picture
            for name, picture in pictures.items():
                data = io.BytesIO()
                picture.save(data, format="PNG")
                (folder / name).write_bytes(data.getvalue())
                written.append(name)
        if written:
            console.say(f"pictures: {folder}: {', '.join(written)}")

    def _check(self) -> None:
        require(len(self.encoders) > 0, "nothing to evaluate: give a run, or timm:NAME")
        require(len(self.by) + len(self.labels) > 0, "--by is empty: give a protocol, such as knn")
        known = (*PROTOCOLS, *plugins.protocols())
        for name in self.by:
            require(
                name in known,
                f"--by must be one of {', '.join(known)}, got {name}{nearest(name, known)}",
            )
        require(
            len(self.low_shot_by) > 0, "--low-shot-by is empty: give logistic, finetune or both"
        )
        require(
            self.test is None or len(self.data) < 2,
            "--test takes one --data: for several, put the test images of each beside its train "
            "images, in a folder named test",
        )
        if self.masks is not None or "segmentation" in self.by:
            require(
                self.masks is not None and self.by == ("segmentation",) and len(self.data) == 1,
                "--by segmentation needs images with masks and excludes other protocols: give --by "
                "segmentation, --data IMAGES and --masks MASKS",
            )
        require_positive(self, ("train_limit", "test_limit", "image_size"))

    def _suite(self) -> "Suite":
        from selfray.probes.suite import Suite

        return Suite(
            shares=self.shares,
            labels=self.labels,
            subsets=self.subsets,
            logistic_of_few="logistic" in self.low_shot_by,
            own=plugins.protocols(),
        )

    def _data(self, named: Sequence[Named]) -> "list[DataConfig]":
        """The data sets that the flags name, by default the first run's training data."""
        from selfray.experiment import DataConfig

        own = next((n.checkpoint.experiment().data for n in named if n.checkpoint), None)
        if not self.data:
            require(own is not None, "--data is missing: give labelled images")
            assert own is not None
            chosen = [own]
        else:
            encoders = (n.subject.encoder for n in named)
            channels = next((e.encoder_config.in_channels for e in encoders if e is not None), 3)
            chosen = [DataConfig(path, channels=channels) for path in self.data]
        if self.test is not None:
            chosen = [replace(data, test_path=self.test) for data in chosen]
        if self.image_column is not None:
            chosen = [replace(data, image_column=self.image_column) for data in chosen]
        if self.label_column is not None:
            chosen = [replace(data, label_column=self.label_column) for data in chosen]
        if self.group_by is not None:
            chosen = [replace(data, group_by=self.group_by) for data in chosen]
        return chosen

    def _open(
        self, data: "DataConfig", name: str, named: Sequence[Named], console: "Console"
    ) -> "Labelled":
        opened = open_labelled(data, named[0].output, console)
        return labelled_of(opened, name, self.train_limit, self.test_limit)

    def _judge(
        self,
        named: Sequence[Named],
        sets: "Sequence[Labelled]",
        suite: "Suite",
        console: "Console",
    ) -> "FineTuned":
        from selfray.cluster.evaluation import Subject
        from selfray.probes.embedding import Contents

        devices = devices_of(self.device_gpus)
        subjects = [n.subject for n in named]
        if self.pixels:
            first = named[0].subject
            channels = 3 if first.encoder is None else first.encoder.encoder_config.in_channels
            subjects.append(Subject.pixels(named[0].output, first.size, channels))
        protocols = suite.tasks(self.by)
        results = [
            [evaluated(subject, data, protocols, console, devices, Contents()) for data in sets]
            for subject in subjects
        ]
        which = self._finetuned(suite)
        if not (which or "linear-paper" in self.by):
            return FineTuned(results, [None] * len(results))
        from selfray.cluster.finetuning import Carrying

        settings = self.finetune
        how = Carrying(settings.workers, settings.precision, devices, self.tracking, console)
        if "linear-paper" in self.by:
            alone = replace(how, workers=self.linear_paper.workers)
            results = with_linear_paper(results, self.linear_paper, alone)
        if not which:
            return FineTuned(results, [None] * len(results))
        return with_finetuning(results, settings, which, how)

    def _finetuned(self, suite: "Suite") -> "list[Labels]":
        """The sets of labels on which encoders are fine-tuned; empty without fine-tuning."""
        if "finetune" not in (*self.by, *self.low_shot_by):
            return []
        from selfray.cluster.finetuning import Labels

        found = []
        if "finetune" in self.by:
            found.append(Labels())
        if "finetune" in self.low_shot_by:
            few = [*(suite.few() if "low-shot" in self.by else ()), *suite.curve()]
            found += [
                Labels(f"{one.key}-finetune", one.share, one.labels, one.subsets) for one in few
            ]
        return found

    def _track(
        self,
        named: Sequence[Named],
        results: "list[list[Judged]]",
        scratch: "list[list[Judged] | None]",
        console: "Console",
    ) -> None:
        from selfray.cluster.after_run import log_to_run

        for each, judged, alone in zip(named, results, scratch, strict=False):
            if each.run is None or each.checkpoint is None:
                continue
            pairs = list(zip(judged, alone or [None] * len(judged), strict=True))
            values = {name: v for pair in pairs for name, v in metrics_of(*pair).items()}
            tags = {name: v for pair in pairs for name, v in tags_of(*pair).items()}
            seen = each.checkpoint.images_seen
            pictures = {
                f"eval/{pair[0].data.name}/{name}": picture
                for pair in pairs
                for name, picture in pictures_of(*pair).items()
            }
            log_to_run(each.run, seen, values, tags, self.tracking, console, pictures)
