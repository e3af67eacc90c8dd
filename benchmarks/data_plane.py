"""Measures the data plane: the speed of Ray Data's stream compared with the bare function and a
DataLoader, memory against the number of rows, planning time, and the quality of the shuffle.

    python benchmarks/data_plane.py                    # ten minutes on two cores
    python benchmarks/data_plane.py --rows 1000 10000 100000
    python benchmarks/data_plane.py --pictures DIR     # JPEG files instead of synthetic ones

All contestants draw the same micro-batches with the same function on the same number of processes,
and take turns in short rounds, so that a busy machine slows all of them alike. Larger data sets
repeat the same pictures with different keys.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from torch.utils.data import DataLoader, Dataset

from augmentation import photographs
from selfray.cluster import runtime
from selfray.cluster.stream import Stream
from selfray.data.files import parquet_files
from selfray.data.plan import ReadPlan, Share
from selfray.data.shard_set import open_shards
from selfray.data.source import POSITION, Source
from selfray.pixels.codecs import encode_jpeg
from selfray.views import ColorJitter, View, Views
from shuffle import shuffle_quality

SIMCLR = View(size=224, color_jitter=ColorJitter(), grayscale=0.2, blur=0.5)
VIEWS: Views = {"global": (SIMCLR, SIMCLR)}
GROUP_ROWS = 40
PICTURES = 64


@dataclass(frozen=True)
class Benchmark:
    rows: tuple[int, ...] = (1_000, 10_000)
    """Sizes of the data sets whose memory is measured; the first one is used for the speed."""
    side: int = 320
    """Side of the synthetic pictures in pixels."""
    pictures: Path | None = None
    """A folder of JPEG files to use instead."""
    batch_size: int = 32
    steps: int = 700
    """Measured steps in a round. Steps at the start and the end of a stream are not measured: the
    first come in small tasks, so that training starts early, and at the end a single task may
    remain. A real run has many more steps."""
    rounds: int = 6
    cpus: int = 2
    windows: tuple[int, ...] = (1_024, 4_096, 16_384, 65_536)
    output: Path = Path("runs/bench/data_plane.json")


def main() -> None:
    settings = tyro.cli(Benchmark, description=__doc__)
    pictures = pictures_of(settings)
    before_ray = shared_memory()
    report: dict[str, Any] = {"plan": plan_times(), "shuffle": shuffle(settings)}
    with tempfile.TemporaryDirectory() as folder, runtime.session():
        sources = {
            rows: make_source(Path(folder), rows, pictures, settings) for rows in settings.rows
        }
        report["speed"] = speed(sources[settings.rows[0]], settings)
        report["memory"] = {rows: memory(s, settings, before_ray) for rows, s in sources.items()}
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text(json.dumps(report, indent=1))


def pictures_of(settings: Benchmark) -> list[bytes]:
    """The bytes of the given JPEG files, or of PICTURES synthetic ones."""
    if settings.pictures is None:
        rng = np.random.default_rng(0)
        small = [rng.integers(0, 256, (20, 20, 3), np.uint8) for _ in range(PICTURES)]
        return [encode_jpeg(cv2.resize(p, (settings.side,) * 2)) for p in small]
    files = photographs(settings.pictures)
    if not files:
        sys.exit(f"--pictures: there is no .jpg or .jpeg file in {settings.pictures}")
    return [file.read_bytes() for file in files]


def make_source(folder: Path, rows: int, pictures: list[bytes], settings: Benchmark) -> Source:
    (folder / str(rows)).mkdir()
    for first in range(0, rows, 4_000):
        # Bytes after the JPEG's end change its key but not its pixels.
        numbers = range(first, min(first + 4_000, rows))
        images = [pictures[i % len(pictures)] + i.to_bytes(8) for i in numbers]
        file = folder / str(rows) / f"{first:09}.parquet"
        table = pa.table({"image": images})
        # As `selfray shards build` writes them.
        pq.write_table(table, file, GROUP_ROWS, compression="none", use_dictionary=False)
    shards = open_shards(parquet_files(str(folder / str(rows))), str(folder / str(rows)))
    epochs = 1 + 2 * (WARM_STEPS + settings.steps) * settings.batch_size // rows
    return Source(shards, ReadPlan(shards.group_rows, settings.batch_size, epochs, 0), VIEWS)


# Speed


WARM_STEPS, LAST_STEPS = 200, 64


@dataclass(frozen=True)
class Batches(Dataset):
    source: Source
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        cv2.setNumThreads(1)
        size = self.source.plan.batch_size
        drawn = self.source.draw(step * size, size)
        return {name: drawn[name] for name in ("global", POSITION)}

    def count(self, step: int) -> int:
        return len(self[step][POSITION])


def speed(source: Source, settings: Benchmark) -> dict[str, Any]:
    steps = WARM_STEPS + settings.steps + LAST_STEPS
    batches = Batches(source, steps)
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=settings.cpus,
        persistent_workers=True,
        prefetch_factor=4,
        multiprocessing_context="forkserver",
    )
    stream = Stream(source, Share(0, 1), 0, settings.cpus, until_step=steps)
    with ProcessPoolExecutor(settings.cpus, get_context("forkserver")) as pool:
        contestants: dict[str, Callable[[], Any]] = {
            # Needs no consumer and draws exactly the steps of a round.
            "bare function": lambda: pool.map(batches.count, range(steps)),
            "DataLoader": lambda: iter(loader),
            "Stream": lambda: iter(stream),
        }
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(settings.rounds + 1):
            for name, start in contestants.items():
                rate = images_per_second(start(), settings)
                if number:  # the first warms up
                    rates[name].append(rate)
    bare = rates["bare function"]
    print(
        f"\n{'':16}{'images/s':>10}{'range':>16}{'to bare':>9}{'range':>14}"
        f"   ({settings.cpus} processes, {settings.rounds} rounds)"
    )
    for name, measured in rates.items():
        ratios = [rate / base for rate, base in zip(measured, bare, strict=True)]
        spread = f"{min(measured):,.0f} - {max(measured):,.0f}"
        to_bare = f"{min(ratios):.2f} - {max(ratios):.2f}"
        # The ratio of the rounds' total times: a drift of the machine's speed cancels in the sum.
        ratio = sum(1 / rate for rate in bare) / sum(1 / rate for rate in measured)
        middle = statistics.median(measured)
        print(f"{name:16}{middle:10,.0f}{spread:>16}{ratio:9.2f}{to_bare:>14}")
    return rates


def images_per_second(batches: Iterator[Any], settings: Benchmark) -> float:
    """Images/s over `steps` batches, without those that fill and empty the pipeline."""
    for _ in range(WARM_STEPS):
        next(batches)
    started = time.perf_counter()
    for _ in range(settings.steps):
        next(batches)
    seconds = time.perf_counter() - started
    assert sum(1 for _ in batches) == LAST_STEPS
    return settings.steps * settings.batch_size / seconds


# Memory, planning, shuffle


def shared_memory() -> int:
    """Bytes of the system's shared memory in use."""
    return shutil.disk_usage("/dev/shm").used


