"""--data.path -> the data sets of a run: whatever the user has, as Parquet shards to read."""

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from selfray.data.manifest import MANIFEST, Manifest
from selfray.data.reader import sample_rows
from selfray.data.shard_set import ShardFile, ShardSet, open_shards, parquet_files, split_files
from selfray.data.source import Sample
from selfray.data.writer import write_arrays
from selfray.experiment import DataConfig
from selfray.storage import Location

EMBEDDED = "embedded:"
"""Data sets that come with a dependency: `embedded:digits` is scikit-learn's."""
DATA_FILE = "data.json"
"""In a run's folder: the files and row groups of its data set."""
DIGITS_TEST = 597
"""A third of the digits is kept for the probes' test, drawn at random."""
HELD_OUT = 0.2
"""Share of the labelled images that probes test on where the data names no test images."""


Build = Callable[[Location, Location], Manifest]
"""(source, destination) -> shards of a source's images: `selfray.cluster.build.build`."""


@dataclass(frozen=True)
class DataSets:
    """What is trained on, and what probes test on (None where nothing bears a label)."""

    train: ShardSet
    test: ShardSet | None

    @property
    def can_probe(self) -> bool:
        return self.train.has_labels and (self.test is None or self.test.has_labels)

    def samples(self, size: int, train_limit: int, test_limit: int) -> tuple[Sample, Sample]:
        """(train, test) rows for the probes, disjoint and the same in every call.

        Without test images of their own, a fifth of the train images is held out for the test:
        the encoder has seen them, unlabelled; the probe has not.
        """
        if self.test is not None:
            train = Sample(self.train, *sample_rows(self.train, train_limit), size)
            return train, Sample(self.test, *sample_rows(self.test, test_limit), size)
        groups, rows = sample_rows(self.train, train_limit + test_limit)
        test_rows = min(test_limit, max(1, int(len(rows) * HELD_OUT)))
        test = Sample(self.train, groups[:test_rows], rows[:test_rows], size)
        return Sample(self.train, groups[test_rows:], rows[test_rows:], size), test


def open_data(
    data: DataConfig, output: Location, say: Callable[[str], None], build: Build
) -> DataSets:
    """Open a run's data. A folder of images or tars is converted to shards once, under `output`, by
    `build`, which may need Ray.

    FileNotFoundError or ValueError of one line names the path and the way out.
    """
    if not data.path:
        raise ValueError(
            "--data.path is missing: give a folder of images, a folder of shards or Parquet "
            "files, local, s3:// or gs://"
        )
    train_files, test_files, folder = _files(data.path, "data.path", output, say, build)
    train = open_shards(train_files, folder, data.image_column)
    if data.test_path:
        files, more, folder = _files(data.test_path, "data.test_path", output, say, build)
        return DataSets(train, open_shards([*files, *more], folder, data.image_column))
    test = open_shards(test_files, folder, data.image_column) if test_files else None
    return DataSets(train, test)


def as_started(shards: ShardSet, run: Location, say: Callable[[str], None]) -> ShardSet:
    """The data set as a run found it when it started: which image is at which position follows from
    its files and row groups, so a run that goes on must read by them.

    A file that is gone since keeps its place, and costs its own rows; one that came since waits for
    another run. ValueError names a file that is another than it was.
    """
    record = run / DATA_FILE
    if not record.exists():
        return shards
    started: dict[str, list[int]] = record.read_json()["files"]
    found = {_inner(file.uri, shards): file for file in shards.files}
    for name, file in found.items():
        if name in started and list(file.group_rows) != started[name]:
            raise ValueError(
                f"{file.uri} is not the file that {run} started with ({file.rows:,} rows in "
                f"{len(file.group_rows)} row groups, then {sum(started[name]):,} in "
                f"{len(started[name])}): put it back, or start another run with another --name"
            )
    away = [n for n in started if n not in found]
    # A file may only be called otherwise: `train-0.parquet` beside it makes it no part of the set.
    lost = [n for n in away if not Location.of(_outer(n, shards)).exists()]
    new = [n for n in found if n not in started]
    if lost:
        rows = sum(sum(started[name]) for name in lost)
        say(
            f"{len(lost)} of {len(started)} shards of the start {'are' if len(lost) > 1 else 'is'} "
            f"gone, the first is {lost[0]}: their {rows:,} images count as broken"
        )
    if new:
        say(
            f"{len(new)} shard{'s' if len(new) > 1 else ''} came since this run started, the first "
            f"is {new[0]}: it goes on without"
        )
    files = tuple(
        found.get(name) or ShardFile(_outer(name, shards), tuple(rows))
        for name, rows in started.items()
    )
    return replace(shards, files=files)


