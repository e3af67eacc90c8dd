"""Fits public weights to an encoder: which tensors are taken, changed, or left out."""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfray.models import resnet
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.models.layouts import Tensors
from selfray.models.weights import PublicWeights, read


@dataclass(frozen=True)
class Fitted:
    """Public weights, fitted to one encoder."""

    tensors: Tensors
    """The tensors taken, under the backbone's names and in its shapes."""
    weights: PublicWeights
    encoder: EncoderConfig
    missing: tuple[str, ...]
    """The encoder's tensors that keep their random initialisation."""
    unused: tuple[str, ...]
    """Tensors of the file that were not taken."""
    changes: tuple[str, ...]
    """Changes that made the weights fit, as sentences."""
    share: float
    """The share of the encoder's weights that were taken, 0..1."""
    size: int
    """The number of the encoder's weights."""
    heads: tuple[int, int]
    """(attention heads of the file, of the encoder). Shapes do not show the number of heads, and
    with another number the same weights compute something else."""

    def refuse(self, least: float) -> None:
        """Raise ValueError if less than the share `least` fits, or if the first layer or the
        positions do not fit."""
        source, name = self.weights.source, self.encoder.name
        if self.heads[0] != self.heads[1]:
            raise ValueError(
                f"--init-from {source} has a ViT with {self.heads[0]} heads, but encoder.name "
                f"{name} has {self.heads[1]}: give --encoder.heads {self.heads[0]}"
            )
        # Without positions a ViT has most of its weights, but its features are useless.
        blind = [name for name in self.missing if _ESSENTIAL.search(name)]
        if self.share >= least and not blind:
            return
        known = self.weights.encoder(self.encoder)
        is_other = known is not None and known != self.encoder
        better = f"give --encoder.name {known.name}" if known and is_other else "give its encoder"
        if known is not None and known.name == name and is_other:
            better = "give " + " ".join(
                f"--encoder.{field.replace('_', '-')} {getattr(known, field)}"
                for field in known.__dataclass_fields__
                if getattr(known, field) != getattr(self.encoder, field)
            )
        raise ValueError(
            f"--init-from {source} fits {self.share:.0%} of the weights of encoder.name {name} (no "
            f"{_some(blind or self.missing)}): {better}, or accept less with --init-share 0"
        )

    @property
    def described(self) -> list[str]:
        """Lines for the console: which tensors were taken, which were not, and the licence."""
        own = len(self.tensors) + len(self.missing)
        lines = [
            f"starting from {self.weights.source} ({self.weights.named.layout} layout): "
            f"{len(self.tensors)} of {own} tensors, {self.share:.1%} of the encoder's "
            f"{self.size / 1e6:,.1f} million weights"
        ]
        if self.missing:
            lines.append(f"not in the file, initialised at random: {_some(self.missing)}")
        if self.unused:
            lines.append(f"in the file, not used: {_some(self.unused)}")
        lines += self.changes
        if self.weights.named.licence:
            lines.append(
                f"licence of these weights and of all that is trained from them: "
                f"{self.weights.named.licence}"
            )
        return lines


_ESSENTIAL = re.compile(
    r"(^patch_embed\.proj\.weight|^conv1\.weight|^pos_embed|position_bias_table)$"
)


