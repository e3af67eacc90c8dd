"""A codebook that turns features into discrete tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray import distributed


class Quantizer(nn.Module):
    """Maps each feature to the nearest of K unit vectors (codes), by cosine.

    van den Oord et al., arXiv:1711.00937. Codes are moving averages of the features assigned to
    them (appendix A.1), without gradient. They are unit vectors of few dimensions, so that more of
    them are used (Yu et al., arXiv:2110.04627). A code that gets hardly any features is replaced by
    one.
    """

    def __init__(self, inputs: int, codes: int, code_width: int) -> None:
        super().__init__()
        self.project = nn.Linear(inputs, code_width)
        self.register_buffer("codes", F.normalize(torch.randn(codes, code_width), dim=-1))  # [K, C]
        self.register_buffer("usage", torch.zeros(codes))  # [K], running share of the features
        # Like usage, but reset when a code is replaced. Starts at zero: the first step replaces
        # all.
        self.register_buffer("activity", torch.zeros(codes))  # [K]

    def embed(self, features: Tensor) -> Tensor:
        """Features [..., D] -> float32 unit vectors [..., C]."""
        return F.normalize(self.project(features).float(), dim=-1)

    def tokens(self, embedded: Tensor) -> Tensor:
        """Unit vectors [..., C] -> indices of the nearest codes, int64 [...]."""
        codes, rows = self.get_buffer("codes"), embedded.flatten(0, -2)
        # In bf16 near codes tie: an eighth of the tokens would differ (measured).
        with torch.autocast(rows.device.type, enabled=False):
            # In parts: all cosines of a large batch and a large codebook take gigabytes.
            nearest = [(part.float() @ codes.T).argmax(-1) for part in rows.split(ROWS_AT_A_TIME)]
        return torch.cat(nearest).view(embedded.shape[:-1])

    def lookup(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [...] -> codes float32 [..., C]."""
        return self.get_buffer("codes")[tokens]

    @torch.no_grad()
    def follow(self, embedded: Tensor, momentum: float, seed: int) -> None:
        """Move the codes towards the means of the features that the global batch assigns to them.

        Args:
            embedded: this rank's unit vectors [n, C] of one step.
            momentum: the share of codes and usage that is kept.
            seed: for drawing features that replace unused codes; the same on all ranks.
        """
        codes, usage = self.get_buffer("codes"), self.get_buffer("usage")
        activity = self.get_buffer("activity")
        count = len(embedded) * distributed.world_size()
        tokens = self.tokens(embedded)  # [n]
        # Not bincount: on a GPU it reads the largest token, and the host waits.
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
        """K random features of the global batch, one per code: [K, C], the same on every rank."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(count, (len(self.get_buffer("codes")),), generator=generator)
        place = chosen.to(embedded.device, non_blocking=True) - distributed.rank() * len(embedded)
        is_mine = (place >= 0) & (place < len(embedded))
        rows = embedded[place.clamp(0, len(embedded) - 1)] * is_mine[:, None]
        return distributed.sum_over_ranks(rows)

    def health(self) -> dict[str, Tensor]:
        """How much of the codebook is used, as scalars.

        codebook_use: the share of codes that get at least a tenth of an equal share.
        codebook_perplexity: exp of the entropy of the usage, 1 at collapse, K if all are equal.
        """
        usage = self.get_buffer("usage")
        shares = usage / usage.sum().clamp_min(1e-12)
        entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
        in_use = (shares > 0.1 / len(shares)).float().mean()
        return {"codebook_use": in_use, "codebook_perplexity": entropy.exp() * (usage.sum() > 0)}


ROWS_AT_A_TIME = 16_384
IDLE = 0.03
"""A code that gets less than this part of an equal share of the features is replaced."""
