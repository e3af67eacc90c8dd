"""Heads that are added to an encoder for pretraining and dropped afterwards."""

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray import distributed

LastBatchNorm = Literal["affine", "scaled", "plain", "none"]


class Scale(nn.Module):
    """A learned factor on each column of [n, width], initially 1: a batch norm's affine part
    without bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.weight


def projector(
    width: int,
    hidden: int,
    output: int,
    layers: int,
    last_batchnorm: LastBatchNorm = "affine",
    last_bias: bool = True,
) -> nn.Sequential:
    """An MLP [n, width] -> [n, output] of `layers` linear layers, with batch norm and ReLU between.

    Linear layers before a batch norm have no bias, and no ReLU follows the last layer. The last
    batch norm is `scaled` (weight, no bias) in SimCLR's code (arXiv:2002.05709; v2's deeper head:
    arXiv:2006.10029), `plain` (neither) in MoCo v3 (arXiv:2104.02057), and absent (`none`) in BYOL
    (arXiv:2006.07733), whose last linear layer has a bias only with `last_bias`.

    Linear layers have PyTorch's initialisation. SimCLR's authors draw from a normal of deviation
    0.01 and BYOL's from a truncated one of 1 / sqrt(inputs). The difference has no effect: before a
    batch norm or a cosine the scale of a layer cancels, and LARS scales its steps with the weights.
    """
    widths = [width, *[hidden] * (layers - 1), output]
    modules: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        is_last = index == layers - 1
        if is_last and last_batchnorm == "none":
            modules.append(nn.Linear(inputs, outputs, bias=last_bias))
            continue
        affine = not is_last or last_batchnorm == "affine"
        modules += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs, affine=affine)]
        if is_last and last_batchnorm == "scaled":
            modules.append(Scale(outputs))
        if not is_last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)


class PrototypeHead(nn.Module):
    """DINO's head: three linear layers with GELU, L2 normalisation, then K unit prototypes.

    Caron et al., arXiv:2104.14294, appendix C. With `free_norms` each prototype has a trained norm;
    the paper finds unit norms more stable.
    """

    def __init__(
        self, width: int, hidden: int, bottleneck: int, prototypes: int, free_norms: bool = False
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # PyTorch's initialisation, as in the authors' code: a norm of 0.58. Only directions matter
        # for the output, but an optimizer's step turns a longer vector less.
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)
        self.norms = (
            nn.Parameter(self.prototypes.weight.new_ones(prototypes)) if free_norms else None
        )

    def freeze_prototypes(self) -> None:
        """Drop the prototypes' gradients of this step, so that the optimizer does not change
        them."""
        self.prototypes.weight.grad = None
        if self.norms is not None:
            self.norms.grad = None

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, D] -> float32 logits [n, K]: cosines to each prototype (times its norm)."""
        embedded = F.normalize(self.mlp(features).float(), dim=-1)  # [n, bottleneck]
        logits = F.linear(embedded, F.normalize(self.prototypes.weight.float(), dim=-1))
        return logits if self.norms is None else logits * self.norms


class Centering(nn.Module):
    """A teacher's softmax of logits minus their running mean over all ranks. Without the centring
    one prototype would dominate (DINO, arXiv:2104.14294, section 3.1)."""

    def __init__(self, prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))  # [K]
        self._seen: list[tuple[Tensor, int]] = []

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """Logits [..., K] -> probabilities [..., K]."""
        rows = logits.float().flatten(0, -2)  # [n, K]
        self._seen.append((rows.sum(0), len(rows)))
        return ((logits.float() - self.get_buffer("center")) / temperature).softmax(-1)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the centre towards the mean of all logits of this step, over all ranks."""
        center = self.get_buffer("center")
        total = torch.stack([rows for rows, _ in self._seen]).sum(0)
        count = torch.full_like(total[:1], sum(count for _, count in self._seen))  # [1]
        self._seen.clear()
        total, count = distributed.sum_over_ranks(total), distributed.sum_over_ranks(count)
        mean = torch.where(count > 0, total / count.clamp_min(1), center)
        center.lerp_(mean, 1 - self.momentum)