def _some(names: tuple[str, ...] | list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@torch.no_grad()
def fit(weights: PublicWeights, encoder: Encoder) -> Fitted:
    """Fit weights to an encoder's shapes: interpolate positions, adapt the first layer to another
    number of channels or patch size, and pack or split gated layers."""
    backbone: Any = encoder.backbone
    own = {n: t for n, t in backbone.state_dict().items() if not n.endswith("num_batches_tracked")}
    theirs, changes = dict(weights.named.tensors), []
    for adapt in (_biases, _gates, _final_norm, _stem, _patches, _positions, _position_biases):
        changes += adapt(theirs, own, backbone)
    taken = {n: t for n, t in theirs.items() if n in own and t.shape == own[n].shape}
    missing = tuple(name for name in own if name not in taken)
    unused = tuple(n for n in theirs if n not in taken and not n.endswith("num_batches_tracked"))
    size = sum(t.numel() for t in own.values())
    return Fitted(
        taken,
        weights,
        encoder.config,
        missing,
        (*unused, *weights.named.left_out),
        tuple(changes),
        sum(t.numel() for t in taken.values()) / size,
        size,
        _head_counts(weights, backbone),
    )


def _head_counts(weights: PublicWeights, backbone: Any) -> tuple[int, int]:
    blocks = getattr(backbone, "blocks", None)
    ours = blocks[0].attn.num_heads if blocks is not None and hasattr(blocks[0], "attn") else 0
    return int(weights.named.facts.get("heads", ours)), ours


def _biases(theirs: Tensors, own: Tensors, backbone: Any) -> list[str]:
    """Drop zero biases of queries and values if the encoder has no such biases."""
    for name in [n for n in theirs if n.endswith((".q_bias", ".v_bias"))]:
        if name not in own and not theirs[name].any():
            del theirs[name]
    return []


def _gates(theirs: Tensors, own: Tensors, backbone: Any) -> list[str]:
    """Convert gated layers between one matrix, gates first, and two matrices."""
    for name in [n for n in theirs if ".mlp.fc1." in n]:
        gate, value = name.replace(".fc1.", ".fc1_g."), name.replace(".fc1.", ".fc1_x.")
        if name not in own and gate in own:
            theirs[gate], theirs[value] = theirs.pop(name).chunk(2)
    for gate in [n for n in theirs if ".mlp.fc1_g." in n]:
        name, value = gate.replace(".fc1_g.", ".fc1."), gate.replace(".fc1_g.", ".fc1_x.")
        if gate not in own and name in own and value in theirs:
            theirs[name] = torch.cat([theirs.pop(gate), theirs.pop(value)])
    return []


def _final_norm(theirs: Tensors, own: Tensors, backbone: Any) -> list[str]:
    if "fc_norm.weight" in theirs and "norm.weight" in own and "norm.weight" not in theirs:
        for name in ("weight", "bias"):
            theirs[f"norm.{name}"] = theirs.pop(f"fc_norm.{name}")
        return ["the norm after the pooling is used as the last norm of all tokens"]
    return []


def _stem(theirs: Tensors, own: Tensors, backbone: Any) -> list[str]:
    """Adapt a ResNet's stem: narrow one that `selfray export` widened, and change its channels."""
    stem = theirs.get("conv1.weight")
    if stem is None or "conv1.weight" not in own:
        return []
    if stem.shape[-1] == 7 and own["conv1.weight"].shape[-1] == 3:
        inner = resnet.narrow_stem(stem)
        if torch.equal(resnet.widen_stem(inner), stem):
            theirs["conv1.weight"] = inner
    return _other_channels("conv1.weight", theirs, own)


def _patches(theirs: Tensors, own: Tensors, backbone: Any) -> list[str]:
    name = "patch_embed.proj.weight"
    if name not in theirs or name not in own:
        return []
    changes = _other_channels(name, theirs, own)
    old, new = theirs[name].shape[-1], own[name].shape[-1]
    if old != new:
        from timm.layers import resample_patch_embed

        theirs[name] = resample_patch_embed(theirs[name], [new, new])
        changes.append(f"patch embedding of {old} pixels resampled to {new} pixels")
    return changes


def _other_channels(name: str, theirs: Tensors, own: Tensors) -> list[str]:
    old, new = theirs[name].shape[1], own[name].shape[1]
    if old != new:
        theirs[name] = for_channels(theirs[name], new)
        return [f"{name}: the mean over its {old} channels is used for each of {new} channels"]
    return []


def for_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapt a first layer [D, C, p, p] to [D, channels, p, p]: each channel has the mean of the old
    ones, scaled so that the output for an image with equal channels is unchanged."""
    mean = weight.mean(1, keepdim=True)  # [D, 1, p, p]
    return mean.repeat(1, channels, 1, 1) * (weight.shape[1] / channels)


def _positions(theirs: Tensors, own: Tensors, backbone: Any) -> list[str]:
    """Adapt position embeddings to the encoder's grid and prefix tokens."""
    if "pos_embed" not in theirs or "pos_embed" not in own:
        return []
    positions, wanted = theirs["pos_embed"], own["pos_embed"]  # [1, P + N, D]
    ours = 0 if getattr(backbone, "no_embed_class", False) else backbone.num_prefix_tokens
    prefix = _prefix_of(positions.shape[1], theirs)
    head, grid = positions[:, :prefix], positions[:, prefix:]
    old, new = math.isqrt(grid.shape[1]), math.isqrt(wanted.shape[1] - ours)
    changes = []
    if old != new:
        from timm.layers import resample_abs_pos_embed

        grid = resample_abs_pos_embed(grid, [new, new], [old, old], num_prefix_tokens=0)
        changes.append(f"positions of {old} x {old} patches interpolated to {new} x {new}")
    if ours == 0 and prefix:
        theirs["cls_token"] = theirs["cls_token"] + head[:, :1]
        head = head[:, :0]
    elif prefix < ours:
        head = torch.cat([head, head.new_zeros(1, ours - prefix, head.shape[-1])], dim=1)
    theirs["pos_embed"] = torch.cat([head[:, :ours], grid], dim=1)
    return changes


def _prefix_of(length: int, theirs: Tensors) -> int:
    """The number of positions of prefix tokens: the others, of patches, form a square."""
    registers = theirs["reg_token"].shape[1] if "reg_token" in theirs else 0
    for prefix in (0, 1, 1 + registers, 2):
        if math.isqrt(length - prefix) ** 2 == length - prefix:
            return prefix
    return 0


def _position_biases(theirs: Tensors, own: Tensors, backbone: Any) -> list[str]:
    """Adapt relative positions to the encoder's grid; copy a shared table to each block if
    needed."""
    from timm.layers import resize_rel_pos_bias_table

    shared = "rel_pos_bias.relative_position_bias_table"
    each = [n for n in own if n.endswith(".attn.relative_position_bias_table")]
    if shared in theirs and each:
        table = theirs.pop(shared)
        theirs.update({name: table.clone() for name in each})
    changes: list[str] = []
    for name in [n for n in theirs if n.endswith("relative_position_bias_table") and n in own]:
        theirs_side, side = (
            (math.isqrt(t.shape[0] - 3) + 1) // 2 for t in (theirs[name], own[name])
        )
        if theirs_side != side and theirs[name].shape[1] == own[name].shape[1]:
            shape = tuple(own[name].shape)
            theirs[name] = resize_rel_pos_bias_table(theirs[name], (side, side), shape)
            changes = [f"relative positions of {theirs_side} x {theirs_side} patches interpolated"]
    for name in [n for n in theirs if n.endswith("relative_position_index")]:
        del theirs[name]
    return changes


def fitted_for(reference: str, encoder: EncoderConfig, least: float) -> Fitted:
    """Read public weights and fit them to an encoder. Raises the errors of `read` and
    `Fitted.refuse`: at least the share `least` of the encoder's weights must fit."""
    found = fit(read(reference), encoder.build())
    found.refuse(least)
    return found
