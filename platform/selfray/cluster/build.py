"""Images of any origin -> Parquet shards with a manifest, in parallel on Ray.

Sources are a folder of images, WebDataset tars or Parquet files; local, s3:// or gs://. A build is
planned as data first (shard_sources.py), and a work item's shards follow from its inputs and the
seed alone (shard_writer.py). So any worker can build any shard, the same source and options give
the same bytes, and an interrupted build goes on where it stopped.

While a build runs, DST/_build holds the plan and one record for each finished shard; manifest.json
is written last and marks the build complete. Broken images are listed in quarantine.jsonl.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.exceptions
from pyarrow import fs

from selfray.check import require
from selfray.data.listing import (
    MIB,
    BuildOptions,
    Layout,
    Plan,
    Quarantined,
    Sample,
    make_plan,
    one_line,
)
from selfray.data.reader import NO_LABEL
from selfray.data.writer import (
    BUILD_FOLDER,
    MANIFEST,
    PLAN,
    Job,
    Labels,
    Manifest,
    Shard,
    ShardBuilder,
    ShardRecord,
    Spread,
    build_item,
    manifest_of,
    schema_of,
    shard_name,
    shard_number,
)
from selfray.pixels import codecs
from selfray.storage import Location

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
    "write_arrays",
]

QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True)
class Progress:
    images_done: int
    """Images that lie in finished shards."""
    images_total: int | None
    """How many there may be at most; None for tars, which have no table of contents."""
    quarantined: int
    shards_done: int
    shards_total: int
    seconds: float
    bytes: int
    """Size of the finished shards."""
    note: str = ""
    """A line for the user when there is something to say, such as that a build is continued."""


@dataclass(frozen=True)
class CheckReport:
    destination: str
    shards: int
    images: int
    bytes: int
    problems: tuple[str, ...]
    """One line each: the file, what is wrong with it, and the way out."""

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

    Shards are named by numbers, which may have gaps: a shard of broken images only is not written.

    Broken images go to DST/quarantine.jsonl and stop nothing. A complete build of the same plan is
    returned at once; shards missing from it are built again. FileNotFoundError where the source
    does not exist; ValueError where there is nothing to build, or where the destination cannot be
    written or holds something else; OSError where storage fails on the way (run it again to go on).

    `on_progress` is first called when the plan is made and before any Ray task, so that a caller
    may start Ray there.
    """
    options = options or BuildOptions()
    source, destination = Location.of(source), Location.of(destination)
    _refuse_overlap(source, destination)
    state = _open_destination(destination)
    plan = make_plan(source, options)
    if state.plan is not None:
        _refuse_other_plan(destination, state, plan)

    numbers = {number for item in plan.items for number in item.shard_numbers}
    tally = _Tally(on_progress, plan.images_total, len(numbers))
    if state.manifest is not None:
        return _mend(destination, plan, state.manifest, numbers, tally)
    if state.plan is None:
        _start(destination, plan)
    records = _intact(destination, _read_records(destination))
    tally.quarantined = len(plan.quarantined)
    for record in records.values():
        tally.add(record)
    tally.report(f"going on: {len(records)} of {len(numbers)} shards are there" if records else "")
    records |= _build_missing(destination, plan, set(records), tally)
    return _finish(destination, plan, [records[number] for number in sorted(records)])


