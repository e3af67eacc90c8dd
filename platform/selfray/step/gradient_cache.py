"""A step over micro-batches with the loss and the gradients of the whole batch.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
arXiv:2101.06983. The networks embed all micro-batches without a graph; one loss over all embeddings
gives a gradient for each; then each micro-batch is embedded again, with a graph, through which its
cached gradients flow back. The cost is one more forward pass of the trained encoder; its
activations need the memory of one micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfray.method import Batch, ComparingMethod, Embedded
from selfray.schedules import Progress


def backward(
    method: ComparingMethod,
    batches: Sequence[Batch],
    progress: Progress,
    seed: Callable[[int], object],
    prepare: Callable[[Batch], Batch],
    autocast: Callable[[], AbstractContextManager[object]],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward of all micro-batches of a rank: returns (loss, metrics).

    Gradients are added to the parameters; they are not averaged over ranks.

    Args:
        batches: the step's micro-batches on the device, views as uint8.
        seed: called with a micro-batch's number before each of its two embeddings, so that dropout
            and stochastic depth are the same in both.
        prepare: turns a batch into the method's input. It is called twice for each, because float32
            views of all micro-batches would fill the device.
        autocast: the context of each forward pass.
    """
    parts, targets = [], []
    for number, batch in enumerate(batches):
        prepared = prepare(batch)
        seed(number)
        with torch.no_grad(), autocast():
            with _frozen_statistics(method):
                parts.append(method.embed(prepared, progress))
            targets.append(method.targets(prepared, progress))
    sizes = [{name: len(values) for name, values in part.items()} for part in parts]
    embedded = {name: values.requires_grad_() for name, values in _joined(parts).items()}
    del parts
    with autocast():
        loss, metrics = method.compare(embedded, _joined(targets), progress)
    loss.backward()

    gradients = _split(embedded, sizes)
    for number, batch in enumerate(batches):
        seed(number)
        with autocast():
            part = method.embed(prepare(batch), progress)
        torch.autograd.backward(list(part.values()), [gradients[number][name] for name in part])
    return loss.detach(), metrics


def _joined(parts: list[Embedded]) -> Embedded:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _split(embedded: Embedded, sizes: list[dict[str, int]]) -> list[Embedded]:
    """The gradients of the joined embeddings, split by micro-batch."""
    parts: list[Embedded] = [{} for _ in sizes]
    for name, values in embedded.items():
        gradient = torch.zeros_like(values) if values.grad is None else values.grad
        for part, rows in zip(parts, gradient.split([size[name] for size in sizes]), strict=True):
            part[name] = rows
    return parts


@contextmanager
def _frozen_statistics(method: nn.Module) -> Iterator[None]:
    """Inside, batch norms do not update running statistics, so that each micro-batch counts
    once."""
    norms = [module for module in method.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
