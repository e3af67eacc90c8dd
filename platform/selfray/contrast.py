"""Cross entropy over cosines of all pairs, in blocks: memory grows with rows, not with pairs.

The logits of a block of rows are computed, used and freed, and computed again in the backward pass.
The gradient has a closed form: for logits s and p = softmax(s), each row's loss has the gradient
p - onehot(positive) with respect to s.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

BLOCK_BYTES = 2**26
"""Bytes of one block of float32 logits; peak use is about three times this."""


@contextmanager
def float32_products() -> Iterator[None]:
    """Inside, float32 matrix products run in float32 even if a GPU was set to TF32."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def contrast(
    anchors: Tensor, candidates: Tensor, positive: Tensor, temperature: float, itself: bool
) -> Tensor:
    """Mean cross entropy of finding each anchor's positive among all candidates.

    Args:
        anchors: float32 unit vectors [n, D].
        candidates: float32 unit vectors [m, D], with or without gradient.
        positive: int64 [n], the index of each anchor's positive in `candidates`.
        temperature: softmax temperature.
        itself: whether the candidates contain the anchors themselves, at index positive ^ 1 (views
            lie in pairs); these are left out.

    Returns:
        A float32 scalar.
    """
    return cast(Tensor, _Contrast.apply(anchors, candidates, positive, temperature, itself))


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        positive: Tensor,
        temperature: float,
        itself: bool,
    ) -> Tensor:
        total = anchors.new_zeros(len(anchors))  # [n], logsumexp of each row
        for rows in _blocks(len(anchors), len(candidates)):
            logits = _logits(anchors[rows], candidates, positive[rows], temperature, itself)
            total[rows] = logits.logsumexp(1)
        ctx.save_for_backward(anchors, candidates, positive, total)
        ctx.temperature, ctx.itself = temperature, itself
        agreement = (anchors * candidates[positive]).sum(1) / temperature  # [n]
        return (total - agreement).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        anchors, candidates, positive, total = ctx.saved_tensors
        of_anchors = torch.empty_like(anchors)
        of_candidates = torch.zeros_like(candidates) if ctx.needs_input_grad[1] else None
        with float32_products():
            for rows in _blocks(len(anchors), len(candidates)):
                some, places = anchors[rows], positive[rows]
                logits = _logits(some, candidates, places, ctx.temperature, ctx.itself)
                errors = logits.sub_(total[rows, None]).exp_()  # [r, m], probabilities
                errors.scatter_add_(1, places[:, None], errors.new_full((len(some), 1), -1.0))
                torch.matmul(errors, candidates, out=of_anchors[rows])
                if of_candidates is not None:
                    of_candidates.addmm_(errors.T, some)
        scale = gradients[0] / (len(anchors) * ctx.temperature)
        if of_candidates is not None:
            of_candidates *= scale
        return of_anchors * scale, of_candidates, None, None, None


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, BLOCK_BYTES // (4 * columns))
    return (slice(start, min(rows, start + size)) for start in range(0, rows, size))


def _logits(
    anchors: Tensor, candidates: Tensor, positive: Tensor, temperature: float, itself: bool
) -> Tensor:
    """Logits [r, m] of r anchors; with `itself`, an anchor's own entry is -inf."""
    logits = (anchors @ candidates.T).div_(temperature)
    if itself:
        logits.scatter_(1, (positive ^ 1)[:, None], float("-inf"))
    return logits
