"""A codebook that turns features into discrete tokens."""

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
        self.register_buffer("usage", torch.zeros(codes))  # [K], running share of the features
        # The same, but started anew where a code is moved. Zero: all are, in the first step.
        self.register_buffer("activity", torch.zeros(codes))  # [K]

    def embed(self, features: Tensor) -> Tensor:
        """[..., D] -> unit vectors [..., C]."""
        return F.normalize(self.project(features).float(), dim=-1)

    def tokens(self, embedded: Tensor) -> Tensor:
        """Unit vectors [..., C] -> the nearest codes' numbers, int64 [...]."""
        codes, rows = self.get_buffer("codes"), embedded.flatten(0, -2)
        # In bf16 near codes tie: an eighth of the tokens would be others (measured).
        with torch.autocast(rows.device.type, enabled=False):
            # In parts: all cosines of a large batch with a large codebook take gigabytes.
            nearest = [(part.float() @ codes.T).argmax(-1) for part in rows.split(ROWS_AT_A_TIME)]
        return torch.cat(nearest).view(embedded.shape[:-1])

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
        activity = self.get_buffer("activity")
        count = len(embedded) * distributed.world_size()
        tokens = self.tokens(embedded)  # [n]
        # Not bincount, which on a GPU asks for the largest token and waits.
        assigned = torch.zeros_like(usage).index_add_(0, tokens, usage.new_ones(len(tokens)))
        assigned = distributed.sum_over_ranks(assigned)  # [K]
        sums = distributed.sum_over_ranks(torch.zeros_like(codes).index_add_(0, tokens, embedded))
        moved = F.normalize(torch.lerp(F.normalize(sums, dim=-1), codes, momentum), dim=-1)
        codes.copy_(torch.where(assigned[:, None] > 0, moved, codes))
        usage.lerp_(assigned / count, 1 - momentum)
        activity.lerp_(assigned / count, 1 - momentum)
        idle = activity < IDLE / len(codes)
        codes.copy_(torch.where(idle[:, None], self._drawn(embedded, count, seed), codes))
        activity.masked_fill_(idle, 1 / len(codes))

    def _drawn(self, embedded: Tensor, count: int, seed: int) -> Tensor:
        """A feature of the global batch for each code, drawn at random: [K, C] on every rank."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(count, (len(self.get_buffer("codes")),), generator=generator)
        place = chosen.to(embedded.device, non_blocking=True) - distributed.rank() * len(embedded)
        is_mine = (place >= 0) & (place < len(embedded))
        rows = embedded[place.clamp(0, len(embedded) - 1)] * is_mine[:, None]
        return distributed.sum_over_ranks(rows)

    def health(self) -> dict[str, Tensor]:
        """How much of the codebook is in use: the share of codes that get at least a tenth of an
        equal part, and exp of the entropy of the usage (1 at collapse, K where all are equal)."""
        usage = self.get_buffer("usage")
        shares = usage / usage.sum().clamp_min(1e-12)
        entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
        in_use = (shares > 0.1 / len(shares)).float().mean()
        return {"codebook_use": in_use, "codebook_perplexity": entropy.exp() * (usage.sum() > 0)}


ROWS_AT_A_TIME = 16_384
IDLE = 0.03
"""A code with less than this part of an equal share of the features is moved."""
