"""ResNet-like timm backbones: pooled and map features, and the stem for small images."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def encode(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] -> (pooled features [B, D], last map as patches [B, N, D]).

    Raises ValueError if the backbone's output is not a map [B, D, h, w].
    """
    features = backbone.forward_features(images)  # [B, D, h, w]
    if features.ndim != 4 or features.shape[1] != backbone.num_features:
        raise ValueError(
            f"encoder.name: {type(backbone).__name__} does not end in a map [B, D, h, w], as a "
            "ResNet or ConvNeXt does: give one of those, or a vit_* model"
        )
    pooled = backbone.forward_head(features, pre_logits=True)  # [B, D]
    return pooled, features.flatten(2).transpose(1, 2)


def use_small_stem(backbone: Any) -> None:
    """Replace the stem (7 x 7, stride 2, max-pool) by a 3 x 3 convolution of stride 1, no
    max-pool."""
    old = backbone.conv1
    if not isinstance(old, nn.Conv2d):
        raise ValueError("encoder.small_stem needs a ResNet whose stem is one convolution")
    backbone.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    backbone.maxpool = nn.Identity()


def widen_stem(weight: Tensor) -> Tensor:
    """Pad a stem [D, C, 3, 3] with zeros to timm's shape [D, C, 7, 7]. At stride 1 it computes the
    same: the larger kernel has padding 3 instead of 1."""
    return F.pad(weight, (2, 2, 2, 2))


def narrow_stem(weight: Tensor) -> Tensor:
    """The inverse of widen_stem: [D, C, 7, 7] -> [D, C, 3, 3]."""
    return weight[:, :, 2:-2, 2:-2].contiguous()
