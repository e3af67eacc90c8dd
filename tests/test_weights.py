"""Public weights: a file of each layout, written from random weights, gives timm's own features."""

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from helpers import BEIT, RESNET, VIT
from selfray.models import layouts
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.models.fitting import fit, fitted_for, for_channels
from selfray.models.layouts import named
from selfray.models.weights import architecture, encoder_of, is_public, read

Tensors = dict[str, Tensor]
LEARNED = replace(VIT, position="learned")
SCALED = replace(LEARNED, layer_scale=1e-5)
REGISTERS = replace(SCALED, name="vit_small_patch14_reg4_dinov2")
GATED = replace(SCALED, name="vit_giant_patch14_dinov2")
ROTARY = replace(VIT, name="vit_small_patch16_dinov3", position="rotary")
ROTARY_GATED = replace(ROTARY, name="vit_small_plus_patch16_dinov3")
ROTARY_BIASED = replace(ROTARY, name="vit_small_patch16_dinov3_qkvb")
BEIT_EACH = replace(BEIT, position="relative_each")


def published(config: EncoderConfig, seed: int = 0) -> nn.Module:
    """timm's own model of an encoder, with random weights in every tensor."""
    torch.manual_seed(seed)
    model = timm.create_model(config.name, **config.options)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.2)
    return model.eval()


def images(size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))


