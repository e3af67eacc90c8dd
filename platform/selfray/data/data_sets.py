"""--data.path -> the data sets of a run: Parquet shards, from any layout that the user has."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from selfray.data import summary
from selfray.data.embedded import EMBEDDED, write_embedded
from selfray.data.files import Listing, list_matching, list_source, select
from selfray.data.groups import Grouped, divided, shared_groups
from selfray.data.layout import TRAIN, UNLABELED, Understood, understand
from selfray.data.listing import says_more
from selfray.data.manifest import MANIFEST, Manifest, statistics_in
from selfray.data.measured import PICTURES, Statistics, are_alike
from selfray.data.options import BuildOptions
from selfray.data.reader import placed, sample_rows
from selfray.data.shard_set import (
    ShardFile,
    ShardSet,
    open_shards,
    rows_of,
    with_common_classes,
)
from selfray.data.source import Sample
from selfray.data.tar_listing import have_folders
from selfray.experiment import DataConfig
from selfray.storage import Location, one_line, read_object

DATA_FILE = "data.json"
"""File in a run's folder that lists the files and row groups of its data set."""
HELD_OUT = 0.2
"""Share of the labelled images held out for the probes' test if the data has no test images."""


Say = Callable[[str], None]
Build = Callable[[Location, Location, BuildOptions, Say], Manifest]
"""(source, destination, options, what to tell) -> shards of images: `cluster.build.build_told`."""


@dataclass(frozen=True)
class DataSets:
    """The train images, and the test images of the probes (None without any)."""

    train: ShardSet
    test: ShardSet | None
    origin: str = ""
    """Where the test images come from, such as `val/`."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Folders or files that are in neither set, with their numbers of images."""
    unlabeled_files: int = 0
    """Number of files at the end of `train` that come from a split of unlabelled images."""
    channels: int = 3
    """data.channels."""
    joined: tuple[str, ...] = ()
    """Folders that each hold a whole data set; see Understood."""
    statistics: Statistics | None = None
    """Statistics of the train images, measured by `selfray shards build`; None without."""
    grouped: Grouped | None = field(default=None, compare=False)
    """How data.group_by divides the images; None without, or with test images of their own."""
    group_notes: tuple[str, ...] = ()
    """What was understood of data.group_by, for the user."""

    @property
    def unlabeled(self) -> int:
        """The number of train images from a split of unlabelled images."""
        files = self.train.files
        return sum(file.rows for file in files[len(files) - self.unlabeled_files :])

    @property
    def can_probe(self) -> bool:
        return self.train.has_labels and (self.test is None or self.test.has_labels)

    @property
    def judged(self) -> ShardSet:
        """The train images that probes may use."""
        return self.train.labelled if self.can_probe else self.train

    def samples(self, size: int, train_limit: int, test_limit: int) -> tuple[Sample, Sample]:
        """(train, test) samples for the probes, disjoint and the same in every call.

        Without test images, a fifth of the train images is held out: the encoder has seen them
        without labels, the probe has not. With data.group_by, whole groups are held out.
        """
        shards = self.judged
        if self.test is not None:
            own = self.test.labelled if self.can_probe else self.test
            train = self._sample(shards, *sample_rows(shards, train_limit), size)
            return train, self._sample(own, *sample_rows(own, test_limit), size)
        if self.grouped is not None:
            order, is_test = self.grouped.order, self.grouped.is_test
            sides = order[~is_test][:train_limit], order[is_test][:test_limit]
            train, test = (self._sample(shards, *placed(shards, s), size) for s in sides)
            return train, test
        groups, rows = sample_rows(shards, train_limit + test_limit)
        test_rows = min(test_limit, max(1, int(len(rows) * HELD_OUT)))
        test = self._sample(shards, groups[:test_rows], rows[:test_rows], size)
        return self._sample(shards, groups[test_rows:], rows[test_rows:], size), test

    def _sample(self, shards: ShardSet, groups: np.ndarray, rows: np.ndarray, size: int) -> Sample:
        return Sample(shards, groups, rows, size, channels=self.channels)

    def described(self) -> list[str]:
        """What was understood of the data, in one line, and what is odd about it."""
        train, test = summary.part_of(self.train), self.test and summary.part_of(self.test)
        line = summary.line(train, test, self.origin, self.unlabeled, self.left_out, self.joined)
        notes = [*self.group_notes, *self.train.notes]
        if self.test is not None and self.test.has_labels:
            notes += self.test.notes
        return [line, *dict.fromkeys(notes), *self._files_without(), *summary.odd(train, test)]

    @property
    def common_classes(self) -> set[str]:
        """The classes of train images that test images have, too."""
        return set(summary.classes_of(self.train)) & set(
            summary.classes_of(self.test or self.train)
        )

    def classes(self) -> str:
        """The classes of the train images for a message."""
        return summary.shown(summary.classes_of(self.train))

    def _files_without(self) -> Iterator[str]:
        if not self.train.has_labels:
            return
        of_labels = self.train.files[: len(self.train.files) - self.unlabeled_files]
        without = [file for file in of_labels if file.rows and not file.labelled]
        if without:
            yield (
                f"{len(without):,} of {len(of_labels):,} files have no labels, such as "
                f"{without[0].uri}: their {sum(file.rows for file in without):,} images are "
                "unlabelled"
            )


