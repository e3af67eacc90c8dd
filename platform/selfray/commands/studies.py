"""The three studies of experiments/: how labels, data and batch size matter for a set of images."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from selfray import config
from selfray.check import require
from selfray.cluster import runtime
from selfray.commands.early import check_path
from selfray.commands.flags import read
from selfray.commands.script import log_folder, one_line_errors, with_console
from selfray.commands.sweep_flags import SweepFlags
from selfray.commands.words import nearest
from selfray.console import Console
from selfray.recipes import NAMES
from selfray.storage import Location

if TYPE_CHECKING:  # torch takes seconds to import
    import numpy as np

    from selfray.cluster.shipping import Status
    from selfray.cluster.tracking import Tracker
    from selfray.data.shard_set import ShardSet
    from selfray.experiment import Experiment
    from selfray.sweeps.question import Axis, Range

ROWS_EACH = 2048
"""Images held in memory while a subset is copied."""


@dataclass(frozen=True)
class StudyBatch(SweepFlags):
    """Vary the batch size at the same number of images seen; the learning rate scales with it by
    the recipe's rule."""

    title: ClassVar[str] = "study-batch"
    asks: ClassVar[str] = "Does this method need large batches on these images?"
    methods: ClassVar[tuple[str, ...]] = ("simclr", "moco", "mocov3", "byol", "dino")

    sizes: tuple[int, ...] = (32, 64, 128, 256)
    """Batch sizes to try."""
    recipe: str = "simclr-digits"
    """Any recipe of SimCLR, MoCo (all versions), BYOL or DINO."""

    def axis(self, base: "Experiment") -> "Axis | Range":
        from selfray.sweeps.question import Axis

        return Axis.over("batch size", "batch_size", self.sizes)


