"""Measures the memory of a step: the loss with and without blocks, recomputation, gradient caching.

    python benchmarks/step_memory.py

Every row runs in its own process. Its peak is the largest resident size minus the size before the
computation; times are the median of three. On a CPU, one thread. gpu_session.py measures the same
on a GPU (`loss` and `batches`).
"""

import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import gpu_session
from selfray.experiment import Experiment
from selfray.losses import nt_xent
from selfray.models.encoder import EncoderConfig
from selfray.recipes import imagenet

VIT = EncoderConfig("vit_small_patch16_224", image_size=64, patch_size=8, width=192, heads=3)
"""12 blocks, 192 wide, 64 patches."""
LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda values: gpu_session.plain_nt_xent(values, 0.1),
    "blocked": lambda values: nt_xent(values, values, 0, 0.1),
}


def of_the_loss(name: str, images: int) -> float:
    """Seconds of NT-Xent, forward and backward, on embeddings of 128 dimensions."""
    values = torch.randn(images, 2, 128).requires_grad_()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        LOSSES[name](values).backward()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def of_a_step(batch_size: int, accumulate: int, recompute: bool) -> float:
    """Seconds of one step of SimCLR."""
    encoder = replace(VIT, recompute=recompute)
    method = replace(imagenet.SIMCLR.method, projector_hidden=192)
    run: Experiment = replace(
        imagenet.SIMCLR,
        method=method,
        encoder=encoder,
        batch_size=batch_size,
        accumulate=accumulate,
        precision="float32",
    )
    steps = gpu_session.a_few_steps(run, torch.device("cpu"))
    return batch_size / steps["images_per_second"]


ROWS: list[tuple[str, Callable[..., float], tuple[Any, ...]]] = [
    *(
        (f"NT-Xent of {images:,} images, {name}", of_the_loss, (name, images))
        for images in (512, 1024, 2048, 4096)
        for name in LOSSES
    ),
    ("SimCLR, 128 images, whole", of_a_step, (128, 1, False)),
    ("SimCLR, 128 images, blocks recomputed", of_a_step, (128, 1, True)),
    ("SimCLR, 128 images, 4 micro-batches, cached", of_a_step, (128, 4, False)),
    ("SimCLR, 128 images, 4, cached, recomputed", of_a_step, (128, 4, True)),
]


def measured(compute: Callable[..., float], arguments: tuple[Any, ...], out: Connection) -> None:
    torch.set_num_threads(1)
    gc.collect()
    # Reset the peak: that of the imports could hide a smaller one of the row.
    Path("/proc/self/clear_refs").write_text("5")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    seconds = compute(*arguments)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    out.send((seconds, peak - before))


def main() -> None:
    context = multiprocessing.get_context("spawn")
    print(f"{'':46}{'seconds':>9}{'peak MiB':>10}")
    for name, compute, arguments in ROWS:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=measured, args=(compute, arguments, theirs))
        process.start()
        theirs.close()
        try:
            seconds, peak = ours.recv()
            print(f"{name:46}{seconds:9.3f}{peak / 2**20:10,.0f}", flush=True)
        except EOFError:
            print(f"{name:46}  failed", flush=True)
        process.join()


if __name__ == "__main__":
    main()
