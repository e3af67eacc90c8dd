"""Embeddings by Ray tasks: each writes its own file, so an interruption loses at most running
ones."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import pyarrow.parquet as pq
import ray

from selfray.probes.embedding import PLAN, Embedding, part_name
from selfray.storage import Location

WAITING = 3
"""Number of tasks per CPU that are submitted at a time."""
Result = TypeVar("Result")
_PART = re.compile(r"part-(\d{6,})\.parquet")


@dataclass(frozen=True)
class Devices:
    """Resources of one task."""

    cpus: float = 1.0
    gpus: float = 0.0


class Written(NamedTuple):
    images: int
    """Number of images in all files."""
    unreadable: int
    """Number of images that could not be read and were left out."""
    blocks_now: int
    """Number of files that this call wrote."""


def write_embeddings(
    job: Embedding,
    folder: Location,
    devices: Devices,
    on_block: Callable[[int], None] = lambda rows: None,
) -> Written:
    """Write the missing files of a folder of embeddings, in parallel.

    The files do not depend on the number of tasks or on interruptions. `on_block` is called with
    the number of images of each finished file, also for files of an earlier start. Raises
    ValueError if the folder holds embeddings of something else.
    """
    plan = job.plan()
    _claim(folder, plan)
    known = {int(found[1]) for info in folder.list() if (found := _PART.fullmatch(info.base_name))}
    missing = [block for block in range(job.blocks) if block not in known]
    for block in sorted(known):
        on_block(_rows_asked(job, block))
    rows: dict[int, int] = {}
    for block, count in in_blocks(_write_block, (job, folder.uri), missing, devices):
        rows[block] = count
        on_block(_rows_asked(job, block))
    for block in known:
        rows[block] = _rows_of(folder / part_name(block))
    images = sum(rows.values())
    return Written(images, len(job.rows) - images, len(missing))


def in_blocks(
    function: Callable[[Any, int], Result], given: object, blocks: Sequence[int], devices: Devices
) -> Iterator[tuple[int, Result]]:
    """Yield (block, function(given, block)) of each block when its task is done. Only as many tasks
    are submitted as keep all CPUs and GPUs busy, so the driver's memory does not grow with the
    data."""
    if not blocks:
        return
    task: Any = ray.remote(num_cpus=devices.cpus, num_gpus=devices.gpus)(function)
    shared = ray.put(given)  # it is sent once, not with each task
    waiting = list(reversed(blocks))
    running: dict[Any, int] = {}
    most = WAITING * max(2, int(ray.cluster_resources().get("CPU", 1)))
    while waiting or running:
        while waiting and len(running) < most:
            block = waiting.pop()
            running[task.remote(shared, block)] = block
        (done,), _ = ray.wait(list(running), num_returns=1)
        yield running.pop(done), ray.get(done)


def _write_block(given: tuple[Embedding, str], block: int) -> int:
    job, folder = given
    return job.write(block, Location.of(folder))


def _rows_asked(job: Embedding, block: int) -> int:
    return min(job.block_rows, len(job.rows) - block * job.block_rows)


def _rows_of(place: Location) -> int:
    with place.filesystem.open_input_file(place.path) as file:
        return pq.ParquetFile(file).metadata.num_rows


def _claim(folder: Location, plan: dict[str, Any]) -> None:
    """Write the plan into a new folder; raises ValueError if the folder has a different plan."""
    record = folder / PLAN
    if record.exists():
        found = record.read_json()
        differ = [name for name in plan if found.get(name) != plan[name]]
        if differ:
            raise ValueError(
                f"{folder} holds embeddings of something else (different {' and '.join(differ)}): "
                "give another folder, or remove it"
            )
        return
    if folder.list():
        raise ValueError(f"{folder} is not empty and holds no embeddings: give another folder")
    folder.make_folder()
    record.write_json(plan)
