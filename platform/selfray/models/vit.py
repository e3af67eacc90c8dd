"""ViT-like timm backbones: tokens, masked encoding, fixed sine-cosine positions."""

import math
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:  # timm takes seconds to import
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer


@lru_cache
def kinds() -> "tuple[type[VisionTransformer], type[Beit], type[Eva]]":
    """The timm classes that `encode` supports: VisionTransformer, Beit and Eva."""
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer, Beit, Eva


@lru_cache
def block_kinds() -> tuple[type[nn.Module], ...]:
    """The classes of the blocks of ViTs and BEiT's encoders."""
    from timm.models import beit, vision_transformer

    return vision_transformer.Block, beit.Block


def encode(
    backbone: Any,
    images: Tensor,
    visible: Tensor | None = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] -> (class token [B, D], patch tokens [B, N or Nv, D]).

    Patches that are not in `visible`, int64 [B, Nv], are dropped before the first block, which
    makes MAE fast. Embeddings of patches in `mask`, bool [B, N], are replaced by `mask_token` [D]
    before positions are added. With `recompute`, the backward pass computes each block again.
    """
    _, beit, eva = kinds()
    embedded = backbone.patch_embed(images)  # [B, N, D], or [B, h, w, D]
    if mask is not None:
        assert mask_token is not None
        hidden = mask.view(*embedded.shape[:-1], 1)
        embedded = torch.where(hidden, mask_token.to(embedded.dtype), embedded)
    if isinstance(backbone, beit):
        assert visible is None, "a relative position bias needs all patches"
        tokens = _beit_blocks(backbone, embedded, recompute)
    elif isinstance(backbone, eva):
        tokens = _rotary_blocks(backbone, embedded, visible, recompute)
    else:
        tokens = _vit_blocks(backbone, embedded, visible, recompute)
    cls = backbone.forward_head(tokens, pre_logits=True)  # pooled as timm's own forward does
    return cls, tokens[:, backbone.num_prefix_tokens :]


def _vit_blocks(backbone: Any, embedded: Tensor, visible: Tensor | None, recompute: bool) -> Tensor:
    tokens = _with_positions(backbone, embedded)  # [B, P + N, D]
    tokens = backbone.norm_pre(_seen(tokens, visible, backbone.num_prefix_tokens))
    for block in backbone.blocks:
        tokens = _run_block(block, recompute, tokens)
    return backbone.norm(tokens)


def _seen(tokens: Tensor, visible: Tensor | None, prefix: int) -> Tensor:
    """Keep the prefix tokens and the visible patches: [B, P + N, D] -> [B, P + Nv, D]."""
    if visible is None:
        return tokens
    index = visible.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, index)], dim=1)


def _rotary_blocks(
    backbone: Any, embedded: Tensor, visible: Tensor | None, recompute: bool
) -> Tensor:
    tokens, angles = backbone._pos_embed(embedded)  # [B, P + N, D], [(depth, heads,) N, E]
    tokens = backbone.norm_pre(_seen(tokens, visible, backbone.num_prefix_tokens))
    if visible is not None and angles is not None:
        # Each image has the angles of its own visible patches: [(depth,) B, 1 or heads, Nv, E].
        chosen = angles[..., visible, :]  # [(depth, heads,) B, Nv, E]
        angles = chosen.transpose(1, 2) if backbone.rope_mixed else chosen.unsqueeze(1)
    for number, block in enumerate(backbone.blocks):
        mixed = backbone.rope_mixed and angles is not None  # each block has its own angles
        rope = angles[number] if mixed and angles is not None else angles
        tokens = _run_block(block, recompute, tokens, rope=rope)
    return backbone.norm(tokens)


def _with_positions(backbone: Any, embedded: Tensor) -> Tensor:
    """Patch embeddings [B, h, w, D] -> tokens [B, P + N, D] with positions added. At the backbone's
    image size this is timm's `_pos_embed`; at others positions are resized as DINO's authors do."""
    grid, native = tuple(embedded.shape[1:3]), tuple(backbone.patch_embed.grid_size)
    if embedded.ndim != 4 or grid == native or backbone.pos_embed is None:
        return backbone._pos_embed(embedded)
    own = backbone.pos_embed  # [1, P + N, D], or [1, N, D]
    without_prefix = own.shape[1] - native[0] * native[1]
    patches = own[:, without_prefix:].unflatten(1, native).permute(0, 3, 1, 2)  # [1, D, h, w]
    resized = resized_positions(patches, grid).flatten(2).transpose(1, 2)
    prefix = [
        token.expand(len(embedded), -1, -1)
        for token in (backbone.cls_token, backbone.reg_token)
        if token is not None
    ]
    tokens = embedded.flatten(1, 2)
    if without_prefix:
        resized = torch.cat([own[:, :without_prefix], resized], dim=1)
        tokens = torch.cat([*prefix, tokens], dim=1) + resized
    else:
        tokens = torch.cat([*prefix, tokens + resized], dim=1)
    return backbone.pos_drop(tokens)


def resized_positions(positions: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Resize positions [1, D, h, w] to [1, D, *grid] by bicubic interpolation without antialiasing.

    The scale is (grid + 0.1) / (h, w), as in the code of DINO and DINOv2 for local crops. timm uses
    antialiasing, which shrinks random positions: from 14 x 14 to 6 x 6 their deviation falls to
    0.007 instead of 0.017.
    """
    scale = [(new + 0.1) / old for new, old in zip(grid, positions.shape[2:], strict=True)]
    resized = F.interpolate(positions, scale_factor=scale, mode="bicubic")
    assert tuple(resized.shape[2:]) == tuple(grid)
    return resized


