"""Initialisation of an encoder's weights, as each method's authors do it.

timm draws a ViT's linear layers from a normal of deviation 0.02, its class token from one of 1e-6,
and the patch embedding as PyTorch draws any convolution. A method with another initialisation calls
one of these functions. `fill_residual_branches` is for ResNets, the others are for ViTs.

Shapes and names do not change, so checkpoints fit regardless of the initialisation.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def as_mae(backbone: Any) -> None:
    """MAE (arXiv:2111.06377, appendix A.1): linear layers and the patch embedding, taken as a
    matrix, Xavier-uniform; linear biases zero; class token from a normal of deviation 0.02."""
    for linear in _linears(backbone).values():
        _xavier(linear)
    nn.init.xavier_uniform_(backbone.patch_embed.proj.weight.flatten(1))
    if backbone.cls_token is not None:
        nn.init.normal_(backbone.cls_token, std=0.02)


@torch.no_grad()
def as_mocov3(backbone: Any) -> None:
    """MoCo v3 (arXiv:2104.02057, appendix A): linear layers and the patch embedding Xavier-uniform
    with zero biases. The bounds of qkv are those of three separate matrices, the bound of the patch
    embedding is sqrt(6 / (3 patch^2 + width)). Class token: a normal of deviation 1e-6."""
    for name, linear in _linears(backbone).items():
        if name.endswith("qkv"):
            width = linear.weight.shape[0] // 3
            _uniform(linear.weight, math.sqrt(6 / (width + linear.weight.shape[1])))
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        else:
            _xavier(linear)
    projection = backbone.patch_embed.proj
    fan_in = projection.weight[0].numel()
    _uniform(projection.weight, math.sqrt(6 / (fan_in + projection.weight.shape[0])))
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    if backbone.cls_token is not None:
        nn.init.normal_(backbone.cls_token, std=1e-6)


@torch.no_grad()
def as_beit(backbone: Any) -> None:
    """BEiT (arXiv:2106.08254, section 2.5 and the authors' code): normals of deviation 0.02,
    truncated at one deviation, for linear layers, patch embedding, class token and learned
    positions; zero biases; the last layers of the l-th block's two branches divided by sqrt(2 l).
    """
    for layer in [*_linears(backbone).values(), backbone.patch_embed.proj]:
        cut_normal(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for name in ("cls_token", "pos_embed"):
        tokens = getattr(backbone, name, None)
        if isinstance(tokens, nn.Parameter):
            cut_normal(tokens)
    for depth, block in enumerate(backbone.blocks, start=1):
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.div_(math.sqrt(2 * depth))


@torch.no_grad()
def as_dino(backbone: Any, class_deviation: float) -> None:
    """DINO and DINOv2 (the authors' code): linear layers from a normal of deviation 0.02 with zero
    biases, SwiGLU's gates included, which timm initialises differently; the class token from a
    normal of `class_deviation`, 0.02 in DINO and 1e-6 in DINOv2; the patch embedding as PyTorch
    does."""
    for linear in _linears(backbone).values():
        nn.init.trunc_normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    if backbone.cls_token is not None:
        nn.init.normal_(backbone.cls_token, std=class_deviation)


@torch.no_grad()
def fill_residual_branches(backbone: Any, bottlenecks: bool = True) -> None:
    """Set the gain of the last batch norm in each of a ResNet's blocks to 1, as in torchvision.

    timm's 0 makes each block start as the identity (Goyal et al., arXiv:1706.02677, section 5.1).
    With `bottlenecks` False, only basic blocks (ResNet-18, 34) are changed.
    """
    for block in backbone.modules():
        # timm's blocks: the last batch norm is the third of a bottleneck, the second of others.
        is_bottleneck = hasattr(block, "bn3")
        last = getattr(block, "bn3" if is_bottleneck else "bn2", None)
        if last is not None and (bottlenecks or not is_bottleneck):
            nn.init.ones_(last.weight)


def cut_normal(weight: Tensor, deviation: float = 0.02) -> None:
    """Fill with a normal truncated at one deviation (BEiT); its own deviation is 0.54 of that."""
    nn.init.trunc_normal_(weight, std=deviation, a=-deviation, b=deviation)


def _linears(backbone: Any) -> dict[str, nn.Linear]:
    blocks = backbone.blocks.named_modules()
    return {name: module for name, module in blocks if isinstance(module, nn.Linear)}


def _xavier(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _uniform(weight: Tensor, bound: float) -> None:
    nn.init.uniform_(weight, -bound, bound)
