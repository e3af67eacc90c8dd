"""Embeddings by Ray Data tasks: each writes files of its own, so an interruption costs one."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import ray.data
from ray.data import DataContext

from selfray.cluster.stream import configure
from selfray.data.source import Arrays
from selfray.probes.embedding import PLAN, Embedding, part_name
from selfray.storage import Location

_PART = re.compile(r"part-(\d{6,})\.parquet")


@dataclass(frozen=True)
class Devices:
    """What one task may use."""

    cpus: float = 1.0
    gpus: float = 0.0


class Written(NamedTuple):
    images: int
    """In all files."""
    unreadable: int
    """Images that could not be read and were left out."""
    blocks_now: int
    """Files that this call wrote."""


@dataclass(frozen=True)
class _WriteBlocks:
    job: Embedding
    folder: str

    def run(self, ids: Arrays) -> Arrays:
        folder = Location.of(self.folder)
        rows = [self.job.write(int(block), folder) for block in ids["id"]]
        return {"id": ids["id"], "rows": np.array(rows, dtype=np.int64)}


def write_embeddings(
    job: Embedding,
    folder: Location,
    devices: Devices,
    on_block: Callable[[int], None] = lambda rows: None,
) -> Written:
    """Write what of a folder of embeddings is missing, in parallel, and say what it holds.

    The files are the same whatever the number of tasks, and whatever an interruption left behind.
    `on_block` is told how many images each finished file stands for, those of an earlier start
    too. ValueError where the folder holds embeddings of something else.
    """
    plan = job.plan()
    _claim(folder, plan)
    known = {int(found[1]) for info in folder.list() if (found := _PART.fullmatch(info.base_name))}
    missing = [block for block in range(job.blocks) if block not in known]
    for block in sorted(known):
        on_block(_rows_asked(job, block))
    rows = {}
    if missing:
        configure(DataContext.get_current())
        ids = [{"id": block} for block in missing]
        # Ray's stubs know no dict of arrays.
        run: Any = _WriteBlocks(job, folder.uri).run
        dataset = ray.data.from_items(ids, override_num_blocks=len(ids)).map_batches(
            run, batch_size=None, num_cpus=devices.cpus, num_gpus=devices.gpus or None
        )
        for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
            for block, count in zip(batch["id"].tolist(), batch["rows"].tolist(), strict=True):
                rows[block] = count
                on_block(_rows_asked(job, block))
    for block in known:
        rows[block] = _rows_of(folder / part_name(block))
    images = sum(rows.values())
    return Written(images, len(job.rows) - images, len(missing))


def _rows_asked(job: Embedding, block: int) -> int:
    return min(job.block_rows, len(job.rows) - block * job.block_rows)


def _rows_of(place: Location) -> int:
    with place.filesystem.open_input_file(place.path) as file:
        return pq.ParquetFile(file).metadata.num_rows


def _claim(folder: Location, plan: dict[str, Any]) -> None:
    """Write into a new folder what it is for; ValueError where it is for something else."""
    record = folder / PLAN
    if record.exists():
        found = record.read_json()
        differ = [name for name in plan if found.get(name) != plan[name]]
        if differ:
            raise ValueError(
                f"{folder} holds embeddings of something else (another {' and '.join(differ)}): "
                "give another folder, or remove it"
            )
        return
    if folder.list():
        raise ValueError(f"{folder} is not empty and holds no embeddings: give another folder")
    folder.make_folder()
    record.write_json(plan)
