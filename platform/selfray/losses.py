"""Losses as pure functions of tensors, in float32 whatever the autocast."""

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(local: Tensor, everyone: Tensor, first: int, temperature: float) -> Tensor:
    """SimCLR's normalised temperature-scaled cross entropy over two views of each image.

    Every local view is an anchor; its positive is the other view of the same image; all other
    views of the global batch are its negatives (arXiv:2002.05709, eq. 1).

    Args:
        local: [b, 2, D], embeddings of this rank's images (any length).
        everyone: [B, 2, D], those of all ranks in rank order; `local` lies at [first, first + b).
        first: index of this rank's first image in `everyone`.
        temperature: softmax temperature.

    Returns:
        The mean over the 2b local anchors: a scalar.
    """
    local = F.normalize(local.float(), dim=-1)
    everyone = F.normalize(everyone.float(), dim=-1)
    images, total = local.shape[0], everyone.shape[0]
    anchors = local.flatten(0, 1)  # [2b, D], image-major: view v of image i stands at 2i + v
    candidates = everyone.flatten(0, 1)  # [2B, D]
    logits = anchors @ candidates.T / temperature  # [2b, 2B]
    itself = torch.arange(2 * images, device=local.device) + 2 * first  # [2b]
    is_itself = F.one_hot(itself, 2 * total).bool()
    positive = itself ^ 1  # views stand in pairs: 2i and 2i + 1
    return F.cross_entropy(logits.masked_fill(is_itself, float("-inf")), positive)


def masked_pixel_error(
    predicted: Tensor, target: Tensor, mask: Tensor, normalize_pixels: bool
) -> Tensor:
    """MAE's loss: squared error of the hidden patches' pixels, the mean over hidden patches.

    Args:
        predicted: [B, N, P], with P pixel values in each patch.
        target: [B, N, P].
        mask: bool [B, N], True where a patch was hidden.
        normalize_pixels: compare with each patch's pixels minus their mean over their deviation
            (unbiased variance + 1e-6): the paper gains accuracy over raw pixels.

    Returns:
        A scalar (arXiv:2111.06377, section 3).
    """
    target = target.float()
    if normalize_pixels:
        mean = target.mean(-1, keepdim=True)
        variance = target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    error = (predicted.float() - target).square().mean(-1)  # [B, N]
    return error[mask].mean()
