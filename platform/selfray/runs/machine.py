"""Records the CPU, memory and GPU use of a run's machines, under MLflow's names of metrics.

MLflow shows metrics that begin with `system/` on the run's page "System metrics".
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from selfray.runs.spool import SpoolWriter

log = logging.getLogger(__name__)

SAMPLE_SECONDS = 10.0
MEGABYTE = 1e6


@contextmanager
def watched(
    spool: SpoolWriter,
    images_seen: Callable[[], int],
    node: str = "",
    with_cpu: bool = True,
    gpu: int | None = None,
    seconds: float = SAMPLE_SECONDS,
) -> Iterator[None]:
    """Inside, write a point every `seconds` from a thread, and one more at the end.

    Args:
        spool: the spool that gets the points.
        images_seen: returns the position of a point on the run's axis.
        node: the machine's name, if the run has several machines.
        with_cpu: False for further workers of the same machine, which write only their GPU.
        gpu: the number of this worker's GPU on its machine; None without one.
        seconds: the interval between points.
    """
    ended = threading.Event()
    prefix = f"system/{node}/" if node else "system/"
    if with_cpu:
        _cpu()  # starts psutil's interval; the first figure of a process is meaningless

    def write() -> None:
        values = (_cpu() if with_cpu else {}) | ({} if gpu is None else _gpu(gpu))
        if values:
            spool.metrics(images_seen(), {prefix + name: value for name, value in values.items()})

    def write_until_the_end() -> None:
        try:
            while not ended.wait(seconds):
                write()
        except Exception:  # a failure here must not end the run
            log.exception("the machine's figures are no longer written")

    thread = threading.Thread(target=write_until_the_end, daemon=True, name="selfray-machine")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(1.0)
        with suppress(Exception):
            write()


def _cpu() -> dict[str, float]:
    """CPU use in % since the last call, and memory use in MB and %."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": (memory.total - memory.available) / MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
    }


def _gpu(number: int) -> dict[str, float]:
    """Memory use of this process's current GPU in MB and %, and its utilization in % if NVIDIA's
    library is installed."""
    import torch

    free, total = torch.cuda.mem_get_info()
    values = {
        f"gpu_{number}_memory_usage_megabytes": (total - free) / MEGABYTE,
        f"gpu_{number}_memory_usage_percentage": 100 * (total - free) / total,
    }
    with suppress(ModuleNotFoundError, RuntimeError):
        values[f"gpu_{number}_utilization_percentage"] = float(torch.cuda.utilization())
    return values
