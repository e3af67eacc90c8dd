"""Losses as pure functions of tensors, computed in float32 even under autocast."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from selfray import distributed
from selfray.contrast import contrast, float32_products

Arguments = ParamSpec("Arguments")


def in_float32(loss: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """Decorate a loss so that it runs without autocast and TF32, which would compute its matrix
    products in bf16 or TF32. In bf16 near neighbours tie, and a loss of 11 has steps of 0.06."""

    @functools.wraps(loss)
    def computed(*arguments: Arguments.args, **named: Arguments.kwargs) -> Tensor:
        first = arguments[0]
        assert isinstance(first, Tensor)
        with torch.autocast(first.device.type, enabled=False), float32_products():
            return loss(*arguments, **named)

    return computed


@in_float32
def nt_xent(local: Tensor, everyone: Tensor, first: int, temperature: float) -> Tensor:
    """SimCLR's normalised temperature-scaled cross entropy over two views of each image.

    Every local view is an anchor; its positive is the other view of the same image; all other
    views of the global batch are its negatives (arXiv:2002.05709, eq. 1).

    Args:
        local: [b, 2, D], embeddings of this rank's images, of any norm.
        everyone: [B, 2, D], those of all ranks in rank order; `local` lies at [first, first + b).
        first: index of this rank's first image in `everyone`.
        temperature: softmax temperature.

    Returns:
        The mean over the 2b local anchors: a scalar.
    """
    local = F.normalize(local.float(), dim=-1)
    everyone = F.normalize(everyone.float(), dim=-1)
    anchors = local.flatten(0, 1)  # [2b, D], image-major: view v of image i stands at 2i + v
    itself = torch.arange(len(anchors), device=local.device) + 2 * first  # [2b]
    positive = itself ^ 1  # views stand in pairs: 2i and 2i + 1
    return contrast(anchors, everyone.flatten(0, 1), positive, temperature, itself=True)


@in_float32
def masked_pixel_error(
    predicted: Tensor, target: Tensor, mask: Tensor, normalize_pixels: bool
) -> Tensor:
    """MAE's loss: squared error of the hidden patches' pixels, the mean over hidden patches.

    Args:
        predicted: [B, N, P], with P pixel values in each patch.
        target: [B, N, P].
        mask: bool [B, N], True where a patch was hidden.
        normalize_pixels: standardise each target patch by its own mean and deviation, the root of
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
    # Not error[mask]: its size depends on the data, so the host would wait for the GPU.
    return (error * mask).sum() / mask.sum()


@in_float32
def regression_to_target(predicted: Tensor, target: Tensor) -> Tensor:
    """BYOL's loss: the mean squared distance of L2-normalised vectors, 2 - 2 cos.

    Args:
        predicted: [..., D], the online network's predictions, of any norm.
        target: [..., D], the target network's projections; no gradient flows there.

    Returns:
        A scalar in 0..4 (arXiv:2006.07733, eq. 2).
    """
    cosine = F.cosine_similarity(predicted.float(), target.detach().float(), dim=-1)
    return (2 - 2 * cosine).mean()


