"""Layouts of published encoders: recognised by their tensors' names, and converted to timm's names.

The names come from the public code of DINO, DINOv2, DINOv3, MAE, MoCo, BEiT, torchvision and timm.
Conversion only renames tensors, splits them or adds them up.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Named:
    """An encoder's tensors under timm's names."""

    layout: str
    """Name of the file's layout."""
    tensors: Tensors
    left_out: tuple[str, ...] = ()
    """Names of tensors in the file that do not belong to the encoder: heads, decoders, queues."""
    facts: Mapping[str, int | str] = field(default_factory=dict)
    """Fields of an EncoderConfig that follow from the layout and not from the shapes."""
    licence: str | None = None
    """The licence of the layout's publisher, if it has its own."""


_INSIDE = ("teacher", "model_ema", "model", "state_dict", "module", "student")
"""Keys under which files hold their weights; the encoder that the authors evaluate comes first."""

_PREFIXES = (
    ("module.encoder_q.", "MoCo"),
    ("encoder_q.", "MoCo"),
    ("module.base_encoder.", "MoCo v3"),
    ("base_encoder.", "MoCo v3"),
    ("module.backbone.", ""),
    ("backbone.", ""),
    ("module.", ""),
    ("", ""),
)
_FIRST_LAYERS = ("patch_embed.proj.weight", "conv_proj.weight", "conv1.weight")

DINOV3_LICENCE = "DINOv3 License, https://ai.meta.com/resources/models-and-libraries/dinov3-license"

KNOWN = (
    "DINO, DINOv2, DINOv3, MAE, MoCo v1 to v3, BEiT, and torchvision's and timm's ResNets and ViTs"
)


def named(content: object, source: str) -> Named:
    """The encoder in a file's content, under timm's names.

    Args:
        content: the value returned by torch.load or safetensors.
        source: the file, for messages.

    Raises:
        ValueError: the layout is unknown; the message lists the known ones.
    """
    found = _unwrapped(content)
    for prefix, owner in _PREFIXES:
        inner = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
        if any(name in inner for name in _FIRST_LAYERS):
            outside = tuple(name for name in found if not name.startswith(prefix))
            return _by_layout(inner, owner, outside)
    shown = ", ".join(list(found)[:3]) or "no tensor at all"
    raise ValueError(
        f"--init-from {source} has an unknown layout, it holds {shown}: known are {KNOWN}; load it "
        "with its own code and save its encoder under timm's names"
    )


def _unwrapped(content: object) -> Tensors:
    while isinstance(content, Mapping):
        inner = next((content[k] for k in _INSIDE if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        content = inner
    return {}


def _by_layout(tensors: Tensors, owner: str, outside: tuple[str, ...]) -> Named:
    # Blocks in chunks, as DINOv2's training writes them: blocks.0.3.norm1 is block 3.
    tensors = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in tensors.items()}
    names = tensors.keys()
    facts: dict[str, int | str] = {}
    licence = None
    rename: Callable[[Tensors], Tensors] = dict
    if "conv_proj.weight" in names:
        layout, rename = "torchvision's ViT", _from_torchvision
    elif "storage_tokens" in names or "rope_embed.periods" in names:
        layout, rename, licence = "DINOv3", _from_dinov3, DINOV3_LICENCE
    elif any(name.endswith("relative_position_bias_table") for name in names):
        shared = "rel_pos_bias.relative_position_bias_table" in names
        layout, facts["position"] = "BEiT", "relative" if shared else "relative_each"
    elif "conv1.weight" in names:
        layout = "MoCo" if owner else "ResNet"
    elif _is_rotary(tensors):
        layout = "timm's rotary ViT"
        facts["position"] = "rotary"
    elif "register_tokens" in names or ("mask_token" in names and tensors["mask_token"].ndim == 2):
        layout, rename = "DINOv2", _from_dinov2
    elif any(name.startswith("decoder_") for name in names):
        layout, facts["position"] = "MAE", "sincos"
    elif owner:
        layout, facts["position"] = "MoCo v3", "sincos"
        if tensors["patch_embed.proj.weight"].shape[0] == 384:
            facts["heads"] = 12  # MoCo v3's ViT-S has twice the usual heads (arXiv:2104.02057)
    else:
        layout = "ViT"
        if any(".ls1.gamma" in name for name in names):
            layout, rename = "DINOv2", _from_dinov2  # some files have no mask token
    renamed = rename(tensors)
    kept = {name: tensor.float() for name, tensor in renamed.items() if not _OUTSIDE.match(name)}
    left = (*outside, *(name for name in renamed if _OUTSIDE.match(name)))
    return Named(layout, kept, left, facts, licence)


_OUTSIDE = re.compile(
    r"(mask_token|decoder_|head|heads\.|head_dist|fc\.|classifier|lm_head|projector|predictor"
    r"|dino_head|ibot_head|cls_pt_layers|local_cls_norm|projectors\.|norm_pix)"
)
"""Tensors that do not belong to the encoder, under timm's names."""


def _is_rotary(tensors: Tensors) -> bool:
    names = tensors.keys()
    if "rope.freqs" in names or "blocks.0.attn.q_proj.weight" in names:
        return True
    return "pos_embed" not in names and "blocks.0.gamma_1" in names and "reg_token" in names


def _from_dinov2(tensors: Tensors) -> Tensors:
    """Rename gated layers to timm's packed form. With registers, timm has positions only for
    patches: that of the class token is added to the token."""
    found = {_packed(name): tensor for name, tensor in tensors.items()}
    if "register_tokens" in found:
        found["reg_token"] = found.pop("register_tokens")
        found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
        found["pos_embed"] = found["pos_embed"][:, 1:]
    return found


def _packed(name: str) -> str:
    return name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")


_DINOV3 = (
    ("storage_tokens", "reg_token"),
    (".ls1.gamma", ".gamma_1"),
    (".ls2.gamma", ".gamma_2"),
    (".mlp.w1.", ".mlp.fc1_g."),
    (".mlp.w2.", ".mlp.fc1_x."),
    (".mlp.w3.", ".mlp.fc2."),
)


def _from_dinov3(tensors: Tensors) -> Tensors:
    """Rename to timm's Eva. The bias of keys is dropped: the authors' code masks it to 0."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith("rope_embed.") or name.endswith(".bias_mask"):
            continue  # computed from the settings
        if name.endswith(".attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            found[name.replace("qkv.bias", "q_bias")] = query
            found[name.replace("qkv.bias", "v_bias")] = value
            continue
        for theirs, ours in _DINOV3:
            name = name.replace(theirs, ours)
        found[name] = tensor
    return found


_TORCHVISION = (
    ("class_token", "cls_token"),
    ("conv_proj.", "patch_embed.proj."),
    ("encoder.pos_embedding", "pos_embed"),
    ("encoder.ln.", "norm."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".self_attention.in_proj_", ".attn.qkv."),
    (".self_attention.out_proj.", ".attn.proj."),
    (".mlp.linear_1.", ".mlp.fc1."),
    (".mlp.linear_2.", ".mlp.fc2."),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.3.", ".mlp.fc2."),
)


def _from_torchvision(tensors: Tensors) -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1.", name)
        for theirs, ours in _TORCHVISION:
            name = name.replace(theirs, ours)
        found[name] = tensor
    return found
