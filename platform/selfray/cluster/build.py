"""Images of any origin -> Parquet shards with a manifest, in parallel on Ray.

Sources are a folder of images, WebDataset tars or Parquet files; local, s3:// or gs://. A build is
first planned as data (data/listing.py), and a work item's shards follow only from its inputs and
the seed (data/writer.py). So any worker can build any shard, the same source and options give the
same bytes, and an interrupted build continues where it stopped.

While a build runs, DST/_build holds the plan and one record for each finished shard; manifest.json
is written last and marks the build complete. Broken images are listed in quarantine.jsonl.
"""

import collections
import dataclasses
from collections.abc import Callable
from pathlib import Path

import ray
import ray.exceptions

from selfray.cluster.checking import CheckReport, check
from selfray.cluster.endings import RunFailed
from selfray.cluster.parallel import Progress, Tally, in_parallel
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
from selfray.data.listing import Plan, WorkItem, make_plan
from selfray.data.manifest import (
    BUILD_FOLDER,
    MANIFEST,
    Labels,
    Manifest,
    Shard,
    ShardRecord,
    Spread,
    shard_name,
    shard_number,
)
from selfray.data.measured import are_alike, kind_of_most
from selfray.data.options import BuildOptions
from selfray.data.writer import Job, build_item, values_of_item
from selfray.pixels.deep import ValueCounts
from selfray.storage import Location

WINDOW = "window.json"
"""File in DST/_build with the window from percentiles over all images."""

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
    tally = Tally(on_progress, plan.images_total, len(numbers))
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
    window = _window_of_all(destination, plan, tally)
    job = Job(plan.source, destination, plan.layout, options, window, options.channels)
    records |= build_missing(job, plan, set(records), tally)
    records |= _without_other_channels(job, plan, records, tally)
    return finish(destination, plan, [records[number] for number in sorted(records)], window)


def build_told(
    source: Location, destination: Location, options: BuildOptions, say: Callable[[str], None]
) -> Manifest:
    """`build` with notes, such as images that are left out, passed to `say`."""

    def on_progress(progress: Progress) -> None:
        if progress.note:
            say(progress.note)

    return build(source, destination, options, on_progress)


def _rebuild_missing(
    destination: Location, plan: Plan, manifest: Manifest, numbers: set[int], tally: Tally
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
    known = manifest.statistics
    job = Job(
        plan.source,
        destination,
        plan.layout,
        plan.options,
        known and known.window,
        known and kind_of_most(known.channels),
    )
    for number, record in build_missing(job, plan, numbers - lost, tally).items():
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


def _window_of_all(destination: Location, plan: Plan, tally: Tally) -> tuple[float, float] | None:
    """The window from percentiles over all images, if the options ask for it; this reads all images
    once more. It is stored, so that an interrupted build does not read them again."""
    intake = plan.options.intake
    if intake.window_of != "set":
        return None
    known = destination / BUILD_FOLDER / WINDOW
    if known.exists():
        low, high = known.read_strict_json()["window"]
        return float(low), float(high)
    tally.report("reading the values of all images for one window")
    job = ray.put(Job(plan.source, destination, plan.layout, plan.options))
    counts = ValueCounts()
    for codes, found in in_parallel(
        values_of_item, [(named(item), (job, item)) for item in plan.items]
    ):
        counts.add_pairs(codes, found)
    window = counts.window(intake.shares)
    if window is not None:
        known.write_json({"window": window})
        tally.report(f"the window of all images is {window[0]:g} to {window[1]:g}")
    return window


def _without_other_channels(
    job: Job, plan: Plan, records: dict[int, ShardRecord], tally: Tally
) -> dict[int, ShardRecord]:
    """Rebuild shards that contain images with other channels than most images, without these
    images."""
    counts: collections.Counter[str] = collections.Counter()
    for record in records.values():
        counts.update(record.measured.channels)
    most = kind_of_most(counts)
    mixed = {
        number
        for number, record in records.items()
        if not all(are_alike(int(n), most) for n in record.measured.channels)
    }
    if not mixed:
        return {}
    others = sum(count for n, count in counts.items() if not are_alike(int(n), most))
    tally.report(
        f"{others:,} of {counts.total():,} images have other channels than {most}: quarantined "
        "(--channels chooses)"
    )
    for number in mixed:
        tally.remove(records[number])
    job = dataclasses.replace(job, channels=most)
    return build_missing(job, plan, set(records) - mixed, tally)


def named(item: WorkItem) -> str:
    return (
        f"{shard_name(item.first_shard, item.split)} "
        f"({item.inputs[0].name} to {item.inputs[-1].name})"
    )


def build_missing(job: Job, plan: Plan, done: set[int], tally: Tally) -> dict[int, ShardRecord]:
    """Build every shard that is not done, in parallel."""
    destination = job.destination
    items = [item for item in plan.items if not done.issuperset(item.shard_numbers)]
    if not items:
        return {}
    shared = ray.put(job)
    work = [
        (named(item), (shared, item, frozenset(done & set(item.shard_numbers)))) for item in items
    ]
    built: dict[int, ShardRecord] = {}
    try:
        for records in in_parallel(build_item, work):
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
