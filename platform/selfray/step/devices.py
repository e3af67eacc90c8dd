"""The device of a step: its settings, and batches copied to it while it computes."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from itertools import chain
from typing import TypeVar

import torch

from selfray.method import HIDDEN_SUFFIX, Batch
from selfray.pixels.augment import MASK_SUFFIX

Item = TypeVar("Item")

AHEAD = 2
"""Number of micro-batches read ahead into pinned memory."""


def settle(device: torch.device, precision: str) -> None:
    """Set all torch settings that decide how fast a device computes. On a CPU nothing is set."""
    from timm.layers import use_fused_attn

    # Without it, timm materialises the attention matrix, which takes N times the memory.
    assert use_fused_attn(), "timm's fused attention is switched off: unset TIMM_FUSED_ATTN"
    if device.type != "cuda":
        return
    # TF32: products of float32 matrices with 10 bits of mantissa, summed in float32. Under bf16 it
    # applies to what stays in float32, except losses.
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    # Shapes are the same in every step, so searching for the fastest convolution pays.
    torch.backends.cudnn.benchmark = True


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def on_device(batches: Iterator[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """Yield the batches on the device, with `<group>_hidden` added.

    On a GPU a thread reads ahead into pinned memory, and copies run on a separate stream while the
    previous step computes. On a CPU, or if batches are already on the GPU, there is no thread.
    Close the generator to end the thread.
    """
    first = next(batches, None)
    if first is None:
        return
    batches = chain([first], batches)
    if device.type != "cuda" or all(values.is_cuda for values in first.values()):
        del first
        yield from (_moved(with_hidden_places(batch), device) for batch in batches)
        return
    del first
    stream = torch.cuda.Stream(device)
    with contextlib.closing(read_ahead(batches, lambda batch: _pinned(batch, device))) as pinned:
        for host in pinned:
            with torch.cuda.stream(stream):
                batch = _moved(host, device)
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            for values in batch.values():
                # The next copy must not reuse this memory before the step has read it.
                values.record_stream(current)
            yield batch


def with_hidden_places(batch: Batch) -> Batch:
    """Add `<group>_hidden`, int64 [M], the indices of hidden patches in the flattened mask. The
    host computes them here, while masks are on the CPU, so that it need not wait for a GPU
    later."""
    places = {
        name.removesuffix(MASK_SUFFIX) + HIDDEN_SUFFIX: values.flatten().nonzero().squeeze(1)
        for name, values in batch.items()
        if name.endswith(MASK_SUFFIX) and not values.is_cuda
    }
    return batch | places


def read_ahead(
    items: Iterator[Item], prepare: Callable[[Item], Item]
) -> Generator[Item, None, None]:
    """Yield items that a thread reads and prepares, at most `AHEAD` in advance. An exception in the
    thread is raised here, at the position of its item."""
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(AHEAD)
    stopped = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return

    def read() -> None:
        try:
            for item in items:
                put(prepare(item), None)
                if stopped.is_set():
                    return
        except BaseException as error:
            put(None, error)
        else:
            put(None, StopIteration())

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            assert item is not None
            yield item
    finally:
        stopped.set()


def _pinned(batch: Batch, device: torch.device) -> Batch:
    if device.index is not None:  # without an index, the thread uses the process's device
        torch.cuda.set_device(device)
    return {name: values.pin_memory() for name, values in with_hidden_places(batch).items()}


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: values.to(device, non_blocking=True) for name, values in batch.items()}
