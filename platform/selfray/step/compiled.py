"""torch.compile of a method's parts, in place, so that the names of the weights stay."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.models.beit import Block as BeitBlock
from timm.models.vision_transformer import Block
from torch import nn

from selfray.models.encoder import Encoder

log = logging.getLogger(__name__)


def in_place(method: nn.Module, device: torch.device) -> None:
    """Compile what a step spends its time in. A compiler that is missing or fails is told in one
    line, and the part runs as it is."""
    cause = _why_not(device)
    if cause is not None:
        log.warning("compile: this machine cannot, so the run goes on without: %s", cause)
        return
    for module in parts(method):
        if module._compiled_call_impl is None:
            module._compiled_call_impl = _or_plain(module)


def parts(method: nn.Module) -> Iterator[nn.Module]:
    """Each block of a transformer by itself, since equal ones are compiled once; other encoders
    whole; and heads that are a sequence of layers. Losses are left out, which read schedules that
    change in every step, and heads of patches, whose number does."""
    for module in method.modules():
        is_block = isinstance(module, Block | BeitBlock)
        is_whole = isinstance(module, Encoder) and not module.config.is_vit
        if is_block or is_whole:
            yield module
    yield from (module for module in method.children() if type(module) is nn.Sequential)


def _or_plain(module: nn.Module) -> Callable[..., Any]:
    """The module's call, compiled at its first use for each shape."""
    compiled = torch.compile(module._call_impl, dynamic=False)

    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return compiled(*arguments, **named)
        except torch._dynamo.exc.TorchDynamoException as error:
            log.warning(
                "compile: %s cannot be compiled and runs as it is: %s",
                type(module).__name__,
                _first_line(error),
            )
            module._compiled_call_impl = None
            return module._call_impl(*arguments, **named)

    return call


def _why_not(device: torch.device) -> str | None:
    """Why the compiler cannot make even a small kernel for this device; None where it can."""
    try:
        torch.compile(_small, dynamic=False)(torch.ones(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        return _first_line(error)
    return None


def _small(values: torch.Tensor) -> torch.Tensor:
    return (values * 2).relu() + 1


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