def open_data(
    data: DataConfig, output: Location, say: Say, build: Build, describe: bool = True
) -> DataSets:
    """Open a run's data and, with `describe`, print a summary by `say`.

    A folder of images or tars is converted to shards once, under `output`, by `build`, which may
    need Ray. Raises FileNotFoundError or ValueError, one line with the path and the way out.
    """
    if not data.path:
        raise ValueError(
            "--data.path is missing: give a folder of images, a folder of shards or Parquet "
            "files, local, s3:// or gs://"
        )
    opened = replace(_open_data(data, _Opener(data, output, say, build)), channels=data.channels)
    _refuse_other_channels(data, opened.statistics)
    if data.group_by is not None:
        opened = _with_groups(opened, data.group_by)
    if describe:
        for line in opened.described():
            say(line)
    return opened


def _with_groups(opened: DataSets, group_by: str) -> DataSets:
    if opened.test is not None:
        note = shared_groups(opened.train, opened.test, group_by)
        return replace(opened, group_notes=(note,))
    grouped = divided(opened.judged, group_by, HELD_OUT)
    return replace(opened, grouped=grouped, group_notes=(grouped.described,))


def _refuse_other_channels(data: DataConfig, found: Statistics | None) -> None:
    if found is None or are_alike(found.kind, data.channels):
        return
    channels = 3 if found.kind in PICTURES else found.kind
    raise ValueError(
        f"--data.path {data.path} holds images of {found.kind} channel"
        f"{'s' if found.kind > 1 else ''}, and data.channels is {data.channels}: give "
        f"--data.channels {channels} and --encoder.in-channels {channels}"
    )


def needs_build(path: str) -> bool:
    """Whether a path holds images that must be converted to shards. False for a bad path, which
    `open_data` reports."""
    if path.startswith(EMBEDDED) or "*" in path:
        return False
    try:
        location = Location.of(path)
        return select(path, list_source(location).files).kind != "parquet"
    except (ValueError, OSError):
        return False


def _open_data(data: DataConfig, opener: "_Opener") -> DataSets:
    found = opener.find(data.path, "data.path")
    if not found.train:
        raise ValueError(
            f"--data.path {data.path} holds only test images ({found.origin}), which are never "
            "trained on: give a folder that holds train images, or give the folder of the test "
            "images itself to train on it"
        )
    train = opener.open(found, found.train)
    more: dict[str, Any] = {"statistics": found.statistics, "joined": found.joined}
    if not data.test_path:
        if not found.test:
            return DataSets(train, None, "", found.left_out, found.unlabeled, **more)
        test = _with_labels_first(opener.open(found, found.test), opener.say)
        both = with_common_classes(train, test)
        return DataSets(*both, found.origin, found.left_out, found.unlabeled, **more)
    own = opener.find(data.test_path, "data.test_path")
    test = opener.open(own, own.test or own.train)
    left_out = dict(found.left_out)
    if found.test:
        left_out[found.origin] = rows_of(found.test)
    both = with_common_classes(train, test)
    return DataSets(*both, data.test_path, left_out, found.unlabeled, **more)


