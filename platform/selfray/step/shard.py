"""FSDP2: weights, gradients and the optimizer's state sharded over ranks.

A rank holds a shard of every weight. It gathers the weights of one transformer block at a time,
while that block computes, in student and teacher. The other weights of the method, such as heads,
are gathered for the whole step.
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
    """Shard a method's weights over all ranks, in place; all ranks must have equal weights before.
    Raises ValueError in a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("shard fsdp needs several workers: give --workers 2 or more")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.fsdp import register_fsdp_forward_method as makes_forward

    mesh = init_device_mesh(next(method.parameters()).device.type, (dist.get_world_size(),))
    # Under bf16, weights are gathered in bf16, which halves the traffic; operations that autocast
    # keeps in float32 compute with that copy.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    # FSDP2 warns about in-place writes into an encoder's output; selfray makes none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for module in method.modules():
        if isinstance(module, block_kinds()):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in method.modules():
        if isinstance(module, Encoder):
            # A separate group, because probes and health figures call the encoder alone.
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
    """Set whether the next backward pass averages gradients over ranks."""
    cast("FSDPModule", method).set_requires_gradient_sync(wanted)
