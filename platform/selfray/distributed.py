"""What ranks do together. Everything here is a no-op, or the plain computation, in one process."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:  # a second, and most processes are no rank
    from torch.distributed.tensor import DTensor


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether a flag is up on any rank; all ranks must ask, and get the same answer."""
    if not is_distributed():
        return flag
    raised = torch.tensor(float(flag), device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


class _Gather(torch.autograd.Function):
    """Concatenation over ranks whose gradient is summed over ranks.

    Each rank computes a loss from what was gathered, so a local tensor's gradient is the sum of
    what every rank's loss says of it. DDP then divides by the world size: the result is the
    gradient of the mean of the ranks' losses, as in one process.
    """

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:  # type: ignore[override]
        ctx.rows = local.shape[0]
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:  # type: ignore[override]
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        first = rank() * ctx.rows
        return total[first : first + ctx.rows]


def gather(local: Tensor) -> Tensor:
    """[b, ...] of each rank -> [W*b, ...] on every rank, in rank order, differentiable."""
    if not is_distributed():
        return local
    return cast(Tensor, _Gather.apply(local))


@torch.no_grad()
def shuffled(local: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """All ranks' rows dealt out anew: ([b, ...] for this rank, the order [B] for `unshuffled`).

    MoCo's shuffle-BN: a key's batch norm must not see the same images as its query's, or the
    statistics would give the answer away (arXiv:1911.05722, section 3.3). The order follows from
    the seed, which all ranks share. One process has one batch norm and nothing to shuffle.
    """
    count = local.shape[0]
    if not is_distributed():
        return local, torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count * world_size(), generator=generator)
    mine = order[rank() * count : (rank() + 1) * count].to(local.device, non_blocking=True)
    return gather(local)[mine], order


@torch.no_grad()
def unshuffled(local: Tensor, order: Tensor) -> Tensor:
    """The inverse of `shuffled`: this rank's own rows [b, ...] again, in their own order."""
    if not is_distributed():
        return local
    count = local.shape[0]
    mine = order.argsort()[rank() * count : (rank() + 1) * count]
    return gather(local)[mine.to(local.device, non_blocking=True)]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:  # type: ignore[override]
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:  # type: ignore[override]
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(local: Tensor) -> Tensor:
    """The sum over ranks, differentiable: each rank's gradient is the sum of all ranks'."""
    return cast(Tensor, _SumOverRanks.apply(local)) if is_distributed() else local


def _is_shared_out(values: Any) -> "TypeGuard[DTensor]":
    if not (dist.is_available() and dist.is_initialized()):
        return False  # without ranks there is nobody to share with
    from torch.distributed.tensor import DTensor

    return isinstance(values, DTensor)


def whole(values: Tensor) -> Tensor:
    """A tensor that is shared out among ranks, or a number that each has a part of, as one: all
    ranks must ask. Others as they are."""
    return values.full_tensor() if _is_shared_out(values) else values


def own_part(values: Tensor) -> Tensor:
    """This rank's share of a tensor that is shared out; others as they are."""
    return values.to_local() if _is_shared_out(values) else values


def gathered(state: Any) -> Any:
    """A nested state with whole tensors: those that are shared out, in the host's memory. All ranks
    must ask."""
    if _is_shared_out(state):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        return {name: gathered(item) for name, item in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(item) for item in state)
    return state


def shared_out(values: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks, as the share of it that `like` is; as it is where that
    is whole too."""
    if not _is_shared_out(like) or values.shape != like.shape:
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values.to(like.device), like.device_mesh, like.placements)


BUCKET_BYTES = 2**26


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Every gradient becomes its mean over ranks, as DDP would make it; all ranks must have the
    same ones."""
    if not is_distributed():
        return
    bucket: list[Tensor] = []
    gradients = [p.grad for p in parameters if p.grad is not None]
    for index, gradient in enumerate(gradients):
        bucket.append(gradient)
        if index == len(gradients) - 1 or sum(g.nbytes for g in bucket) >= BUCKET_BYTES:
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            parts = (flat / world_size()).split([g.numel() for g in bucket])
            means = [part.view_as(g) for part, g in zip(parts, bucket, strict=True)]
            torch._foreach_copy_(bucket, means)
            bucket = []


@torch.no_grad()
def max_over_ranks(value: Tensor) -> Tensor:
    """The largest value on any rank (no gradient)."""
    if is_distributed():
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


class GlobalBatchNorm(_BatchNorm):
    """Batch norm with the statistics of the global batch; the plain one in a single process.

    torch's SyncBatchNorm refuses CPU tensors, so nothing distributed could be proven without a
    GPU: on the CPU this computes the same from differentiable sums. No subclass of SyncBatchNorm,
    because DDP refuses those on the CPU. Parameters and buffers bear the names of nn.BatchNorm, so
    checkpoints fit either.
    """

    process_group = None  # what SyncBatchNorm.forward looks for: all ranks
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        shared = self.training and is_distributed()
        if shared and not input.is_cuda:
            return self._forward_from_sums(input)
        if shared:
            return nn.SyncBatchNorm.forward(cast(nn.SyncBatchNorm, self), input)
        return _BatchNorm.forward(self, input)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm needs at least 2 dimensions, got {input.dim()}")

    def _forward_from_sums(self, input: Tensor) -> Tensor:
        axes = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        values = input.float()
        count = values.numel() / values.shape[1] * world_size()
        mean = sum_over_ranks(values.sum(axes)) / count  # [C]
        centered = values - mean.view(shape)
        # Two passes: E[x^2] - E[x]^2 loses the digits that the equality tests ask for.
        variance = sum_over_ranks(centered.square().sum(axes)) / count  # [C]
        if self.track_running_stats and self.running_mean is not None:
            self._update_running(mean.detach(), variance.detach() * count / (count - 1))
        output = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


class GlobalBatchNormAct(GlobalBatchNorm):
    """The same for timm's fused batch norm, dropout and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


Module = TypeVar("Module", bound=nn.Module)


def with_global_batchnorm(module: Module) -> Module:
    """Replace every batch norm inside a module by the one that is shared among ranks."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, GlobalBatchNorm):
            setattr(module, name, _global_twin(child))
        else:
            with_global_batchnorm(child)
    return module


def _global_twin(norm: _BatchNorm) -> GlobalBatchNorm:
    fused = hasattr(norm, "act")  # timm's BatchNormAct2d is known by nothing else
    twin = (GlobalBatchNormAct if fused else GlobalBatchNorm)(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    if fused:
        twin.drop, twin.act = norm.drop, norm.act  # type: ignore[assignment]
    twin.load_state_dict(norm.state_dict())
    for ours, theirs in zip(twin.parameters(), norm.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)  # a teacher stays frozen
    return twin