def _with_labels_first(test: ShardSet, say: Say) -> ShardSet:
    """Only the files with labels, if some test files have labels and others none."""
    labelled = test.labelled
    if labelled is test or not labelled.files:
        return test
    lost = test.rows - labelled.rows
    say(f"{lost:,} test images without labels are not used, because others have labels")
    return replace(labelled, notes=())


@dataclass(frozen=True)
class _Found:
    """Parquet files at a path, sorted into splits by their names."""

    uri: str
    train: list[str]
    test: list[str]
    labels: Mapping[str, str]
    """The class of each file whose folder names one."""
    origin: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)
    unlabeled: int = 0
    """Number of files at the end of `train` that come from a split of unlabelled images."""
    statistics: Statistics | None = None
    joined: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Opener:
    """Opens the data sets of one run."""

    data: DataConfig
    output: Location
    say: Say
    build: Build

    def open(self, found: _Found, files: list[str]) -> ShardSet:
        labels = {uri: found.labels[uri] for uri in files if uri in found.labels}
        return open_shards(files, found.uri, self.data.image_column, self.data.label_column, labels)

    def find(self, path: str, field: str) -> _Found:
        """The Parquet files at a path; other images are converted first."""
        flag = f"--{field.replace('_', '-')}"
        if path.startswith(EMBEDDED):
            return self._sorted(list_source(write_embedded(path[len(EMBEDDED) :], self.output)))
        if "*" in path and not Location.of(path).exists():
            listing = list_matching(path)
            if not listing.files:
                raise FileNotFoundError(f"{flag} {path} matches no file")
            kind, files, _ = select(path, listing.files)
            if kind != "parquet":
                raise ValueError(
                    f"{flag} {path} matches no Parquet file, but {kind}: give a folder"
                )
            return self._sorted(replace(listing, files=files))
        location = Location.of(path)
        if not location.exists():
            raise FileNotFoundError(
                f"{flag} {path} does not exist: give a folder of images or Parquet files, "
                "local, s3:// or gs://"
            )
        try:
            listing = list_source(location)
            kind, files, tables = select(location, listing.files)
            if kind == "parquet":
                found = self._sorted(replace(listing, files=files), location)
                return replace(found, statistics=statistics_in(location))
            names = [file.name for file in files]
            more = says_more(names, understand(names, kind), kind, bool(tables))
            more = more or (kind == "tar" and have_folders(listing.root, files))
            shards, manifest = self._converted(location, more)
        except ValueError as error:
            raise ValueError(f"{flag}: {error}") from None
        found = self._sorted(list_source(shards))
        understood = manifest.plan.get("understood") or {}
        origins = [understood.get("origins", {}).get(split) for split in ("validation", "test")]
        return replace(
            found,
            origin=" and ".join(filter(None, origins)) or found.origin,
            left_out=understood.get("left_out", {}),
            statistics=manifest.statistics,
        )

    def _sorted(self, listing: Listing, source: Location | None = None) -> _Found:
        """Sort the Parquet files of a listing into splits by their names."""
        names = [file.name for file in listing.files]
        is_one_file = source is not None and source.uri != listing.root.uri
        if is_one_file:  # a file given by name is trained on, even if it is named like a test set
            understood = Understood((TRAIN,), (None,), False, {}, {})
        else:
            names = [name for name in names if name.endswith(".parquet")]
            understood = understand(names, "parquet")
        if listing.quarantined:
            first = listing.quarantined[0]
            self.say(
                f"skipped: {first.file} ({first.message})"
                + (f" and {len(listing.quarantined) - 1:,} more" if listing.quarantined[1:] else "")
            )
        train, unlabeled, test = [], [], []
        lists = {TRAIN: train, UNLABELED: unlabeled}
        for name, split in zip(names, understood.splits, strict=True):
            if split is not None:
                lists.get(split, test).append(listing.uri(name))
        left_out = {
            top: rows_of([listing.uri(n) for n in names if n == top or n.startswith(top)])
            for top in understood.left_out
        }
        labels = {
            listing.uri(name): label
            for name, label in zip(names, understood.labels, strict=True)
            if label is not None
        }
        origins = [understood.origins.get(split) for split in ("validation", "test")]
        uri = (source or listing.root).uri
        origin = " and ".join(filter(None, origins))
        files = train + unlabeled
        # Unlabelled images are only additional if there are train images.
        count = len(unlabeled) if train else 0
        joined = understood.joined
        return _Found(uri, files, test, labels, origin, left_out, count, joined=joined)

    def _converted(self, source: Location, more: bool) -> tuple[Location, Manifest]:
        """Shards of a folder of images, built under `output` on first use."""
        name = re.sub(r"[^\w-]", "-", source.name) or "images"
        column = self.data.label_column
        # A different name if an earlier version understood the same folder differently.
        text = source.uri + ("?splits" if more else "") + (f"?label={column}" if column else "")
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        target = self.output / "shards" / f"{name}-{digest}"
        is_new = not (target / MANIFEST).exists()
        if is_new:
            self.say(f"converting {source} to shards in {target}, once")
        # What is odd about the source is said once.
        say = self.say if is_new else _silent
        manifest = self.build(source, target, BuildOptions(label_column=column), say)
        left_out = manifest.quarantined.count
        if is_new or left_out:
            self.say(
                f"{manifest.images:,} images in {len(manifest.shards)} shards"
                + (
                    f"; {left_out:,} files left out, see {target}/quarantine.jsonl"
                    if left_out
                    else ""
                )
            )
        return target, manifest