def memory(source: Source, settings: Benchmark, before_ray: int) -> dict[str, float]:
    """Peak memory in MiB over `steps` steps of the stream: of this process and of the largest task,
    both without shared memory, and the shared memory that the object store has touched so far."""
    me = psutil.Process()
    peaks = {"driver": 0.0, "largest task": 0.0, "object store": 0.0}
    for step, _ in enumerate(Stream(source, Share(0, 1), 0, settings.cpus)):
        tasks = [0]
        for process in psutil.process_iter(["name", "memory_info"]):
            if process.info["name"].startswith("ray::") and process.info["memory_info"]:
                info = process.info["memory_info"]
                tasks.append(info.rss - info.shared)
        figures = (
            me.memory_info().rss - me.memory_info().shared,
            max(tasks),
            shared_memory() - before_ray,
        )
        for name, value in zip(peaks, figures, strict=True):
            peaks[name] = max(peaks[name], value / 2**20)
        if step + 1 == settings.steps:
            break
    told = ", ".join(f"{name} {value:,.0f} MiB" for name, value in peaks.items())
    print(f"{source.plan.rows:>10,} rows: {told}")
    return peaks


def plan_times() -> dict[int, dict[str, float]]:
    """Seconds until the first batch of a plan, and for each further batch, by number of rows."""
    result = {}
    for rows in (10**6, 10**7):
        started = time.perf_counter()
        plan = ReadPlan((GROUP_ROWS,) * (rows // GROUP_ROWS), 256, 800, 0)
        plan.read(0, 256)
        first = time.perf_counter() - started
        started = time.perf_counter()
        for step in range(1, 1001):
            plan.read(256 * step, 256)
        each = (time.perf_counter() - started) / 1000
        print(f"plan of {rows:,} rows: first batch {first:.2f} s, then {each * 1e3:.2f} ms each")
        result[rows] = {"first_seconds": first, "batch_seconds": each}
    return result


def shuffle(settings: Benchmark) -> dict[int, dict[str, float]]:
    """The leak into batches of 10^6 rows sorted by 10 and by 1,000 classes, by window size."""
    result = {}
    for window in settings.windows:
        plan = ReadPlan((GROUP_ROWS,) * (10**6 // GROUP_ROWS), 256, 1, 0, window_rows=window)
        fine = plan.read(0, plan.images_per_epoch).groups // (len(plan.group_rows) // 1000)
        few, many = shuffle_quality(fine // 100, 256), shuffle_quality(fine, 256)
        print(
            f"window of {window:>6,} rows: leak {few.leak:.3f} of 10 classes, "
            f"{many.leak:.3f} of 1,000 (0 is a perfect shuffle, 1 none)"
        )
        result[window] = {"10": few.leak, "1000": many.leak}
    return result


if __name__ == "__main__":
    main()
