"""Images of any origin -> Parquet shards with a manifest, in parallel on Ray.

Sources are a folder of images, WebDataset tars or Parquet files; local, s3:// or gs://. A build is
first planned as data (data/listing.py), and a work item's shards follow only from its inputs and
the seed (data/writer.py). So any worker can build any shard, the same source and options give the
same bytes, and an interrupted build continues where it stopped.

While a build runs, DST/_build holds the plan and one record for each finished shard; manifest.json
is written last and marks the build complete. Broken images are listed in quarantine.jsonl.
"""

import dataclasses
import hashlib
import itertools
import posixpath
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.exceptions
from pyarrow import fs

from selfray.cluster.endings import RunFailed
from selfray.data.destination import (
    QUARANTINE,
    delete_temporary_files,
    finish,
    intact,
    open_destination,
    read_records,
    refuse_other_plan,
    refuse_overlap,
    start,
)
from selfray.data.files import Quarantined
from selfray.data.listing import BuildOptions, Plan, make_plan
from selfray.data.manifest import (
    BUILD_FOLDER,
    MANIFEST,
    PLAN,
    Labels,
    Manifest,
    Shard,
    ShardRecord,
    Spread,
    shard_name,
    shard_number,
)
from selfray.data.rows import MIB, Layout
from selfray.data.writer import Job, build_item, schema_of
from selfray.pixels import codecs
from selfray.storage import Location, one_line

__all__ = [
    "MANIFEST",
    "QUARANTINE",
    "BuildOptions",
    "CheckReport",
    "Labels",
    "Manifest",
    "Progress",
    "Quarantined",
    "Shard",
    "Spread",
    "build",
    "check",
    "make_plan",
]


@dataclass(frozen=True)
class Progress:
    images_done: int
    """Images in finished shards."""
    images_total: int | None
    """Largest possible number of images; None for tars, which have no table of contents."""
    quarantined: int
    shards_done: int
    shards_total: int
    seconds: float
    bytes: int
    """Size of the finished shards."""
    note: str = ""
    """A line for the user, such as that a build is continued; empty for none."""


@dataclass(frozen=True)
class CheckReport:
    destination: str
    shards: int
    images: int
    bytes: int
    problems: tuple[str, ...]
    """One line for each: the file, its fault, and the way out."""

    @property
    def ok(self) -> bool:
        return not self.problems


