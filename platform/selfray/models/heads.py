"""Heads that are put on an encoder while it is pretrained, and dropped afterwards."""

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray import distributed

LastBatchNorm = Literal["affine", "scaled", "plain", "none"]


class Scale(nn.Module):
    """A factor on each of [n, width]'s columns, 1 at the start: what is left of a batch norm's
    affine part without its bias."""

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
    """`layers` linear layers, batch norm after each, ReLU between; no bias where a batch norm
    follows, no ReLU after the last.

    The last batch norm is `scaled` (a weight, no bias) in SimCLR's code (arXiv:2002.05709; v2's
    deeper head: arXiv:2006.10029), `plain` (neither) in MoCo v3 (arXiv:2104.02057), and absent in
    BYOL (arXiv:2006.07733), whose last linear layer has a bias with `last_bias` alone.

    The linear layers are drawn as PyTorch draws them. SimCLR's authors draw a normal of deviation
    0.01 and BYOL's a truncated one of 1 / sqrt(inputs): before a batch norm, or under a cosine,
    the scale of a layer changes nothing, and LARS's steps follow it.
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

    Caron et al., arXiv:2104.14294, appendix C. With `free_norms` each prototype has a length of its
    own that is trained; the paper finds that unit ones are more stable.
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
        # Drawn as PyTorch draws a linear layer, as the authors' are: a length of 0.58. Their
        # directions alone count, but an optimizer's step turns longer ones less.
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)
        self.norms = (
            nn.Parameter(self.prototypes.weight.new_ones(prototypes)) if free_norms else None
        )

    def freeze_prototypes(self) -> None:
        """Drop this step's gradients of the prototypes: the optimizer leaves them as they are."""
        self.prototypes.weight.grad = None
        if self.norms is not None:
            self.norms.grad = None

    def forward(self, features: Tensor) -> Tensor:
        """[n, D] -> logits [n, K], cosines between an image and each prototype (times its norm)."""
        embedded = F.normalize(self.mlp(features).float(), dim=-1)  # [n, bottleneck]
        logits = F.linear(embedded, F.normalize(self.prototypes.weight.float(), dim=-1))
        return logits if self.norms is None else logits * self.norms


class Centering(nn.Module):
    """A teacher's softmax, of its logits minus their running mean over all ranks: without it one
    prototype would win everywhere (DINO, arXiv:2104.14294, section 3.1)."""

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
        """Move the centre towards the mean of all logits of the step."""
        center = self.get_buffer("center")
        total = torch.stack([rows for rows, _ in self._seen]).sum(0)
        count = torch.full_like(total[:1], sum(count for _, count in self._seen))  # [1]
        self._seen.clear()
        total, count = distributed.sum_over_ranks(total), distributed.sum_over_ranks(count)
        mean = torch.where(count > 0, total / count.clamp_min(1), center)
        center.lerp_(mean, 1 - self.momentum)
