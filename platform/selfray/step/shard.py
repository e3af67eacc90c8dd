"""FSDP2: weights, gradients and the optimizer's state shared out among ranks.

A rank holds its share of every weight and gathers those of one transformer block at a time, while
that block computes: student and teacher alike. Everything else of the method, such as heads, is
gathered for the whole step.
"""

import warnings
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from selfray.method import ComparingMethod, Method
from selfray.models.encoder import Encoder
from selfray.models.vit import block_kinds

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def in_place(method: Method, precision: str) -> None:
    """Shard a method's weights over all ranks; every rank must hold the same ones."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("shard fsdp needs several workers: give --workers 2 or more")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.fsdp import register_fsdp_forward_method as makes_forward

    mesh = init_device_mesh(next(method.parameters()).device.type, (dist.get_world_size(),))
    # Gathered in bf16, half as much; what autocast keeps in float32 computes with their copy.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    # It warns of what nothing here does: writing into an encoder's output.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for module in method.modules():
        if isinstance(module, block_kinds()):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in method.modules():
        if isinstance(module, Encoder):
            # A group of its own, since probes and figures of health ask the encoder alone.
            fully_shard(module, mesh=mesh)
    fully_shard(method, mesh=mesh)
    if isinstance(method, ComparingMethod):
        for name in ("embed", "targets", "compare"):
            makes_forward(method, name)


def is_sharded(method: nn.Module) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(method, FSDPModule)


def sync(method: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass averages gradients over ranks."""
    cast("FSDPModule", method).set_requires_gradient_sync(wanted)
