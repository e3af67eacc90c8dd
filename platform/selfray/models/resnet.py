"""ResNet-like backbones of timm: features as one vector and one map, and the small-image stem."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def encode(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 3, H, W] -> pooled features [B, D] and the last map as patches [B, N, D]."""
    features = backbone.forward_features(images)  # [B, D, h, w]
    if features.ndim != 4 or features.shape[1] != backbone.num_features:
        raise ValueError(
            f"encoder.name: {type(backbone).__name__} does not end in a map [B, D, h, w], as a "
            "ResNet or ConvNeXt does: take one of those, or a vit_* model"
        )
    pooled = backbone.forward_head(features, pre_logits=True)  # [B, D]
    return pooled, features.flatten(2).transpose(1, 2)


def use_small_stem(backbone: Any) -> None:
    """3 x 3 convolution of stride 1 and no max-pool, in place of 7 x 7, stride 2 and max-pool."""
    old = getattr(backbone, "conv1", None)
    if not isinstance(old, nn.Conv2d):
        raise ValueError("encoder.small_stem needs a ResNet whose stem is one convolution")
    backbone.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    backbone.maxpool = nn.Identity()


def widen_stem(weight: Tensor) -> Tensor:
    """[C, 3, 3, 3] -> [C, 3, 7, 7] with zeros around: timm's shape, and the same function at
    stride 1, since timm's padding of 3 lays the centre where padding 1 laid it."""
    return F.pad(weight, (2, 2, 2, 2))


def narrow_stem(weight: Tensor) -> Tensor:
    """The inverse of widen_stem."""
    return weight[:, :, 2:-2, 2:-2].contiguous()
