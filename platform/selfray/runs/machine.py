"""What the machines of a run do meanwhile: CPU, memory and GPUs, under MLflow's own names.

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
    """Write a point every 10 s while this lasts, and one at its end.

    Args:
        spool: where the points go.
        images_seen: tells the place of a point on the run's axis.
        node: the machine's name, where the run has several.
        with_cpu: False for a second worker of a machine, which writes its GPU alone.
        gpu: the number of this worker's GPU on its machine; None without one.
    """
    ended = threading.Event()
    prefix = f"system/{node}/" if node else "system/"
    if with_cpu:
        _cpu()  # the first call of a process begins the interval and returns nothing

    def write() -> None:
        values = (_cpu() if with_cpu else {}) | ({} if gpu is None else _gpu(gpu))
        if values:
            spool.metrics(images_seen(), {prefix + name: value for name, value in values.items()})

    def write_until_the_end() -> None:
        try:
            while not ended.wait(seconds):
                write()
        except Exception:  # a figure of the machine must not end a run
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
    """The processors' use since the last call, and the memory's use."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": (memory.total - memory.available) / MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
    }


def _gpu(number: int) -> dict[str, float]:
    """The use of this process's current GPU; its utilization only where NVIDIA's library is."""
    import torch

    free, total = torch.cuda.mem_get_info()
    values = {
        f"gpu_{number}_memory_usage_megabytes": (total - free) / MEGABYTE,
        f"gpu_{number}_memory_usage_percentage": 100 * (total - free) / total,
    }
    with suppress(ModuleNotFoundError, RuntimeError):
        values[f"gpu_{number}_utilization_percentage"] = float(torch.cuda.utilization())
    return values
