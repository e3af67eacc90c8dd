"""Checks shards against their manifest, as Ray tasks."""

import hashlib
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from selfray.cluster.parallel import Progress, Tally, in_parallel
from selfray.data.destination import QUARANTINE
from selfray.data.manifest import BUILD_FOLDER, MANIFEST, PLAN, Manifest, Shard
from selfray.data.rows import GROUP, MIB, Layout
from selfray.data.writer import schema_of
from selfray.pixels import codecs
from selfray.storage import Location, one_line


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
    tally = Tally(on_progress, manifest.images, len(manifest.shards))
    tally.quarantined = manifest.quarantined.count
    has_labels = manifest.labels is not None
    work = [
        (shard.name, (destination, shard, has_labels, max_pixels if deep else None))
        for shard in manifest.shards
    ]
    for shard, found in in_parallel(_check_shard, work):
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
    group = GROUP if GROUP in parquet.schema_arrow.names else None
    schema = schema_of(Layout("images", has_labels, group_column=group))
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