def _silent(_: str) -> None:
    pass


def as_started(shards: ShardSet, run: Location, say: Callable[[str], None]) -> ShardSet:
    """The data set as it was when the run started. The position of each image follows from files
    and row groups, so a resumed run must use the same ones.

    A file that has disappeared keeps its positions, whose images count as broken; new files are
    ignored. Raises ValueError that names a file whose rows have changed.
    """
    record = run / DATA_FILE
    if not record.exists():
        return shards
    try:
        started = _started_files(record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        say(f"{record} cannot be used ({one_line(error)}): the run takes the data as it is now")
        return shards
    found = {_inner(file.uri, shards): file for file in shards.files}
    for name, file in found.items():
        if name in started and list(file.group_rows) != started[name]:
            raise ValueError(
                f"{file.uri} is not the file that {run} started with ({file.rows:,} rows in "
                f"{len(file.group_rows)} row groups, then {sum(started[name]):,} in "
                f"{len(started[name])}): put it back, or start another run with another --name"
            )
    away = [n for n in started if n not in found]
    # A file may still exist but no longer be a train file, once `train-0.parquet` lies beside it.
    lost = [n for n in away if not Location.of(_outer(n, shards)).exists()]
    new = [n for n in found if n not in started]
    if lost:
        rows = sum(sum(started[name]) for name in lost)
        say(
            f"{len(lost)} of the {len(started)} shards at the start {'are' if lost[1:] else 'is'} "
            f"gone, the first is {lost[0]}: their {rows:,} images count as broken"
        )
    if new:
        say(
            f"{len(new)} shard{'s were' if len(new) > 1 else ' was'} added after this run started, "
            f"the first is {new[0]}: the run continues without"
        )
    files = tuple(
        found.get(name) or ShardFile(_outer(name, shards), tuple(rows))
        for name, rows in started.items()
    )
    return replace(shards, files=files)


def _started_files(record: Location) -> dict[str, list[int]]:
    files = record.read_strict_json()["files"]
    for name, rows in files.items():
        if not all(type(count) is int and count >= 0 for count in rows):
            raise ValueError(f"{name} has rows {rows}")
    return files


def remember(shards: ShardSet, run: Location) -> None:
    """Record the files of a data set in the run's folder, for `as_started`, and its classes."""
    files = {_inner(file.uri, shards): file.group_rows for file in shards.files}
    classes = {"classes": shards.label_names} if shards.has_labels else {}
    (run / DATA_FILE).write_json({"files": files, **classes})


def classes_in(run: Location) -> tuple[str, ...]:
    """The classes of a run's data set in the order of their labels; empty if they are not
    known."""
    found = read_object(run / DATA_FILE).get("classes")
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        return ()
    return tuple(found)


def _inner(uri: str, shards: ShardSet) -> str:
    """A file's name relative to its data set, so that the whole set may be moved."""
    return uri.removeprefix(shards.uri.rstrip("/") + "/")


def _outer(name: str, shards: ShardSet) -> str:
    is_whole = "://" in name or name.startswith("/")
    return name if is_whole else f"{shards.uri.rstrip('/')}/{name}"