def remember(shards: ShardSet, run: Location) -> None:
    """Write down what `as_started` reads."""
    files = {_inner(file.uri, shards): file.group_rows for file in shards.files}
    (run / DATA_FILE).write_json({"files": files})


def _inner(uri: str, shards: ShardSet) -> str:
    """A file's name inside its data set, which may be moved as a whole."""
    return uri.removeprefix(shards.uri.rstrip("/") + "/")


def _outer(name: str, shards: ShardSet) -> str:
    is_whole = "://" in name or name.startswith("/")
    return name if is_whole else f"{shards.uri.rstrip('/')}/{name}"


def _files(
    path: str, field: str, output: Location, say: Callable[[str], None], build: Build
) -> tuple[list[str], list[str], str]:
    """(train files, test files, folder) at a path, after a conversion where one is needed."""
    if path.startswith(EMBEDDED):
        folder = _write_embedded(path.removeprefix(EMBEDDED), output)
        return *split_files(parquet_files(folder), folder), folder.uri
    root = path if "*" in path else Location.of(path).uri
    found = parquet_files(root)
    if found:
        return *split_files(found, root.rpartition("/")[0] if "*" in path else root), root
    if "*" in path:
        raise FileNotFoundError(f"--{_flag(field)} {path} matches no Parquet file")
    location = Location.of(path)
    if not location.exists():
        raise FileNotFoundError(
            f"--{_flag(field)} {path} does not exist: give a folder of images or Parquet files, "
            "local, s3:// or gs://"
        )
    shards = _converted(location, field, output, say, build)
    return parquet_files(shards), [], shards.uri


def _flag(field: str) -> str:
    return field.replace("_", "-")


def _converted(
    source: Location, field: str, output: Location, say: Callable[[str], None], build: Build
) -> Location:
    """Shards of a folder of images, built under `output` on first use."""
    name = re.sub(r"[^\w-]", "-", source.name) or "images"
    digest = hashlib.sha256(source.uri.encode()).hexdigest()[:8]
    target = output / "shards" / f"{name}-{digest}"
    is_new = not (target / MANIFEST).exists()
    if is_new:
        say(f"converting {source} to shards in {target}, once")
    try:
        manifest = build(source, target)
    except ValueError as error:
        raise ValueError(f"--{_flag(field)}: {error}") from None
    if is_new or manifest.quarantined.count:
        say(
            f"{manifest.images:,} images in {len(manifest.shards)} shards"
            + (
                f"; {manifest.quarantined.count:,} files left out, see {target}/quarantine.jsonl"
                if manifest.quarantined.count
                else ""
            )
        )
    return target


def _write_embedded(name: str, output: Location) -> Location:
    """The shards of an embedded data set, written on first use."""
    if name != "digits":
        raise ValueError(f"there is no embedded data set {name!r}; there is embedded:digits")
    folder = output / "data" / name
    if all((folder / part / MANIFEST).exists() for part in ("train", "test")):
        return folder
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images, labels = digits.images, digits.target  # [1797, 8, 8] in 0..16, [1797]
    order = np.random.default_rng(0).permutation(len(images))
    for part, chosen in (("test", order[:DIGITS_TEST]), ("train", order[DIGITS_TEST:])):
        write_arrays(
            folder / part,
            [_png(images[i]) for i in chosen],
            [int(labels[i]) for i in chosen],
            [f"digit-{i:04d}.png" for i in chosen],
            [str(digit) for digit in range(10)],
            rows_per_shard=512,
            source="sklearn.datasets.load_digits",
        )
    return folder


def _png(values: np.ndarray) -> bytes:
    """A digit [8, 8] in 0..16 as a gray PNG of 8 x 8 pixels."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((values * (255 / 16)).round().astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()
