"""Batch norm over groups of a worker's batch: imitates several GPUs in one process."""

from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Module = TypeVar("Module", bound=nn.Module)


class GroupedBatchNorm(_BatchNorm):
    """In training, normalises each of `groups` equal parts of a batch by its own statistics.
    Running statistics are means over the groups. Parameters and buffers have the names of
    nn.BatchNorm."""

    groups: int = 1

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.groups == 1:
            return super().forward(input)
        rows, channels = input.shape[:2]
        if rows % self.groups or rows < 2 * self.groups:
            raise ValueError(
                f"method.batchnorm_groups {self.groups}: a worker's micro-batch of {rows} images "
                "does not divide into that many groups of two or more: give another --batch-size "
                "or --workers"
            )
        # [G * m, C, ...] -> [m, G * C, ...]: each group has its own copy of the channels.
        parts = input.unflatten(0, (self.groups, -1)).transpose(0, 1).flatten(1, 2)
        mean, variance = self.running_mean, self.running_var
        means = None if mean is None else mean.repeat(self.groups)
        variances = None if variance is None else variance.repeat(self.groups)
        normal = F.batch_norm(
            parts,
            means,
            variances,
            None if self.weight is None else self.weight.repeat(self.groups),
            None if self.bias is None else self.bias.repeat(self.groups),
            training=True,
            momentum=cast(float, self.momentum),
            eps=self.eps,
        )
        if mean is not None and means is not None:
            mean.copy_(means.view(self.groups, channels).mean(0))
        if variance is not None and variances is not None:
            variance.copy_(variances.view(self.groups, channels).mean(0))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return normal.unflatten(1, (self.groups, channels)).transpose(0, 1).flatten(0, 1)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm needs at least 2 dimensions, got {input.dim()}")


class GroupedBatchNormAct(GroupedBatchNorm):
    """GroupedBatchNorm for timm's fused batch norm, dropout and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def with_grouped_batchnorm(module: Module, groups: int) -> Module:
    """Replace every batch norm inside a module, in place, by one over `groups` parts of the
    batch."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, _grouped(child, groups))
        else:
            with_grouped_batchnorm(child, groups)
    return module


def _grouped(norm: _BatchNorm, groups: int) -> GroupedBatchNorm:
    fused = hasattr(norm, "act")  # the only mark of timm's BatchNormAct2d
    twin = (GroupedBatchNormAct if fused else GroupedBatchNorm)(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    twin.groups = groups
    if fused:
        twin.drop, twin.act = norm.drop, norm.act  # type: ignore[assignment]
    twin.to(next((p.device for p in norm.parameters()), torch.device("cpu")))
    twin.load_state_dict(norm.state_dict())
    return twin
