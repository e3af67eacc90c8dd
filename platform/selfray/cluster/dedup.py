"""Shards -> shards without duplicates, as Ray tasks.

First every image gets its prints (data/duplicates.py), in one file for each work item, which a
second start does not compute again. Then alike images are linked: equal keys by sorting, near ones
by the parts of their hashes, one task for each part. With an encoder they are linked by the cosine
of its features, one task for each pair of tiles: n^2 D / 2 multiplications. Memory grows with the
number of images, never with pairs. Last, the shards are written as `shards build` writes them, so
an interruption loses only what was running.
"""

import base64
import dataclasses
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from selfray.check import require
from selfray.cluster.build import build_missing, named
from selfray.cluster.parallel import Progress, Tally, in_parallel
from selfray.data.destination import (
    DUPLICATES,
    PAIRS,
    finish,
    intact,
    open_destination,
    read_records,
    refuse_other_plan,
    refuse_overlap,
    start,
)
from selfray.data.duplicates import (
    BITS,
    NO_LINKS,
    Decision,
    Links,
    Printing,
    Prints,
    Removal,
    bands,
    cosine_links,
    decide,
    equal_hashes,
    equal_links,
    groups_of,
    most_bits,
    near_links,
)
from selfray.data.layout import TEST, VALIDATION
from selfray.data.listing import Plan, WorkItem, make_plan
from selfray.data.manifest import BUILD_FOLDER, Manifest
from selfray.data.options import BuildOptions
from selfray.data.rows import GROUP, Sample
from selfray.data.samples import read_samples
from selfray.data.writer import Job
from selfray.pixels.codecs import BrokenImage, checked
from selfray.storage import Location

if TYPE_CHECKING:
    from selfray.cluster.embedding_tasks import Devices
    from selfray.cluster.evaluation import Subject

LEAST_SIMILARITY = 0.84
"""Of hashes: below it, most images would be compared with most others."""
SHOWN = 24
"""Pairs in the picture."""
TILE_FILES = 8
"""Files of embeddings in a tile of comparisons."""


@dataclass(frozen=True)
class By:
    """An encoder whose features are compared."""

    subject: "Subject"
    devices: "Devices"


