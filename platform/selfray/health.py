"""Is the representation alive? Label-free figures that show a collapse while it happens."""

import torch
from torch import Tensor

from selfray.models.encoder import Encoder


@torch.no_grad()
def feature_health(encoder: Encoder, images: Tensor) -> dict[str, float]:
    """Two figures of the features of a batch, [b, 3, H, W] normalised, at most 256 of them used.

    feature_std: the deviation of each L2-normalised feature dimension over the batch, the mean
        over dimensions, times sqrt(D): about 1 where features fill the sphere, 0 at collapse.
    effective_rank: exp of the entropy of the normalised singular values (Roy and Vetterli 2007;
        RankMe, arXiv:2210.02885, on a batch): at most min(b, D).
    """
    was_training = encoder.training
    encoder.eval()
    features = encoder(images[:256]).cls.float()  # [b, D]
    encoder.train(was_training)
    unit = torch.nn.functional.normalize(features, dim=-1)
    deviation = unit.std(0).mean() * features.shape[1] ** 0.5
    return {"feature_std": float(deviation), "effective_rank": float(effective_rank(features))}


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the singular values of [n, D], each divided by their sum: a scalar."""
    singular = torch.linalg.svdvals(features.double())
    shares = singular / singular.sum().clamp_min(1e-12)
    return torch.exp(-(shares * (shares + 1e-12).log()).sum())
