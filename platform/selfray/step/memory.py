"""One line of advice when a device's memory is too small."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from selfray.experiment import Experiment


@contextmanager
def explained(experiment: Experiment, device: torch.device) -> Iterator[None]:
    """Replace torch's OutOfMemoryError by one that names the batch and settings that need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(advice(experiment, device, str(error))) from None


def advice(experiment: Experiment, device: torch.device, cause: str) -> str:
    workers = experiment.max_workers
    images = experiment.batch_size // (workers * experiment.accumulate)
    ways = [f"--batch-size {experiment.batch_size // 2}"]
    if experiment.why_not_accumulate is None:
        more = 2 * experiment.accumulate
        ways.insert(0, f"--accumulate {more} (micro-batches of {images // 2}, the same loss)")
    if experiment.encoder.is_vit and not experiment.encoder.recompute:
        blocks = "each block keeps only its input, for a third more time"
        ways.insert(0, f"--encoder.recompute True ({blocks})")
    if experiment.precision == "float32":
        ways.append("--precision bf16 (half of the activations)")
    ways.append("more --workers")
    return (
        f"out of memory on {device}: a micro-batch of {images} images of "
        f"{experiment.encoder.image_size} pixels (batch_size {experiment.batch_size}, {workers} "
        f"workers, accumulate {experiment.accumulate}) does not fit: give {', or '.join(ways)}. "
        f"Torch says: {cause.splitlines()[0] if cause else 'nothing'}"
    )
