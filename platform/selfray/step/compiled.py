"""torch.compile of a method's parts, in place, so that the names of the weights stay."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from selfray.models.encoder import Encoder
from selfray.models.vit import block_kinds

log = logging.getLogger(__name__)

VARIANTS = 64
"""So often a function may be compiled: for each kind of module, size of crop, student or teacher.
All modules share one function of torch's, and from its limit of 8 on it would not compile more."""


def in_place(method: nn.Module, device: torch.device, backend: str = "inductor") -> None:
    """Compile what a step spends its time in. A compiler that is missing or fails is told in one
    line, and the part runs as it is."""
    cause = _why_not(device, backend)
    if cause is not None:
        log.warning("compile: this machine cannot, so the run goes on without: %s", cause)
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for module in parts(method):
        if module._compiled_call_impl is None:
            _probabilities_as_tensors(module, device)
            module._compiled_call_impl = _or_plain(module, backend)


def parts(method: nn.Module) -> Iterator[nn.Module]:
    """Each block of a transformer by itself, since equal ones are compiled once; other encoders
    whole; and heads that are a sequence of layers. Losses are left out, which read schedules that
    change in every step, and heads of patches, whose number does."""
    for module in method.modules():
        is_block = isinstance(module, block_kinds())
        is_whole = isinstance(module, Encoder) and not module.config.is_vit
        if is_block or is_whole:
            yield module
    yield from (module for module in method.children() if type(module) is nn.Sequential)


class SkippedPath(nn.Module):
    """Stochastic depth whose probability is a tensor: a number would be compiled into the kernels,
    and each block of a ViT has another."""

    def __init__(self, probability: float, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("kept", torch.tensor(1 - probability, device=device), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """Each image's values [B, ...] as they are over the probability to be kept, or zero."""
        if not self.training:
            return values
        kept = self.get_buffer("kept")
        shape = [len(values)] + [1] * (values.ndim - 1)
        stays = torch.rand(shape, device=values.device) < kept
        return values * (stays / kept).to(values.dtype)


def _probabilities_as_tensors(part: nn.Module, device: torch.device) -> None:
    from timm.layers import DropPath

    for module in part.modules():
        for name, child in module.named_children():
            if isinstance(child, DropPath) and child.drop_prob:
                setattr(module, name, SkippedPath(child.drop_prob, device).train(child.training))


def _or_plain(module: nn.Module, backend: str) -> Callable[..., Any]:
    """The module's call, compiled at its first use for each shape."""
    from torch._dynamo.exc import TorchDynamoException  # seconds, for those who compile alone

    compiled = torch.compile(module._call_impl, dynamic=False, backend=backend)

    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return compiled(*arguments, **named)
        except TorchDynamoException as error:
            log.warning(
                "compile: %s cannot be compiled and runs as it is: %s",
                type(module).__name__,
                _first_line(error),
            )
            module._compiled_call_impl = None
            return module._call_impl(*arguments, **named)

    return call


def _why_not(device: torch.device, backend: str) -> str | None:
    """Why the compiler cannot make even a small kernel for this device; None where it can."""
    try:
        torch.compile(_small, dynamic=False, backend=backend)(torch.ones(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        return _first_line(error)
    return None


def _small(values: Tensor) -> Tensor:
    return (values * 2).relu() + 1


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