@in_float32
def queue_contrast(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo's loss: each query against its own key and the keys of a queue.

    Args:
        queries: [b, D], of any norm.
        keys: [b, D], the positives, of any norm; no gradient flows there.
        queue: [K, D], unit vectors: the negatives.
        temperature: softmax temperature.

    Returns:
        The mean over queries: a scalar (arXiv:1911.05722, eq. 1).
    """
    queries, keys = F.normalize(queries.float(), dim=-1), F.normalize(keys.float(), dim=-1)
    positive = (queries * keys.detach()).sum(-1, keepdim=True)  # [b, 1]
    logits = torch.cat([positive, queries @ queue.T], dim=1) / temperature  # [b, 1 + K]
    return F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64))


@in_float32
def batch_contrast(queries: Tensor, keys: Tensor, first: int, temperature: float) -> Tensor:
    """MoCo v3's loss: each query against the keys of the global batch.

    Args:
        queries: [b, D], this rank's, of any norm.
        keys: [B, D], all ranks', of any norm; the positive of query i is key first + i; no
            gradient flows there.
        first: index of this rank's first key.
        temperature: softmax temperature.

    Returns:
        2 * temperature times the mean over queries: a scalar (arXiv:2104.02057, algorithm 1). The
        factor keeps the size of the gradients about equal at all temperatures.
    """
    queries, keys = F.normalize(queries.float(), dim=-1), F.normalize(keys.float(), dim=-1)
    positive = torch.arange(len(queries), device=queries.device) + first
    loss = contrast(queries, keys.detach(), positive, temperature, itself=False)
    return 2 * temperature * loss


@in_float32
def self_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """DINO's loss: cross entropy of the student's crops against the teacher's other crops.

    Args:
        student: logits [b, S, K] of all crops, the teacher's T first.
        teacher: probabilities [b, T, K] of the global crops; no gradient flows there.
        temperature: the student's.

    Returns:
        The mean over images and over all pairs of a teacher's crop and a different crop of the
        student: a scalar (arXiv:2104.14294, eq. 3).
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    pairs = -torch.einsum("btk,bsk->bts", teacher.detach().float(), log_student)  # [b, T, S]
    same_crop = pairs.diagonal(dim1=1, dim2=2)  # [b, T]
    return (pairs.sum() - same_crop.sum()) / (pairs.numel() - same_crop.numel())


@in_float32
def masked_distillation(
    student: Tensor, teacher: Tensor, weights: Tensor, crops: int, temperature: float
) -> Tensor:
    """iBOT's loss: cross entropy of hidden patches against the teacher's output for them.

    Args:
        student: logits [M, K] of all hidden patches.
        teacher: probabilities [M, K]; no gradient flows there.
        weights: [M], one over the number of patches that are hidden in the patch's own crop.
        crops: the number of crops, those without hidden patches included.
        temperature: the student's.

    Returns:
        The sum over hidden patches of weight x cross entropy, over the number of crops: a scalar
        (arXiv:2111.07832, eq. 2; DINOv2's weights: arXiv:2304.07193, section 4).
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    terms = -(teacher.detach().float() * log_student).sum(-1)  # [M]
    return (terms * weights).sum() / crops


@in_float32
@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Soft assignments that use all prototypes equally over the global batch.

    Args:
        logits: [n, K], this rank's; n may differ between ranks.
        temperature: softmax temperature.
        iterations: Sinkhorn-Knopp steps; after each, rows sum to 1.

    Returns:
        Probabilities [n, K]. As iterations grow, each prototype gets an equal share of the sum over
        all ranks' rows (Caron et al., arXiv:2006.09882, section 3.1).
    """
    shares = logits.float() / temperature  # [n, K], logarithms: probabilities could underflow
    for _ in range(iterations):
        shares = shares - _log_total_over_ranks(shares)
        shares = shares.log_softmax(1)
    return shares.exp()


def _log_total_over_ranks(logs: Tensor) -> Tensor:
    """[n, K] on each rank -> log of the sum of exp over all ranks' rows [K]."""
    local = logs.new_full(logs.shape[1:], float("-inf"))
    largest = distributed.max_over_ranks(logs.amax(0) if len(logs) else local)
    return largest + distributed.sum_over_ranks((logs - largest).exp().sum(0)).log()


@in_float32
def koleo(features: Tensor, everyone: Tensor, first: int) -> Tensor:
    """KoLeo: pushes each feature away from its nearest neighbour, so that they spread evenly.

    Args:
        features: [b, D], this rank's, of any norm.
        everyone: [B, D], all ranks', of any norm, with gradients.
        first: index of this rank's first feature among all.

    Returns:
        The mean of -log of the distance to the nearest other unit vector: a scalar (Sablayrolles
        et al., arXiv:1806.03198, eq. 3); 0 if there is only one vector.
    """
    features, everyone = (
        F.normalize(features.float(), dim=-1),
        F.normalize(everyone.float(), dim=-1),
    )
    if len(everyone) < 2:
        return 0 * features.sum()
    with torch.no_grad():
        similar = features @ everyone.T  # [b, B]
        itself = torch.arange(len(features), device=features.device) + first
        similar.scatter_(1, itself[:, None], -2.0)
        nearest = similar.argmax(1)  # [b]
    distance = F.pairwise_distance(features, everyone[nearest], eps=1e-8)
    return -(distance + 1e-8).log().mean()
