"""Compiles a method's parts by torch.compile, in place, so that weights keep their names."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfray import caches
from selfray.models.encoder import Encoder
from selfray.models.vit import block_kinds

log = logging.getLogger(__name__)

VARIANTS = 64
"""Largest number of compilations of a function: one for each kind of module, crop size, student and
teacher. All modules share one torch function, whose default limit of 8 would be too low."""


def in_place(method: nn.Module, device: torch.device, backend: str = "inductor") -> None:
    """Compile the parts in which a step spends its time. If a compiler is missing or fails, a
    one-line warning is logged and the part runs uncompiled."""
    _keep_code_privately()
    cause = _why_not(device, backend)
    if cause is not None:
        log.warning("compile: impossible on this machine, the run continues uncompiled: %s", cause)
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for module in parts(method):
        if module._compiled_call_impl is None:
            _probabilities_as_tensors(module, device)
            module._compiled_call_impl = _or_plain(module, backend)


def parts(method: nn.Module) -> Iterator[nn.Module]:
    """The modules to compile: each transformer block by itself, since equal blocks are compiled
    once; other encoders as a whole; and heads that are a sequence of layers. Losses are left out,
    because they read schedules that change in every step, and patch heads, because the number of
    patches changes."""
    for module in method.modules():
        is_block = isinstance(module, block_kinds())
        is_whole = isinstance(module, Encoder) and not module.config.is_vit
        if is_block or is_whole:
            yield module
    yield from (module for module in method.children() if type(module) is nn.Sequential)


class SkippedPath(nn.Module):
    """Stochastic depth with its probability in a tensor. A Python number would be compiled into the
    kernels, and each block of a ViT has a different one."""

    def __init__(self, probability: float, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("kept", torch.tensor(1 - probability, device=device), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """Zero each image's values [B, ...] at random; divide the others by the probability to keep
        them."""
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
    """The module's call, compiled at its first use for each shape; uncompiled if that fails."""
    from torch._dynamo.exc import TorchDynamoException  # takes seconds: only if compile is on

    compiled = torch.compile(module._call_impl, dynamic=False, backend=backend)

    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return compiled(*arguments, **named)
        except TorchDynamoException as error:
            log.warning(
                "compile: %s cannot be compiled and runs uncompiled: %s",
                type(module).__name__,
                _first_line(error),
            )
            module._compiled_call_impl = None
            return module._call_impl(*arguments, **named)

    return call


def _keep_code_privately() -> None:
    """Make torch cache compiled code, and Triton's, in a folder that only this user can write to.
    Its default is a folder with a predictable name in the temporary folder, where another user
    could place code."""
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    folders = [Path(named)] if named else []
    folders += [choice / "torch" for choice in caches.choices()]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(caches.private(iter(folders)))


def _why_not(device: torch.device, backend: str) -> str | None:
    """Why the compiler cannot even compile a small kernel for this device; None if it can."""
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
