"""Opens and checks the labelled images that flags name, and judges encoders on them."""

import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from selfray.check import require
from selfray.storage import Location

if TYPE_CHECKING:
    from selfray.cluster.embedding_tasks import Devices
    from selfray.cluster.evaluation import Judged, Labelled, Subject
    from selfray.console import Console
    from selfray.data.data_sets import DataSets
    from selfray.experiment import DataConfig
    from selfray.probes.embedding import Contents
    from selfray.probes.protocol import Protocol


def open_labelled(data: "DataConfig", output: Location, console: "Console") -> "DataSets":
    """Open train and test images. ValueError and OSError name the command's flags; ValueError also
    if there are no labels, or no class that both sets have."""
    from selfray.cluster.build import build_told
    from selfray.data.data_sets import open_data

    try:
        opened = open_data(data, output, console.say, build_told, describe=False)
    except (ValueError, OSError) as error:
        # Translate the names of pretrain's flags into those of this command.
        text = str(error).replace("data.test-path", "test").replace("data.path", "data")
        raise type(error)(
            text.replace("data.label-column", "label-column").replace("data.group_by", "--group-by")
        ) from None
    if not opened.can_probe:
        path = data.path if not opened.train.has_labels else data.test_path or data.path
        raise ValueError(
            f"{path} has no labels, and a probe needs them: give labelled images with --data, as "
            "two or more class folders, .cls members of tars or a Parquet column named label"
        )
    if opened.test is not None and not opened.common_classes:
        raise ValueError(
            f"no class of the test images occurs in the train images ({opened.classes()}): "
            "give images of the same classes"
        )
    for line in opened.described():
        console.say(line)
    return opened


def slug(path: str) -> str:
    """The last part of a path, reduced to the characters that a metric's name may have."""
    name = posixpath.basename(path.rstrip("/"))
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"


_PART = r"(train|training|test|val|valid|validation|eval)"
_ANY_NAME = re.compile(
    rf"(data|dataset|images?|imgs?|pictures|photos|shards?|parquet|default|masks?|runs|output|{_PART})"
    r"([-_]?\d+)?([-_]of[-_]\d+)?",
    re.IGNORECASE,
)
"""Names of files and folders that say nothing about the data set in them."""
_SUFFIX = re.compile(r"\.(parquet|tar|tgz|tar\.gz|csv|jsonl)$", re.IGNORECASE)


def data_name(path: str) -> str:
    """The name of a data set in tables and metrics: the last part of its path that tells it from
    others, such as `nuclei` for s3://bucket/nuclei/images. The path from which shards were built
    names them if their own folder does not."""
    *above, last = _parts(path) or ["data"]
    source = "" if _tells(last) else _built_from(path)
    telling = [part for part in [*above, *_parts(source), last] if _tells(part)]
    return telling[-1] if telling else last


def data_names(paths: Sequence[str]) -> list[str]:
    """A name for each data set; equal ones are numbered, since metrics are logged by name."""
    names: list[str] = []
    for name in map(data_name, paths):
        again = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{again + 1}" if name in names else name)
    return names


def _parts(path: str) -> list[str]:
    parts = re.split(r"[/:]+", path)
    return [slug(_SUFFIX.sub("", part)) for part in parts if part.strip(".")]


def _tells(part: str) -> bool:
    return _ANY_NAME.fullmatch(part) is None


def _built_from(path: str) -> str:
    """The source of the shards in a folder; empty if it is no path, or unknown."""
    from selfray.data.manifest import Manifest

    try:
        source = Manifest.load(path).source
    except (ValueError, OSError):
        return ""
    return source if "/" in source else ""


def labelled_of(
    data: "DataSets", name: str, train_limit: int | None, test_limit: int | None
) -> "Labelled":
    """Train and test rows of a data set, disjoint and the same in every call. Without a limit the
    rows are in the order of the files, which reads fastest."""
    import numpy as np

    from selfray.cluster.evaluation import Labelled
    from selfray.probes.embedding import Rows

    most = data.train.rows + (data.test.rows if data.test else 0)
    samples = data.samples(1, train_limit or most, test_limit or most)
    rows = []
    for sample, limit in zip(samples, (train_limit, test_limit), strict=True):
        groups, inner = sample.groups, sample.rows
        if limit is None:
            order = np.lexsort((inner, groups))
            groups, inner = groups[order], inner[order]
        rows.append(Rows(sample.shards, groups, inner))
    train, test = rows
    return Labelled(name, train, test, data.train.label_names)


def devices_of(gpus: float | None) -> "Devices":
    """The GPUs of each task; None takes 1 if the cluster has a GPU, else 0. ValueError if the
    cluster has fewer."""
    from selfray.cluster import runtime
    from selfray.cluster.embedding_tasks import Devices

    cluster = runtime.cluster_resources()
    wanted = (1.0 if cluster.gpus >= 1 else 0.0) if gpus is None else gpus
    # Ray would wait forever for a GPU that the cluster does not have.
    require(
        0 <= wanted <= cluster.gpus,
        f"--device-gpus must be between 0 and the cluster's {cluster.gpus:g} GPUs, got {wanted:g}: "
        "give less, or add GPU nodes",
    )
    return Devices(gpus=wanted)


def evaluated(
    subject: "Subject",
    data: "Labelled",
    protocols: "Mapping[str, Protocol]",
    console: "Console",
    devices: "Devices",
    more: "Contents",
) -> "Judged":
    """`cluster.evaluation.evaluate`, but an error in a task is raised without Ray's wrapper."""
    from selfray.cluster import evaluation
    from selfray.cluster.endings import root_cause

    try:
        return evaluation.evaluate(subject, data, dict(protocols), console, devices, more)
    except Exception as error:
        # The message of Ray's wrapper contains the task's whole traceback.
        raise root_cause(error) from error