@dataclass(frozen=True)
class StudyData(SweepFlags):
    """Pretrain on nested subsets of the images, once with the same number of epochs and once with
    the same number of images seen."""

    title: ClassVar[str] = "study-data"
    asks: ClassVar[str] = "Does more unlabelled data still help?"
    methods: ClassVar[tuple[str, ...]] = (
        "simclr",
        "moco",
        "mocov3",
        "byol",
        "dino",
        "dinov2",
        "mae",
    )

    shares: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Shares of the train images; each is a subset of the larger ones."""
    recipe: str = "mae-digits"
    """Any recipe except those of tokenizers and BEiT."""

    def axis(self, base: "Experiment") -> "Axis | Range":
        from selfray.sweeps.question import Axis, Option

        require(
            all(0 < share <= 1 for share in self.shares),
            f"--shares must lie in (0, 1], got {', '.join(map(str, self.shares))}",
        )
        options = []
        for share, path in written_shares(base, sorted(self.shares)):
            data = replace(base.data, path=path, test_path=None)
            longer = round(base.epochs / share)
            options.append(Option(f"{share:.0%}, {base.epochs} epochs", {"data": data}))
            if longer != base.epochs:
                more = {"data": data, "epochs": longer}
                options.append(Option(f"{share:.0%}, equal images seen", more))
        return Axis("images", tuple(options))


def written_shares(base: "Experiment", shares: Sequence[float]) -> Iterator[tuple[float, str]]:
    """Write nested subsets of an experiment's train images, each with all its test images. The
    images' bytes and the seed decide which images are in a subset. Only the images of the first,
    smallest share keep their labels: all shares are probed by these. Yields (share, folder).

    ValueError if the data has no labels or no test images, or is not in shards.
    """
    from selfray.cluster.build import build_told
    from selfray.data.data_sets import needs_build, open_data
    from selfray.probes.embedding import Rows

    require(
        not any(needs_build(p) for p in (base.data.path, base.data.test_path) if p),
        f"--data {base.data.path} is not in shards: make them first, with `selfray shards build`",
    )
    output = Location.of(base.output)
    opened = open_data(base.data, output, lambda line: None, build_told, describe=False)
    require(
        opened.can_probe and opened.test is not None,
        f"--data {base.data.path} needs labelled train and test images, on which the encoders of "
        "all shares are judged: give --test-data",
    )
    assert opened.test is not None
    known = f"{Rows.all_of(opened.train).digest()} {Rows.all_of(opened.test).digest()}"
    for share in shares:
        text = f"{known} {share} {shares[0]} {base.seed}"
        name = f"share-{share:g}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        folder = output / "data" / name
        _copy_share(opened.train, folder / "train", share, shares[0], base.seed)
        _copy_share(opened.test, folder / "test", 1.0, 1.0, base.seed)
        yield share, folder.uri


def _copy_share(
    shards: "ShardSet", folder: Location, share: float, labelled: float, seed: int
) -> None:
    """Copy a share of the images, in their order, to files of at most ROWS_EACH images. Only the
    share `labelled` of all images keeps its labels."""
    import numpy as np

    from selfray.data.columns import NO_LABEL
    from selfray.data.reader import read_rows
    from selfray.data.writer import write_arrays
    from selfray.probes.embedding import Rows
    from selfray.probes.subsets import image_digest, ranks

    rows = Rows.all_of(shards)
    for first in range(0, len(rows), ROWS_EACH):
        part = slice(first, first + ROWS_EACH)
        images, labels = read_rows(shards, rows.groups[part], rows.rows[part])
        keys = np.array([image_digest(image) for image in images], np.uint64)
        order = ranks(keys, seed)
        is_known = _is_in(order, labelled)
        parts = {"labelled": is_known, "rest": _is_in(order, share) & ~is_known}
        for name, mask in parts.items():
            chosen = [i for i in np.flatnonzero(mask) if images[i]]
            if chosen:
                write_arrays(
                    folder / f"{first:09d}-{name}",
                    [images[i] for i in chosen],
                    [int(labels[i]) if name == "labelled" else NO_LABEL for i in chosen],
                    label_names=shards.label_names,
                    source=shards.uri,
                )


def _is_in(order: "np.ndarray", share: float) -> "np.ndarray":
    """bool [n]: whether each random number, uint64 [n], lies in the lowest `share` of the range, so
    that smaller subsets are contained in larger ones."""
    return order.astype(float) < share * 2.0**64


@dataclass(frozen=True)
class StudyLabels:
    """Pretrain, then fine-tune with various numbers of labels, and compare with the same network
    trained from scratch."""

    recipe: str = "mae-digits"
    """Any recipe."""
    data: str | None = None
    """Images, as in --data.path of `selfray pretrain`; None takes the recipe's."""
    labelled: str | None = None
    """Labelled images; None takes `data`."""
    epochs: int | None = None
    """Epochs of pretraining; None takes the recipe's."""
    labels: tuple[int, ...] = (20, 50, 100, 200, 500, 1000)
    """Numbers of labels to fine-tune with."""
    subsets: int = 3
    """Random subsets of labels for each number."""
    finetune_epochs: int | None = None
    """Epochs of each fine-tuning; None takes the preset's, and at least 300 steps."""
    output: str = "runs"
    """Folder of all output; local, s3:// or gs://."""

    def check_early(self) -> None:
        require(
            self.recipe in NAMES,
            f"--recipe {self.recipe} does not exist{nearest(self.recipe, NAMES)}",
        )
        for name in ("data", "labelled"):
            path = getattr(self, name)
            if path is not None:
                check_path(path, f"--{name}")
        require(len(self.labels) > 0, "--labels is empty: give numbers of labels")

    def run(self, console: Console) -> int:
        from selfray.recipes import every

        given = {
            "data.path": self.data,
            "epochs": self.epochs,
            "output": runtime.lasting(self.output),
        }
        changes = {path: value for path, value in given.items() if value is not None}
        experiment = config.override(every()[self.recipe], **changes)
        with runtime.session():
            self._carry_out(experiment, console)
        return 0

    def _carry_out(self, experiment: "Experiment", console: Console) -> None:
        """Pretrain and fine-tune below one parent in MLflow, which also gets the answer."""
        from selfray.cluster.launch import PartOf, launch
        from selfray.commands.evaluate import Evaluate
        from selfray.commands.evaluation_text import (
            label_curves,
            label_efficiency_of,
            report,
        )
        from selfray.commands.finetune_flags import FineTuneFlags

        tracker = self._parent(experiment, console)
        status: Status = "FAILED"
        try:
            tracker.start()
            result = launch(experiment, console, part_of=PartOf(tracker.wait_for_run(30), {}))
            judged = Evaluate(
                (result.folder,),
                () if self.labelled is None else (self.labelled,),
                by=(),
                labels=self.labels,
                subsets=self.subsets,
                low_shot_by=("logistic", "finetune"),
                finetune=FineTuneFlags(epochs=self.finetune_epochs),
                json=(Location.of(result.folder) / "study-labels.json").uri,
            ).judge(console)
            column = [of_encoder[0] for of_encoder in judged]
            answer = " ".join(label_efficiency_of(column))
            tracker.set_tags({"sweep.answer": answer})
            tracker.describe_run("\n".join(["```", *report(judged, [column[0].data]), "```"]))
            for name, picture in label_curves(column).items():
                tracker.log_picture(picture, f"pictures/{name}")
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracker.finish(status)

    def _parent(self, experiment: "Experiment", console: Console) -> "Tracker":
        from selfray.cluster.mlflow_store import tracking_uri
        from selfray.cluster.tracking import Tracker
        from selfray.runs.environment import environment_tags

        output = Location.of(experiment.output)
        asked = config.to_json(self) | {"pretraining": experiment.run_name}
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
        folder = output / "studies" / f"study-labels-{digest}"
        folder.make_folder()
        params = {
            "recipe": experiment.name,
            "labels": " ".join(map(str, self.labels)),
            "subsets": self.subsets,
        }
        words = "Up to how many labels does pretraining pay?"
        tags = {**environment_tags(), "sweep.question": words, "run.folder": folder.uri}
        uri = tracking_uri(output, None)
        return Tracker(uri, "selfray", folder.name, folder, params, tags, say=console.say)


def run_labels(arguments: Sequence[str], description: str) -> int:
    """Parse the command line of experiments/study_labels.py and run it. Returns the exit code."""

    def main() -> int:
        study = read(StudyLabels, arguments, "study_labels.py", description=description)
        study.check_early()
        return with_console(log_folder(study.output), study.run)

    return one_line_errors(main)