def check(
    destination: str | Path | Location,
    on_progress: Callable[[Progress], None] | None = None,
    deep: bool = False,
) -> CheckReport:
    """Compare every shard with the manifest: existence, size, sha256, Parquet structure, rows.

    `deep` also decodes every image. FileNotFoundError where there is no such folder.
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


def write_arrays(
    destination: str | Path | Location,
    images: Sequence[bytes],
    labels: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    rows_per_shard: int = 4096,
    source: str = "memory",
) -> Manifest:
    """Write a small data set from memory, without Ray and in the given order.

    `images` are encoded files (JPEG, PNG, ...), `names` their paths, `source` says in the manifest
    where they come from. The same call a second time finds its result and returns it. ValueError
    where an image is broken, lengths differ, or the folder holds something else.
    """
    destination = Location.of(destination)
    require(len(images) > 0, "images is empty: give at least one encoded image")
    require(rows_per_shard > 0, f"rows_per_shard must be positive, got {rows_per_shard}")
    for name, values in (("labels", labels), ("names", names)):
        require(
            values is None or len(values) == len(images),
            f"{name} must have one entry for each of the {len(images)} images",
        )
    if names is None:
        names = [f"{index:06d}" for index in range(len(images))]
    classes = None if label_names is None else tuple(label_names)
    digest = hashlib.sha256(json.dumps([rows_per_shard, classes]).encode())
    for index, data in enumerate(images):
        label = None if labels is None else int(labels[index])
        digest.update(json.dumps([names[index], label, len(data)]).encode() + data)
    options = BuildOptions(labels="none" if labels is None else "auto")
    plan = Plan(
        source=destination,
        source_uri=source,
        layout=Layout("images", labels is not None, classes),
        options=options,
        items=(),
        quarantined=(),
        images_total=len(images),
        files=len(images),
        bytes=sum(map(len, images)),
        fingerprint=digest.hexdigest(),
    )
    state = _open_destination(destination)
    if state.plan is not None:
        _refuse_other_plan(destination, state, plan)
    if state.manifest is not None:
        shards = dict(enumerate(state.manifest.shards))
        if len(_intact(destination, shards)) == len(shards):
            return state.manifest
    builders = []
    for first in range(0, len(images), rows_per_shard):
        builder = ShardBuilder(plan.layout, options)
        for index in range(first, min(first + rows_per_shard, len(images))):
            label = NO_LABEL if labels is None else int(labels[index])
            builder.add(Sample(names[index], images[index], label))
        if builder.quarantined:
            broken = builder.quarantined[0]
            raise ValueError(f"image {broken.file} is broken: {broken.message}; leave it out")
        builders.append(builder)
    _start(destination, plan)
    records = [builder.write(destination, number) for number, builder in enumerate(builders)]
    return _finish(destination, plan, records)


# The destination --------------------------------------------------------------------------------


_OF_A_BUILD = re.compile(
    r"(manifest\.json|quarantine\.jsonl|shard-\d{5,}\.parquet)(\.\d+\.tmp)?|" + BUILD_FOLDER
)


@dataclass(frozen=True)
class _State:
    """What a destination holds at the start: nothing, a part of a build, or a whole one."""

    plan: dict[str, Any] | None = None
    manifest: Manifest | None = None


def _refuse_overlap(source: Location, destination: Location) -> None:
    if source.is_local and destination.is_local:
        outer, inner = os.path.realpath(source.path), os.path.realpath(destination.path)
    elif source.filesystem == destination.filesystem:
        outer, inner = source.path.rstrip("/"), destination.path.rstrip("/")
    else:
        return
    require(
        inner != outer and not inner.startswith(outer.rstrip("/") + "/"),
        f"the destination {destination} lies inside the source {source}: give one outside",
    )


def _open_destination(destination: Location) -> _State:
    """ValueError where the folder holds anything that no build has put there."""
    try:
        names = [posixpath.basename(info.path) for info in destination.list()]
    except OSError as error:
        raise ValueError(
            f"the destination {destination} cannot be listed: {one_line(error)}; give a folder"
        ) from None
    if MANIFEST in names:
        manifest = Manifest.load(destination)
        return _State(
            {"source": manifest.source, "options": manifest.options, **manifest.plan}, manifest
        )
    plan_file = destination / BUILD_FOLDER / PLAN
    plan = plan_file.read_json() if BUILD_FOLDER in names and plan_file.exists() else None
    known = _OF_A_BUILD if plan else re.compile(BUILD_FOLDER)
    foreign = [name for name in names if not known.fullmatch(name)]
    require(
        not foreign,
        f"the destination {destination} holds other files ({', '.join(foreign[:3])}"
        f"{', ...' if len(foreign) > 3 else ''}): give an empty or a new folder",
    )
    return _State(plan)


def _refuse_other_plan(destination: Location, state: _State, plan: Plan) -> None:
    then, now = state.plan or {}, plan.identity()
    old, new = then["options"], now["options"]
    changes = [
        f"{name} was {old.get(name)}, now {new.get(name)}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if then["source"] != now["source"]:
        changes.insert(0, f"source was {then['source']}, now {now['source']}")
    elif not changes and then["fingerprint"] != now["fingerprint"]:
        changes.append(
            f"the source had {then['files']} files of {then['bytes']:,} bytes, "
            f"now {now['files']} of {now['bytes']:,}"
        )
        if (then["files"], then["bytes"]) == (now["files"], now["bytes"]):
            changes = ["files of the source have changed since"]
    what = "a complete" if state.manifest else "an unfinished"
    require(
        not changes,
        f"{destination} holds {what} build of something else ({'; '.join(changes)}): "
        f"give another destination, or delete {destination}",
    )


def _start(destination: Location, plan: Plan) -> None:
    try:
        (destination / BUILD_FOLDER).make_folder()
        (destination / BUILD_FOLDER / PLAN).write_json(plan.identity())
    except OSError as error:
        raise ValueError(
            f"the destination {destination} cannot be written: {one_line(error)}; "
            "give a folder that you may write to"
        ) from None


def _read_records(destination: Location) -> dict[int, ShardRecord]:
    names = [info.path for info in (destination / BUILD_FOLDER).list()]
    files = [
        destination / BUILD_FOLDER / posixpath.basename(name)
        for name in names
        if name.endswith(".parquet.json")
    ]
    with ThreadPoolExecutor(16) as pool:
        records = pool.map(lambda file: ShardRecord.from_json(file.read_json()), files)
        return {record.number: record for record in records}


_Stored = TypeVar("_Stored", Shard, ShardRecord)


def _intact(destination: Location, shards: dict[int, _Stored]) -> dict[int, _Stored]:
    """Those whose file is there in full size; contents are the business of `check`."""
    sizes = {posixpath.basename(info.path): info.size for info in destination.list()}
    return {
        number: shard
        for number, shard in shards.items()
        if shard.rows == 0 or sizes.get(shard.name) == shard.bytes
    }


def _finish(destination: Location, plan: Plan, records: Sequence[ShardRecord]) -> Manifest:
    quarantined = [*plan.quarantined, *(entry for r in records for entry in r.quarantined)]
    if not any(record.rows for record in records):
        (destination / BUILD_FOLDER).delete_folder()
        examples = "; ".join(f"{q.file}: {q.message}" for q in quarantined[:3])
        raise ValueError(
            f"{plan.source_uri} holds no readable image: all {len(quarantined)} files were refused "
            f"({examples}); give a folder that holds images"
        )
    manifest = manifest_of(plan, records, quarantined)
    lines = "".join(json.dumps(entry._asdict()) + "\n" for entry in quarantined)
    (destination / QUARANTINE).write_bytes(lines.encode())
    _delete_temporary_files(destination)
    (destination / MANIFEST).write_json(manifest.to_json())
    (destination / BUILD_FOLDER).delete_folder()
    return manifest


def _delete_temporary_files(destination: Location) -> None:
    """What a killed task has left."""
    for info in destination.list():
        if info.path.endswith(".tmp"):
            destination.filesystem.delete_file(info.path)


def _mend(
    destination: Location, plan: Plan, manifest: Manifest, numbers: set[int], tally: "_Tally"
) -> Manifest:
    """Build again what is lost from a complete build; the manifest changes only where another
    version of a library writes the same rows as other bytes."""
    shards = {shard_number(shard.name): shard for shard in manifest.shards}
    intact = _intact(destination, shards)
    lost = set(shards) - set(intact)
    tally.quarantined = manifest.quarantined.count
    for shard in intact.values():
        tally.add(shard)
    tally.shards_done = len(numbers) - len(lost)  # some numbers have no shard: nothing was sound
    note = f"{destination} is complete: nothing to do"
    if lost:
        note = f"{destination} has lost {len(lost)} of {len(shards)} shards: building them again"
        _start(destination, plan)
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
    _delete_temporary_files(destination)
    if mended != manifest:
        (destination / MANIFEST).write_json(mended.to_json())
    (destination / BUILD_FOLDER).delete_folder()
    return mended


# Checking ---------------------------------------------------------------------------------------

_WAY_OUT = "delete it and run the same build again: only lost shards are built anew"


def _leftovers(destination: Location, manifest: Manifest) -> list[str]:
    """Problems of what lies around the shards."""
    names = {posixpath.basename(info.path) for info in destination.list()}
    known = {shard.name for shard in manifest.shards}
    problems = []
    for name in sorted(names - known):
        path = destination / name
        if name.endswith(".tmp"):
            problems.append(f"{path}: left by a killed task; delete it")
        elif name.endswith(".parquet"):
            problems.append(f"{path}: not in the manifest, but readers would take it; delete it")
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
    """The problems of one shard; decodes its images where max_pixels is given. A Ray task."""
    path = destination / shard.name
    info = path.info()
    if info.type == fs.FileType.NotFound:
        return shard, [
            f"{path}: missing; run the same build again: only lost shards are built anew"
        ]
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
    """Build every shard that is not done, in parallel."""
    items = [item for item in plan.items if not done.issuperset(item.shard_numbers)]
    if not items:
        return {}
    job = ray.put(Job(plan.source, destination, plan.layout, plan.options))
    work = [
        (
            f"{shard_name(item.first_shard)} ({item.inputs[0].name} to {item.inputs[-1].name})",
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
        raise OSError(
            f"the build of {destination} stopped: {error}; finished shards are kept, run the same "
            "build again to go on"
        ) from error
    return built


_Result = TypeVar("_Result")


def _in_parallel(
    function: Callable[..., _Result], work: Iterable[tuple[str, tuple[Any, ...]]]
) -> Iterator[_Result]:
    """Results of function(*arguments) for each (name, arguments), in the order they are ready.

    One CPU for each task. Few more tasks than CPUs are in flight, since the arguments of all would
    fill the object store; more than CPUs, so that an autoscaler sees demand.
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
                if isinstance(error.cause, OSError):  # storage: the traceback tells users nothing
                    raise error.cause from None
                raise
            except ray.exceptions.RayError as error:
                raise OSError(f"the worker of {name} died: {one_line(error)}") from None
            yield result
    finally:
        for reference in running:
            ray.cancel(reference)