def dedup(
    source: str | Path | Location,
    destination: str | Path | Location,
    similarity: float = 0.95,
    by: By | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Write the shards of a folder again, without duplicates; on a second call, go on.

    Args:
        source: a folder that `selfray shards build` wrote.
        similarity: of two near images: the share of equal bits of their hashes, or the cosine of
            their features.
        by: the encoder; None compares perceptual hashes.
        on_progress: is first called before any Ray task.

    Raises:
        FileNotFoundError: the source has no manifest.
        ValueError: the similarity cannot be used, an image cannot be read, or the destination holds
            something else.
    """
    least = LEAST_SIMILARITY if by is None else 0
    require(
        least <= similarity <= 1,
        f"similarity must lie in [{least:g}, 1]"
        + (" for hashes" if by is None else "")
        + f", got {similarity:g}",
    )
    source, destination = Location.of(source), Location.of(destination)
    refuse_overlap(source, destination)
    before = Manifest.load(source)
    state = open_destination(destination)
    # A source may have been built with a higher limit.
    most_pixels = before.options.get("max_pixels", BuildOptions().max_pixels)
    group = None if before.options.get("group_column") is None else GROUP
    plan = make_plan(source, BuildOptions(max_pixels=most_pixels, group_column=group))
    how: dict[str, Any] = {"similarity": similarity}
    if by is not None:
        encoder = by.subject.encoder
        how["encoder"] = "pixels" if encoder is None else encoder.digest
    plan = dataclasses.replace(plan, understood={**plan.understood, "dedup": how})
    if state.plan is not None:
        refuse_other_plan(destination, state, plan)
    numbers = {number for item in plan.items for number in item.shard_numbers}
    tally = Tally(on_progress, plan.images_total, len(numbers))
    if state.manifest is not None:
        shards = dict(enumerate(state.manifest.shards))
        require(
            len(intact(destination, shards)) == len(shards),
            f"{destination} has lost shards: delete it and run the same command again",
        )
        tally.report(f"{destination} is complete: nothing to do")
        return state.manifest
    if state.plan is None:
        start(destination, plan)
    tally.report("reading all images")
    job = Job(plan.source, destination, plan.layout, plan.options)
    prints = _prints(job, plan, tally)
    links = [equal_links(prints.of_bytes), equal_links(prints.of_pixels)]
    if by is None:
        tally.report("comparing hashes")
        links += _near_by_hash(prints, most_bits(similarity))
    else:
        tally.report("computing features")
        links += _near_by_features(by, plan, destination, prints, similarity)
    decision = decide(prints, groups_of(len(prints), np.concatenate([NO_LINKS, *links])))
    _report(job, plan, prints, decision)
    tally.report(f"writing all but {len(decision.removals):,} images")
    left_out = frozenset(prints.names[removal.row] for removal in decision.removals)
    job = dataclasses.replace(job, left_out=left_out)
    records = intact(destination, read_records(destination))
    records |= build_missing(job, plan, set(records), tally)
    done = _counts(before, prints, decision, how)
    return finish(
        destination,
        plan,
        [records[number] for number in sorted(records)],
        amended=lambda manifest: _amended(manifest, before, done),
    )


def _amended(manifest: Manifest, before: Manifest, done: dict[str, Any]) -> Manifest:
    """The manifest with what was removed, and what the first build had converted."""
    statistics = manifest.statistics
    if statistics is not None and before.statistics is not None:
        known = before.statistics
        statistics = dataclasses.replace(statistics, converted=known.converted, window=known.window)
    return dataclasses.replace(manifest, statistics=statistics, dedup=done)


def _counts(
    before: Manifest, prints: Prints, decision: Decision, how: dict[str, Any]
) -> dict[str, Any]:
    kinds = Counter(removal.kind for removal in decision.removals)
    of_test = sum(bool(prints.is_test[removal.stays]) for removal in decision.removals)
    return {
        **how,
        "images_before": len(prints),
        "removed": len(decision.removals),
        "removed_by": dict(sorted(kinds.items())),
        "removed_as_alike_to_test": of_test,
        "test_images_alike_to_test": decision.test_in_test,
        "groups_of_several_classes": decision.several_classes,
        "built": {"source": before.source, "options": before.options},
    }


# Prints -------------------------------------------------------------------------------------------


def _prints(job: Job, plan: Plan, tally: Tally) -> Prints:
    """The prints of all images; those of finished items are read from the destination."""
    folder = job.destination / BUILD_FOLDER
    known = {info.base_name for info in folder.list()}
    missing = [item for item in plan.items if _prints_name(item) not in known]
    shared = ray.put(job)
    work = [(named(item), (shared, item)) for item in missing]
    shown = 0
    for done, _ in enumerate(in_parallel(_write_prints, work), 1):
        if (tenth := 10 * done // len(work)) > shown:
            shown = tenth
            tally.report(f"read {done:,} of {len(work):,} parts of the images")
    return Prints.joined(
        [Prints.unpacked((folder / _prints_name(item)).read_bytes()) for item in plan.items]
    )


def _prints_name(item: WorkItem) -> str:
    return f"prints-{item.first_shard:05d}.npz"


def _write_prints(job: Job, item: WorkItem) -> None:
    """The prints of a work item's images; runs as a Ray task."""
    printing = Printing()
    for row in read_samples(job.source, job.layout, item.inputs):
        if not isinstance(row, Sample):
            raise ValueError(f"{row.file} cannot be read ({row.message}): {_TEST_THEM}")
        try:
            _, pixels = checked(row.data, job.options.max_pixels)
        except BrokenImage as error:
            raise ValueError(f"{row.name} cannot be decoded ({error}): {_TEST_THEM}") from None
        is_test = item.split in (TEST, VALIDATION)
        printing.add(row.name, row.path or row.name, row.data, pixels, row.label, is_test)
    place = job.destination / BUILD_FOLDER / _prints_name(item)
    place.write_bytes(printing.result().packed())


_TEST_THEM = "`selfray shards check` with --deep tests the shards, and the same build repairs them"


# Near images --------------------------------------------------------------------------------------


def _near_by_hash(prints: Prints, most: int) -> Iterator[Links]:
    equal, firsts = equal_hashes(prints)
    yield equal
    hashes, chosen = ray.put(prints.hashes), ray.put(firsts)
    work = [(f"bits {band}", (hashes, chosen, band, most)) for band in bands(most)]
    yield from in_parallel(near_links, work)


def _near_by_features(
    by: By, plan: Plan, destination: Location, prints: Prints, similarity: float
) -> Iterator[Links]:
    """Links by cosine. The features lie in the destination until the build is complete."""
    from selfray.cluster.embedding_tasks import write_embeddings
    from selfray.data.shard_set import open_shards
    from selfray.probes.embedding import Contents, Embedding, Rows

    files = sorted({entry.name for item in plan.items for entry in item.inputs})
    shards = open_shards([(plan.source / name).uri for name in files], plan.source_uri)
    job = Embedding(
        Rows.all_of(shards), by.subject.encoder, by.subject.size, Contents(normalize=True)
    )
    folder = destination / BUILD_FOLDER / "embeddings"
    written = write_embeddings(job, folder, by.devices)
    require(
        written.images == len(prints),
        f"{written.unreadable:,} images cannot be read for the encoder: {_TEST_THEM}",
    )
    # Rows of the embeddings, in the order of files -> rows of the prints.
    place = {name: row for row, name in enumerate(prints.names)}
    names = [
        f"{name}#row {row}"
        for name, file in zip(files, shards.files, strict=True)
        for row in range(file.rows)
    ]
    rows = np.array([place[name] for name in names])
    tiles = [
        range(first, min(first + TILE_FILES, job.blocks))
        for first in range(0, job.blocks, TILE_FILES)
    ]
    pairs = itertools.combinations_with_replacement(tiles, 2)
    work = (
        (
            f"features {one.start} and {other.start}",
            (folder, one, other, job.block_rows, similarity),
        )
        for one, other in pairs
    )
    for links in in_parallel(_tile_links, work):
        yield rows[links].reshape(-1, 2)


def _tile_links(
    folder: Location, one: range, other: range, block_rows: int, similarity: float
) -> Links:
    """Links between the images of two tiles of embeddings; runs as a Ray task."""
    first, second = (_features(folder, tile) for tile in (one, other))
    # Rounding must not part an image from its copy.
    starts = one.start * block_rows, other.start * block_rows
    return cosine_links(first, second, *starts, min(similarity, 1 - 1e-6))


def _features(folder: Location, blocks: range) -> np.ndarray:
    """float32 [n, D], of length 1."""
    from selfray.probes.embedding import EMBEDDING, part_name
    from selfray.probes.feature_files import matrix, read_part

    tables = (read_part(folder / part_name(block), [EMBEDDING]) for block in blocks)
    return np.concatenate([matrix(table[EMBEDDING].combine_chunks()) for table in tables])


# Report -------------------------------------------------------------------------------------------


def _report(job: Job, plan: Plan, prints: Prints, decision: Decision) -> None:
    """Name every removed image in a file, and show some pairs in a picture."""
    lines = [
        json.dumps(
            {
                "removed": prints.paths[removal.row],
                "stays": prints.paths[removal.stays],
                "stays_in": "test" if prints.is_test[removal.stays] else "train",
                "alike_by": removal.kind,
                "equal_bits": _equal_bits(prints, removal),
            }
        )
        for removal in decision.removals
    ]
    (job.destination / DUPLICATES).write_bytes("".join(f"{line}\n" for line in lines).encode())
    if decision.removals:
        file = io.BytesIO()
        _pairs_picture(job, plan, prints, decision).save(file, "PNG", optimize=True)
        # An image file would be taken for one of the data set.
        picture = base64.b64encode(file.getvalue()).decode()
        page = (
            f'<!doctype html><title>Duplicates</title><img src="data:image/png;base64,{picture}">'
        )
        (job.destination / PAIRS).write_bytes(page.encode())


def _equal_bits(prints: Prints, removal: Removal) -> int | None:
    """Of the two hashes' bits; None if an image has no hash."""
    rows = [removal.row, removal.stays]
    if not prints.hashed[rows].all():
        return None
    return BITS - int(np.bitwise_count(np.bitwise_xor.reduce(prints.hashes[rows])))


def _pairs_picture(job: Job, plan: Plan, prints: Prints, decision: Decision) -> Any:
    """The most doubtful pairs: those that touch the test images first, then the least alike."""
    from selfray.report.contact import pairs_sheet

    def doubt(removal: Removal) -> tuple[bool, int]:
        return not prints.is_test[removal.stays], _equal_bits(prints, removal) or 0

    shown = sorted(decision.removals, key=doubt)[:SHOWN]
    wanted = {prints.names[row] for removal in shown for row in (removal.row, removal.stays)}
    pixels: dict[str, np.ndarray] = {}
    for item in plan.items:
        inputs = [e for e in item.inputs if any(w.startswith(f"{e.name}#") for w in wanted)]
        for row in read_samples(job.source, job.layout, inputs):
            if isinstance(row, Sample) and row.name in wanted:
                pixels[row.name] = checked(row.data, job.options.max_pixels)[1]
    pairs = [(pixels[prints.names[r.stays]], pixels[prints.names[r.row]]) for r in shown]
    captions = [
        (
            "test" if prints.is_test[r.stays] else "train",
            f"{r.kind}, {_equal_bits(prints, r)}/{BITS}",
        )
        for r in shown
    ]
    count = len(decision.removals)
    return pairs_sheet(
        pairs,
        captions,
        "Duplicates",
        f"{len(shown)} of {count:,} removed images, the most doubtful first; equal bits of {BITS}",
    )