def renamed(tensors: Tensors, *pairs: tuple[str, str]) -> Tensors:
    """The same under other names, by regular expressions."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, other in pairs:
            name = re.sub(pattern, other, name)
        found[name] = tensor
    return found


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def dino(tensors: Tensors) -> Any:
    head = {"head.mlp.0.weight": torch.randn(4, 4), "head.last_layer.weight_g": torch.ones(4)}
    other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    return {
        "student": prefixed(other, "module.backbone."),
        "teacher": prefixed(tensors, "backbone.") | head,
        "epoch": 800,
        "args": argparse.Namespace(arch="vit_small", patch_size=16),
    }


def dinov2(tensors: Tensors) -> Any:
    return tensors | {"mask_token": torch.zeros(1, 32)}


def dinov2_with_registers(tensors: Tensors) -> Any:
    cls = torch.randn(1, 1, 32)  # the position of the class token is a part of its own there
    tensors = dict(tensors)
    tensors["cls_token"] = tensors["cls_token"] - cls
    tensors["pos_embed"] = torch.cat([cls, tensors["pos_embed"]], dim=1)
    return renamed(tensors, ("^reg_token$", "register_tokens")) | {"mask_token": torch.zeros(1, 32)}


def dinov2_gated(tensors: Tensors) -> Any:
    chunked = renamed(tensors, (r"mlp\.fc1\.", "mlp.w12."), (r"mlp\.fc2\.", "mlp.w3."))
    chunked = renamed(chunked, (r"^blocks\.(\d)\.", r"blocks.0.\1."))
    chunked["mask_token"] = torch.zeros(1, 32)
    return {"teacher": prefixed(chunked, "backbone.") | {"dino_head.mlp.0.weight": torch.ones(2)}}


def mae(tensors: Tensors) -> Any:
    decoder = {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_pos_embed": torch.randn(1, 17, 16),
        "decoder_embed.weight": torch.randn(16, 32),
        "decoder_blocks.0.norm1.weight": torch.ones(16),
    }
    return {"model": tensors | decoder}


def moco(tensors: Tensors) -> Any:
    heads = {"module.encoder_q.fc.0.weight": torch.randn(4, 4), "module.queue": torch.randn(4, 8)}
    keys = {f"module.encoder_k.{name}": torch.zeros_like(t) for name, t in tensors.items()}
    state = prefixed(tensors, "module.encoder_q.") | keys | heads
    return {"epoch": 200, "arch": "resnet50", "state_dict": state}


def mocov3(tensors: Tensors) -> Any:
    heads = {
        "module.base_encoder.head.0.weight": torch.randn(4, 4),
        "module.predictor.0.weight": torch.randn(4, 4),
    }
    return {"arch": "vit_small", "state_dict": prefixed(tensors, "module.base_encoder.") | heads}


def beit(tensors: Tensors) -> Any:
    index = {"rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}
    return {"model": tensors | index | {"mask_token": torch.zeros(1, 1, 32), "lm_head.bias": torch.ones(9)}}


def torchvision_vit(tensors: Tensors) -> Any:
    return renamed(
        tensors,
        ("^cls_token$", "class_token"),
        (r"^patch_embed\.proj\.", "conv_proj."),
        ("^pos_embed$", "encoder.pos_embedding"),
        (r"^norm\.", "encoder.ln."),
        (r"\.norm(\d)\.", r".ln_\1."),
        (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
        (r"\.attn\.proj\.", ".self_attention.out_proj."),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.3."),
        (r"^blocks\.(\d)\.", r"encoder.layers.encoder_layer_\1."),
    ) | {"heads.head.weight": torch.randn(5, 32)}


def dinov3(tensors: Tensors) -> Any:
    tensors = dict(tensors)
    for block in range(2):
        query = tensors.pop(f"blocks.{block}.attn.q_bias", torch.zeros(32))
        value = tensors.pop(f"blocks.{block}.attn.v_bias", torch.zeros(32))
        key = torch.full((32,), 7.0)  # what the mask hides
        tensors[f"blocks.{block}.attn.qkv.bias"] = torch.cat([query, key, value])
        tensors[f"blocks.{block}.attn.qkv.bias_mask"] = torch.ones(96)
    return renamed(
        tensors,
        ("^reg_token$", "storage_tokens"),
        (r"\.gamma_(\d)$", r".ls\1.gamma"),
        (r"\.mlp\.fc1_g\.", ".mlp.w1."),
        (r"\.mlp\.fc1_x\.", ".mlp.w2."),
        *([(r"\.mlp\.fc2\.", ".mlp.w3.")] if "blocks.0.mlp.fc1_g.weight" in tensors else []),
    ) | {"rope_embed.periods": torch.ones(4), "mask_token": torch.zeros(1, 32)}


def torchvision_resnet(tensors: Tensors) -> Any:
    return tensors | {"fc.weight": torch.randn(5, 16), "fc.bias": torch.randn(5)}


WIDE_STEM = replace(RESNET, small_stem=False, image_size=32)
LAYOUTS: list[tuple[str, EncoderConfig, Callable[[Tensors], Any], str]] = [
    ("dino", LEARNED, dino, "ViT"),
    ("dinov2", SCALED, dinov2, "DINOv2"),
    ("dinov2-registers", REGISTERS, dinov2_with_registers, "DINOv2"),
    ("dinov2-gated", GATED, dinov2_gated, "DINOv2"),
    ("mae", VIT, mae, "MAE"),
    ("moco", WIDE_STEM, moco, "MoCo"),
    ("mocov3-resnet", WIDE_STEM, mocov3, "MoCo"),
    ("mocov3-vit", VIT, mocov3, "MoCo v3"),
    ("beit", BEIT, beit, "BEiT"),
    ("beit-fine-tuned", BEIT_EACH, beit, "BEiT"),
    ("torchvision-vit", LEARNED, torchvision_vit, "torchvision's ViT"),
    ("torchvision-resnet", WIDE_STEM, torchvision_resnet, "ResNet"),
    ("timm-vit", LEARNED, dict, "ViT"),
    ("dinov3", ROTARY, dinov3, "DINOv3"),
    ("dinov3-gated", ROTARY_GATED, dinov3, "DINOv3"),
    ("dinov3-biases", ROTARY_BIASED, dinov3, "DINOv3"),
    ("timm-rotary", ROTARY, dict, "timm's rotary ViT"),
]


@pytest.mark.parametrize(
    ("config", "layout", "name"), [(c, f, n) for _, c, f, n in LAYOUTS], ids=[i for i, *_ in LAYOUTS]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_each_layout_gives_the_features_of_timms_own_model(
    config: EncoderConfig, layout: Any, name: str, suffix: str, tmp_path: Path
):
    model = published(config)
    content = layout(model.state_dict())
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(content, file)
    else:
        flat = layouts._unwrapped(content)
        safetensors.torch.save_file({k: v.contiguous().clone() for k, v in flat.items()}, str(file))
    found = fitted_for(str(file), config, least=1.0)
    assert (found.weights.named.layout, found.share, found.missing) == (name, 1.0, ())
    encoder = config.build().eval()
    found.put_into(encoder)
    batch = images(config.image_size)
    with torch.no_grad():
        expected = model(batch)
        torch.testing.assert_close(encoder(batch).cls, expected, rtol=1e-5, atol=1e-5)
