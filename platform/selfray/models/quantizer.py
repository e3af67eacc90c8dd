"""A codebook that turns features into discrete tokens."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray import distributed


class Quantizer(nn.Module):
    """The nearest of K unit vectors to each feature, by cosine.

    van den Oord et al., arXiv:1711.00937, with codes that follow the features assigned to them
    (appendix A.1) instead of a gradient, and unit codes of few dimensions, of which more are used
    (Yu et al., arXiv:2110.04627). A code that hardly any feature comes to is moved onto a feature.
    """

    def __init__(self, inputs: int, codes: int, code_width: int) -> None:
        super().__init__()
        self.project = nn.Linear(inputs, code_width)
        self.register_buffer("codes", F.normalize(torch.randn(codes, code_width), dim=-1))  # [K, C]
        # Zero: every code is moved onto a feature in the first step.
        self.register_buffer("usage", torch.zeros(codes))  # [K], running share of the features

    def embed(self, features: Tensor) -> Tensor:
        """[..., D] -> unit vectors [..., C]."""
        return F.normalize(self.project(features).float(), dim=-1)

    def tokens(self, embedded: Tensor) -> Tensor:
        """Unit vectors [..., C] -> the nearest codes' numbers, int64 [...]."""
        return (embedded @ self.get_buffer("codes").T).argmax(-1)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Codes [..., C] of tokens [...]."""
        return self.get_buffer("codes")[tokens]

    @torch.no_grad()
    def follow(self, embedded: Tensor, momentum: float, seed: int) -> None:
        """Move the codes towards what the global batch assigns to them.

        Args:
            embedded: this rank's unit vectors [n, C] of one step.
            momentum: how much of codes and usage stays.
            seed: of the choice of features for unused codes, the same on all ranks.
        """
        codes, usage = self.get_buffer("codes"), self.get_buffer("usage")
        everyone = cast(Tensor, distributed.gather(embedded.contiguous()))  # [n * W, C]
        assigned = F.one_hot(self.tokens(everyone), len(codes)).to(everyone.dtype)  # [n * W, K]
        counts = assigned.sum(0)  # [K]
        means = F.normalize(assigned.T @ everyone, dim=-1)  # [K, C]
        moved = F.normalize(torch.lerp(means, codes, momentum), dim=-1)
        codes.copy_(torch.where(counts[:, None] > 0, moved, codes))
        usage.lerp_(counts / len(everyone), 1 - momentum)
        idle = usage < IDLE / len(codes)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(everyone), (len(codes),), generator=generator)
        codes.copy_(torch.where(idle[:, None], everyone[chosen.to(everyone.device)], codes))
        usage.masked_fill_(idle, 1 / len(codes))

    def health(self) -> dict[str, Tensor]:
        """How much of the codebook is in use: the share of codes that get at least a tenth of an
        equal part, and exp of the entropy of the usage (1 at collapse, K where all are equal)."""
        usage = self.get_buffer("usage")
        shares = usage / usage.sum().clamp_min(1e-12)
        entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
        in_use = (shares > 0.1 / len(shares)).float().mean()
        return {"codebook_use": in_use, "codebook_perplexity": entropy.exp() * (usage.sum() > 0)}


IDLE = 0.03
"""A code with less than this part of an equal share of the features is moved."""
