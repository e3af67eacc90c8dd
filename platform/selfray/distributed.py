"""Communication among ranks. In a single process each function is a no-op or plain computation."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:  # takes a second to import, and most processes are not a rank
    from torch.distributed.tensor import DTensor


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set on any rank. Collective: every rank must call it, all get the
    answer."""
    if not is_distributed():
        return flag
    raised = torch.tensor(float(flag), device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


class _Gather(torch.autograd.Function):
    """Concatenation over ranks; its gradient is summed over ranks.

    Each rank computes a loss from the gathered tensor, so a local tensor's gradient is the sum over
    the losses of all ranks. DDP then divides by the world size: the result is the gradient of the
    mean of the ranks' losses, as in one process.
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
    """Concatenate [b, ...] of all ranks in rank order to [W*b, ...] on each; differentiable."""
    if not is_distributed():
        return local
    return cast(Tensor, _Gather.apply(local))


@torch.no_grad()
def shuffled(local: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Shuffle the rows of all ranks: (this rank's new rows [b, ...], order int64 [B]).

    MoCo's shuffle-BN: a key's batch norm must not see the same images as its query's, or its
    statistics would reveal the positive (arXiv:1911.05722, section 3.3). The order follows from the
    seed, which all ranks share; `unshuffled` takes it. A single process has one batch norm, so
    nothing is shuffled.
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
    """The inverse of `shuffled`: this rank's own rows [b, ...] in their first order."""
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
    """The sum over ranks, of the same shape; differentiable: gradients are summed over ranks
    too."""
    return cast(Tensor, _SumOverRanks.apply(local)) if is_distributed() else local


def _is_dtensor(values: Any) -> "TypeGuard[DTensor]":
    if not (dist.is_available() and dist.is_initialized()):
        return False  # a single process has no sharded tensors
    from torch.distributed.tensor import DTensor

    return isinstance(values, DTensor)


def whole(values: Tensor) -> Tensor:
    """The full tensor of a DTensor (sharded or partial); other tensors unchanged. Collective: every
    rank must call it."""
    return values.full_tensor() if _is_dtensor(values) else values


def own_part(values: Tensor) -> Tensor:
    """This rank's shard of a DTensor; other tensors unchanged."""
    return values.to_local() if _is_dtensor(values) else values


def gathered(state: Any) -> Any:
    """A nested state with full tensors; those that were sharded lie in the host's memory.
    Collective: every rank must call it."""
    if _is_dtensor(state):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        return {name: gathered(item) for name, item in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(item) for item in state)
    return state


def shared_out(values: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor, the same on all ranks, in the way `like` is sharded; unchanged if `like`
    is not sharded."""
    if not _is_dtensor(like) or values.shape != like.shape:
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values.to(like.device), like.device_mesh, like.placements)


BUCKET_BYTES = 2**26


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over ranks, as DDP does. All ranks must have gradients for
    the same parameters."""
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
    """The elementwise maximum over ranks (no gradient)."""
    if is_distributed():
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


class GlobalBatchNorm(_BatchNorm):
    """Batch norm with the statistics of the global batch; plain batch norm in a single process.

    torch's SyncBatchNorm refuses CPU tensors, so distributed training could not be tested without
    a GPU. On the CPU this class computes the same from differentiable sums. It does not subclass
    SyncBatchNorm, because DDP refuses that on the CPU. Parameters and buffers have the names of
    nn.BatchNorm, so checkpoints fit both.
    """

    process_group = None  # read by SyncBatchNorm.forward; None means all ranks
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
        # Two passes: E[x^2] - E[x]^2 loses digits, and the equality tests would fail.
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
    """GlobalBatchNorm for timm's fused batch norm, dropout and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


Module = TypeVar("Module", bound=nn.Module)


def with_global_batchnorm(module: Module) -> Module:
    """Replace every batch norm inside a module, in place, by a GlobalBatchNorm."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, GlobalBatchNorm):
            setattr(module, name, _global_twin(child))
        else:
            with_global_batchnorm(child)
    return module


def _global_twin(norm: _BatchNorm) -> GlobalBatchNorm:
    fused = hasattr(norm, "act")  # the only mark of timm's BatchNormAct2d
    twin = (GlobalBatchNormAct if fused else GlobalBatchNorm)(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    if fused:
        twin.drop, twin.act = norm.drop, norm.act  # type: ignore[assignment]
    twin.load_state_dict(norm.state_dict())
    for ours, theirs in zip(twin.parameters(), norm.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)  # a teacher stays frozen
    return twin