def _run_block(block: Any, recompute: bool, tokens: Tensor, **named: Tensor | None) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpoint(partial(block, **named), tokens, use_reentrant=False)
    return block(tokens, **named)


def _beit_blocks(backbone: Any, embedded: Tensor, recompute: bool) -> Tensor:
    cls = backbone.cls_token.expand(len(embedded), -1, -1)
    tokens = backbone.pos_drop(torch.cat([cls, embedded], dim=1))  # [B, 1 + N, D]
    bias = None if backbone.rel_pos_bias is None else backbone.rel_pos_bias()
    for block in backbone.blocks:
        tokens = _run_block(block, recompute, tokens, shared_rel_pos_bias=bias)
    return backbone.norm(tokens)


def skip_blocks_alike(backbone: Any, probability: float) -> None:
    """Set the same stochastic-depth probability in all blocks; timm's grows with depth."""
    from timm.layers import DropPath

    for block in backbone.blocks:
        block.drop_path1 = DropPath(probability)
        block.drop_path2 = DropPath(probability)


def sincos_positions(width: int, grid: int) -> Tensor:
    """Two-dimensional sine-cosine position embedding, float32 [grid * grid, width].

    The first half of the width encodes the column, the second half the row, each by sines and
    cosines of frequencies 10000^(-i / (width / 4)) (Vaswani et al. 2017, in two dimensions as in
    MoCo v3 and MAE).
    """
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # [grid, width / 4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    columns = axis.repeat(grid, 1)
    rows = axis.repeat_interleave(grid, 0)
    return torch.cat([columns, rows], dim=1).float()


def fix_sincos_positions(backbone: Any) -> None:
    """Replace the learned position embedding by the fixed one, with zeros for prefix tokens.

    It becomes a buffer, because it is never trained, under the same name, so that plain timm loads
    the weights.
    """
    learned = backbone.pos_embed  # [1, P + N, D], or [1, N, D]
    grid = backbone.patch_embed.grid_size[0]
    positions = sincos_positions(learned.shape[-1], grid)
    prefix = learned.new_zeros(learned.shape[1] - positions.shape[0], learned.shape[-1])
    del backbone.pos_embed
    backbone.register_buffer("pos_embed", torch.cat([prefix, positions]).unsqueeze(0))


def freeze_patch_embedding(backbone: Any) -> None:
    """Freeze the patch embedding at its initialisation (MoCo v3, arXiv:2104.02057, section 4.3).

    Its tensors become buffers, because they are never trained, under the same names, so that plain
    timm loads the weights.
    """
    projection = backbone.patch_embed.proj
    for name in ("weight", "bias"):
        value = getattr(projection, name).detach()
        delattr(projection, name)
        projection.register_buffer(name, value)


def fit_positions(
    weights: dict[str, Tensor], own: dict[str, Tensor], backbone: Any
) -> dict[str, Tensor]:
    """Adapt a method's weights to another image size: interpolate position embeddings, learned or
    fixed, and relative biases of its ViT; leave all other tensors unchanged.

    Args:
        weights: a state dict of another image size.
        own: the state dict of the method that will load them.
        backbone: its ViT.
    """
    from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table

    prefix = 0 if getattr(backbone, "no_embed_class", False) else backbone.num_prefix_tokens
    fitted = dict(weights)
    for name in weights.keys() & own.keys():
        theirs, ours = weights[name], own[name]
        if theirs.shape == ours.shape:
            continue
        if name.endswith("backbone.pos_embed"):
            old, new = (math.isqrt(p.shape[1] - prefix) for p in (theirs, ours))
            fitted[name] = resample_abs_pos_embed(
                theirs, [new, new], [old, old], num_prefix_tokens=prefix
            )
        elif name.endswith(".relative_position_bias_table"):
            # (2 side - 1)^2 offsets between patches, and 3 entries for the class token.
            side = (math.isqrt(ours.shape[0] - 3) + 1) // 2
            fitted[name] = resize_rel_pos_bias_table(theirs, (side, side), tuple(ours.shape))
    return fitted