def build(
    source: str | Path | Location,
    destination: str | Path | Location,
    options: BuildOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Convert images to Parquet shards on the running Ray; on a second call, finish the build.

    Shards are named by numbers, which may have gaps: a shard with only broken images is not
        written.
    Broken images are listed in DST/quarantine.jsonl and do not stop the build. A complete build of
    the same plan is returned at once; its missing shards are built again.

    `on_progress` is first called after planning and before any Ray task, so that a caller can start
    Ray there.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: there is nothing to build, or the destination cannot be written or holds
            something else.
        OSError: storage failed during the build; the same call continues it.
    """
    options = options or BuildOptions()
    source, destination = Location.of(source), Location.of(destination)
    refuse_overlap(source, destination)
    state = open_destination(destination)
    plan = make_plan(source, options)
    if state.plan is not None:
        refuse_other_plan(destination, state, plan)

    numbers = {number for item in plan.items for number in item.shard_numbers}
    tally = _Tally(on_progress, plan.images_total, len(numbers))
    if state.manifest is not None:
        return _rebuild_missing(destination, plan, state.manifest, numbers, tally)
    if state.damage:
        (destination / BUILD_FOLDER).delete_folder()
    if state.plan is None:
        start(destination, plan)
    records = intact(destination, read_records(destination))
    tally.quarantined = len(plan.quarantined)
    for record in records.values():
        tally.add(record)
    going_on = f"continuing: {len(records)} of {len(numbers)} shards exist" if records else ""
    for note in filter(None, (state.damage, *plan.notes)):
        tally.report(note)
    tally.report(going_on)
    records |= _build_missing(destination, plan, set(records), tally)
    return finish(destination, plan, [records[number] for number in sorted(records)])


def check(
    destination: str | Path | Location,
    on_progress: Callable[[Progress], None] | None = None,
    deep: bool = False,
) -> CheckReport:
    """Compare every shard with the manifest: existence, size, sha256, Parquet structure, rows.

    `deep` also decodes every image. Raises FileNotFoundError if the folder does not exist.
    """
    destination = Location.of(destination)
    if not destination.is_folder():
        raise FileNotFoundError(f"{destination} does not exist: give a folder of shards")
    if not (destination / MANIFEST).exists():
        unfinished = (destination / BUILD_FOLDER / PLAN).exists()
        problem = (
            "the build was interrupted: run the same `selfray shards build` again to finish it"
            if unfinished
            else "there is no manifest: make shards with `selfray shards build`"
        )
        return CheckReport(destination.uri, 0, 0, 0, (f"{destination / MANIFEST}: {problem}",))
    try:
        manifest = Manifest.load(destination)
    except ValueError as error:
        return CheckReport(destination.uri, 0, 0, 0, (str(error),))

    problems = _leftovers(destination, manifest)
    max_pixels = manifest.options.get("max_pixels", codecs.MAX_PIXELS)
    tally = _Tally(on_progress, manifest.images, len(manifest.shards))
    tally.quarantined = manifest.quarantined.count
    has_labels = manifest.labels is not None
    work = [
        (shard.name, (destination, shard, has_labels, max_pixels if deep else None))
        for shard in manifest.shards
    ]
    for shard, found in _in_parallel(_check_shard, work):
        problems += found
        tally.add(shard)
        tally.report()
    return CheckReport(
        destination.uri,
        len(manifest.shards),
        manifest.images,
        manifest.bytes,
        tuple(sorted(problems)),
    )


def _rebuild_missing(
    destination: Location, plan: Plan, manifest: Manifest, numbers: set[int], tally: "_Tally"
) -> Manifest:
    """Build missing shards of a complete build again. The manifest changes only if another version
    of a library writes the same rows as different bytes."""
    shards = {shard_number(shard.name): shard for shard in manifest.shards}
    kept = intact(destination, shards)
    lost = set(shards) - set(kept)
    tally.quarantined = manifest.quarantined.count
    for shard in kept.values():
        tally.add(shard)
    tally.shards_done = len(numbers) - len(lost)  # numbers without sound images have no shard
    note = f"{destination} is complete: nothing to do"
    if lost:
        note = f"{destination} has lost {len(lost)} of {len(shards)} shards: building them again"
        start(destination, plan)
    tally.report(note)
    for number, record in _build_missing(destination, plan, numbers - lost, tally).items():
        shards[number] = Shard(
            record.name, record.rows, record.bytes, record.sha256, record.row_groups
        )
    mended = dataclasses.replace(
        manifest,
        shards=tuple(shards.values()),
        bytes=sum(shard.bytes for shard in shards.values()),
    )
    delete_temporary_files(destination)
    if mended != manifest:
        (destination / MANIFEST).write_json(mended.to_json())
    (destination / BUILD_FOLDER).delete_folder()
    return mended


# Checking ---------------------------------------------------------------------------------------

_WAY_OUT = "delete it and run the same build again: only missing shards are built"


def _leftovers(destination: Location, manifest: Manifest) -> list[str]:
    """Problems with other files beside the shards."""
    names = {posixpath.basename(info.path) for info in destination.list()}
    known = {shard.name for shard in manifest.shards}
    problems = []
    for name in sorted(names - known):
        path = destination / name
        if name.endswith(".tmp"):
            problems.append(f"{path}: left by a killed task; delete it")
        elif name.endswith(".parquet"):
            problems.append(f"{path}: not in the manifest, but readers would use it; delete it")
        elif name == BUILD_FOLDER:
            problems.append(f"{path}: left by a killed build; run the same build again")
    path = destination / QUARANTINE
    lines = path.read_bytes().count(b"\n") if path.exists() else 0
    if lines != manifest.quarantined.count:
        problems.append(
            f"{path}: {lines} entries instead of {manifest.quarantined.count}; restore it from a "
            f"copy, or delete {destination} and build again"
        )
    return problems


def _check_shard(
    destination: Location, shard: Shard, has_labels: bool, max_pixels: int | None
) -> tuple[Shard, list[str]]:
    """The problems of one shard; decodes its images if max_pixels is given. Runs as a Ray task."""
    path = destination / shard.name
    info = path.info()
    if info.type == fs.FileType.NotFound:
        return shard, [f"{path}: missing; run the same build again: only missing shards are built"]
    if info.size != shard.bytes:
        return shard, [f"{path}: {info.size} bytes instead of {shard.bytes}; {_WAY_OUT}"]
    try:
        with path.filesystem.open_input_stream(path.path) as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(4 * MIB):
                digest.update(chunk)
        if digest.hexdigest() != shard.sha256:
            return shard, [f"{path}: its sha256 is not the manifest's; {_WAY_OUT}"]
        with path.filesystem.open_input_file(path.path) as stream:
            parquet = pq.ParquetFile(stream)
            problems = _check_structure(path, parquet, shard, has_labels)
            if max_pixels is not None and not problems:
                problems = _check_images(path, parquet, max_pixels)
    except (OSError, pa.ArrowException) as error:
        problems = [f"{path}: cannot be read ({one_line(error)}); {_WAY_OUT}"]
    return shard, problems


def _check_structure(
    path: Location, parquet: pq.ParquetFile, shard: Shard, has_labels: bool
) -> list[str]:
    metadata = parquet.metadata
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    if groups != shard.row_groups or sum(groups) != shard.rows:
        return [f"{path}: row groups of {groups} rows instead of {shard.row_groups}; {_WAY_OUT}"]
    schema = schema_of(Layout("images", has_labels))
    if not parquet.schema_arrow.equals(schema):
        found = ", ".join(f"{f.name}: {f.type}" for f in parquet.schema_arrow)
        return [f"{path}: its columns are {found}; {_WAY_OUT}"]
    return []


def _check_images(path: Location, parquet: pq.ParquetFile, max_pixels: int) -> list[str]:
    problems, row = [], 0
    for group in range(parquet.metadata.num_row_groups):
        for picture in parquet.read_row_group(group, columns=["image"]).column(0).to_pylist():
            try:
                codecs.check(picture["bytes"] or b"", max_pixels)
            except codecs.BrokenImage as error:
                problems.append(f"{path}#row {row}: {one_line(error)}; {_WAY_OUT}")
            row += 1
    return problems


# Ray --------------------------------------------------------------------------------------------


class _Tally:
    """Counts for the user's progress line."""

    def __init__(
        self,
        on_progress: Callable[[Progress], None] | None,
        images_total: int | None,
        shards_total: int,
    ) -> None:
        self._on_progress = on_progress
        self._images_total = images_total
        self._shards_total = shards_total
        self._started = time.monotonic()
        self.images_done = self.quarantined = self.shards_done = self.bytes = 0

    def add(self, shard: Shard | ShardRecord) -> None:
        self.images_done += shard.rows
        self.bytes += shard.bytes
        self.shards_done += 1
        if isinstance(shard, ShardRecord):
            self.quarantined += len(shard.quarantined)

    def report(self, note: str = "") -> None:
        if self._on_progress is not None:
            self._on_progress(
                Progress(
                    images_done=self.images_done,
                    images_total=self._images_total,
                    quarantined=self.quarantined,
                    shards_done=self.shards_done,
                    shards_total=self._shards_total,
                    seconds=time.monotonic() - self._started,
                    bytes=self.bytes,
                    note=note,
                )
            )


def _build_missing(
    destination: Location, plan: Plan, done: set[int], tally: _Tally
) -> dict[int, ShardRecord]:
    """Build every shard that is not finished, in parallel."""
    items = [item for item in plan.items if not done.issuperset(item.shard_numbers)]
    if not items:
        return {}
    job = ray.put(Job(plan.source, destination, plan.layout, plan.options))
    work = [
        (
            f"{shard_name(item.first_shard, item.split)} "
            f"({item.inputs[0].name} to {item.inputs[-1].name})",
            (job, item, frozenset(done & set(item.shard_numbers))),
        )
        for item in items
    ]
    built: dict[int, ShardRecord] = {}
    try:
        for records in _in_parallel(build_item, work):
            for record in records:
                built[record.number] = record
                tally.add(record)
            tally.report()
    except OSError as error:
        raise RunFailed(
            f"the build of {destination} stopped: {error}; finished shards are kept, run the same "
            "build again to continue"
        ) from error
    return built


_Result = TypeVar("_Result")


def _in_parallel(
    function: Callable[..., _Result], work: Iterable[tuple[str, tuple[Any, ...]]]
) -> Iterator[_Result]:
    """Results of function(*arguments) for each (name, arguments), in order of completion.

    Each task takes one CPU. About twice as many tasks as CPUs are submitted: more than CPUs, so
    that an autoscaler sees demand, but not all, because their arguments would fill the object
    store.
    """
    task = ray.remote(num_cpus=1)(function)
    waiting = iter(work)
    running: dict[ray.ObjectRef, str] = {}
    try:
        while True:
            free = 2 * max(1, int(ray.cluster_resources().get("CPU", 1))) - len(running)
            for name, arguments in itertools.islice(waiting, free):
                running[task.remote(*arguments)] = name
            if not running:
                return
            (ready,), _ = ray.wait(list(running), num_returns=1)
            name = running.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, OSError):  # storage: a traceback does not help users
                    raise error.cause from None
                raise
            except ray.exceptions.RayError as error:
                raise OSError(f"the worker of {name} died: {one_line(error)}") from None
            yield result
    finally:
        for reference in running:
            ray.cancel(reference)
