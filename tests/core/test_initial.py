"""Where the methods start: first weights, what weight decay falls on and what is trained, against
the papers' and their authors' settings, whose numbers are written out here."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import BEIT, RESNET, VIT, experiment, positions, prepared, start, tiny, train_for
from selfray.method import Method, MethodConfig
from selfray.methods.beit import BEiTConfig
from selfray.methods.byol import BYOLConfig
from selfray.methods.dino import DINOConfig
from selfray.methods.dinov2 import DINOv2Config
from selfray.methods.mae import MAEConfig
from selfray.methods.moco import MoCoConfig
from selfray.methods.mocov3 import MoCoV3Config
from selfray.methods.simclr import SimCLRConfig
from selfray.models.batchnorm import with_grouped_batchnorm
from selfray.models.encoder import Encoder, EncoderConfig, export_weights, import_weights
from selfray.models.heads import PrototypeHead
from selfray.optim import OptimizerConfig
from selfray.schedules import Constant

ONE_BLOCK = EncoderConfig("vit_base_patch16_224", depth=1)
"""ViT-B's widths, whose deviations the issue's numbers are of."""
CUT = 0.53956
"""Deviation of a standard normal that is cut off at one deviation."""


def built(method: MethodConfig, encoder: EncoderConfig, device: str = "cpu") -> Method:
    torch.manual_seed(0)
    with torch.device(device):
        return method.build(encoder.build())


def std(tensor: Tensor) -> float:
    return float(tensor.detach().std(correction=0))


def is_uniform(tensor: Tensor, bound: float) -> bool:
    """Within the bound, up to it, and with a uniform distribution's deviation."""
    largest = float(tensor.detach().abs().max())
    return (
        0.98 * bound < largest <= bound * (1 + 1e-6)
        and abs(std(tensor) / (bound / math.sqrt(3)) - 1) < 0.02
    )


def is_zero(*tensors: Tensor | None) -> bool:
    return all(tensor is not None and not tensor.any() for tensor in tensors)


# First weights


def test_mae_starts_xavier_uniform_with_its_patches_as_a_matrix():
    small = MAEConfig(decoder_width=64, decoder_depth=1, decoder_heads=2)
    method = built(small, replace(ONE_BLOCK, position="sincos"))
    backbone: Any = method.encoder.backbone
    block = backbone.blocks[0]
    # sqrt(6 / (768 + 768)), 2304 + 768, 3072 + 768.
    assert is_uniform(backbone.patch_embed.proj.weight, math.sqrt(6 / 1536))
    assert is_uniform(block.attn.proj.weight, math.sqrt(6 / 1536))
    assert is_uniform(block.attn.qkv.weight, math.sqrt(6 / 3072))
    assert is_uniform(block.mlp.fc1.weight, math.sqrt(6 / 3840))
    assert std(backbone.patch_embed.proj.weight) == pytest.approx(0.0361, rel=0.01)
    assert std(block.attn.qkv.weight) == pytest.approx(0.0255, rel=0.01)
    assert is_zero(block.attn.qkv.bias, block.attn.proj.bias, block.mlp.fc1.bias)
    assert std(backbone.cls_token) == pytest.approx(0.02, rel=0.1)
    assert std(method.get_parameter("mask_token")) == pytest.approx(0.02, rel=0.3)
    norms = [m for m in method.modules() if isinstance(m, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}


def test_mocov3_freezes_a_patch_embedding_of_its_paper_s_scale():
    config = MoCoV3Config(projector_hidden=16, projector_width=8)
    method = built(config, EncoderConfig("vit_small_patch16_224", depth=1, position="sincos"))
    backbone: Any = method.encoder.backbone
    projection, attention = backbone.patch_embed.proj, backbone.blocks[0].attn
    # sqrt(6 / (3 * 16^2 + 384)); qkv's three matrices of 384 x 384 apart; Xavier for the others.
    assert is_uniform(projection.weight, math.sqrt(6 / 1152))
    assert std(projection.weight) == pytest.approx(0.0417, rel=0.01)
    assert is_uniform(attention.qkv.weight, math.sqrt(6 / 768))
    assert std(attention.qkv.weight) == pytest.approx(0.051, rel=0.01)
    assert is_uniform(backbone.blocks[0].mlp.fc2.weight, math.sqrt(6 / 1920))
    assert is_zero(projection.bias, attention.qkv.bias, attention.proj.bias)
    assert float(backbone.cls_token.detach().abs().max()) < 1e-5
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert not any("patch_embed" in name for name in trained)


def test_beit_starts_from_a_normal_cut_off_at_one_deviation():
    encoder = replace(BEIT, width=384, heads=6, depth=3)
    method = built(tiny(BEiTConfig), encoder)
    backbone: Any = method.encoder.backbone
    for weight in (
        backbone.blocks[0].attn.qkv.weight,
        backbone.patch_embed.proj.weight,
        method.get_parameter("head.weight"),
        backbone.cls_token,
    ):
        assert float(weight.detach().abs().max()) <= 0.02
        assert std(weight) == pytest.approx(0.02 * CUT, rel=0.1)
    assert is_zero(backbone.patch_embed.proj.bias, method.get_parameter("head.bias"))
    assert is_zero(backbone.rel_pos_bias.relative_position_bias_table)
    for depth, block in enumerate(backbone.blocks, start=1):
        for layer in (block.attn.proj, block.mlp.fc2):
            assert std(layer.weight) == pytest.approx(0.02 * CUT / math.sqrt(2 * depth), rel=0.02)


@pytest.mark.parametrize(("kind", "deviation"), [(DINOConfig, 0.02), (DINOv2Config, 1e-6)])
def test_dino_and_dinov2_start_their_class_tokens_and_gates_as_their_authors(kind, deviation):
    method = built(tiny(kind), replace(VIT, width=96, swiglu=True))
    backbone: Any = method.encoder.backbone
    assert std(backbone.cls_token) == pytest.approx(deviation, rel=0.2)
    gate = backbone.blocks[0].mlp.fc1_g
    assert std(gate.weight) == pytest.approx(0.02, rel=0.05)
    assert is_zero(gate.bias)


def test_prototypes_start_as_a_linear_layer_of_pytorch_s():
    torch.manual_seed(0)
    head = PrototypeHead(32, hidden=64, bottleneck=256, prototypes=512)
    # Uniform within 1 / sqrt(256): rows of length sqrt(1 / 3).
    assert is_uniform(head.prototypes.weight, 1 / 16)
    assert float(head.prototypes.weight.detach().norm(dim=1).mean()) == pytest.approx(
        0.577, rel=0.01
    )
    linear = head.mlp[2]
    assert isinstance(linear, nn.Linear)
    assert std(linear.weight) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("method", "name", "gain"),
    [
        (SimCLRConfig(), "resnet18", 0.0),
        (SimCLRConfig(), "resnet50", 0.0),
        (MoCoConfig(queue_size=8), "resnet18", 1.0),
        (MoCoConfig(queue_size=8), "resnet50", 1.0),
        (MoCoV3Config(projector_hidden=8, projector_width=4), "resnet50", 0.0),
        (BYOLConfig(projector_hidden=8, projector_width=4), "resnet18", 1.0),
        (BYOLConfig(projector_hidden=8, projector_width=4), "resnet50", 0.0),
        (tiny(DINOConfig), "resnet50", 1.0),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_last_gain_of_a_resnets_blocks_is_the_authors(method, name, gain):
    narrow = {"channels": (8, 8, 8, 8), "layers": (1, 1, 1, 1), "small_stem": True}
    encoder = built(method, EncoderConfig(name, image_size=32, **narrow)).encoder
    last = ".bn3.weight" if name == "resnet50" else ".bn2.weight"
    gains = [p for key, p in encoder.named_parameters() if key.endswith(last)]
    assert len(gains) == 4
    assert all(torch.equal(p, torch.full_like(p, gain)) for p in gains)


# Heads


def trained_names(method: Method) -> set[str]:
    return {name for name, parameter in method.named_parameters() if parameter.requires_grad}


def test_heads_end_without_a_bias():
    byol = trained_names(built(tiny(BYOLConfig), RESNET))
    assert {"projector.3.weight", "predictor.3.weight"} <= byol
    assert {"projector.3.bias", "predictor.3.bias"} & byol == set()
    mocov3 = trained_names(built(tiny(MoCoV3Config), RESNET))
    assert "predictor.3.weight" in mocov3
    assert "predictor.3.bias" not in mocov3
    # SimCLR's last batch norm has a scale and no centre.
    simclr = built(tiny(SimCLRConfig), RESNET)
    assert {name for name in trained_names(simclr) if name.startswith("projector.5")} == {
        "projector.5.weight"
    }
    assert not any(name.startswith("projector.4") for name in trained_names(simclr))


def test_dinov2_trains_the_lengths_of_its_prototypes_from_1_on():
    wanted = experiment(tiny(DINOv2Config), VIT)
    state = start(wanted)
    norms = state.method.get_parameter("student_head.norms")
    assert norms.requires_grad
    assert torch.equal(norms, torch.ones_like(norms))
    train_for(state, wanted, 3)
    assert not torch.equal(norms, torch.ones_like(norms))
    without = trained_names(built(replace(tiny(DINOv2Config), free_norms=False), VIT))
    assert "student_head.norms" not in without


# Weight decay


def decayed(method: Method) -> dict[str, bool]:
    """By name, whether the optimizer's group of a trainable parameter is decayed."""
    optimizer = OptimizerConfig("adamw").build(method, method.is_decayed)
    groups = {id(p): group["decays"] for group in optimizer.param_groups for p in group["params"]}
    return {name: groups[id(p)] for name, p in method.named_parameters() if id(p) in groups}


def is_vector(method: Method, name: str) -> bool:
    parameter = method.get_parameter(name)
    return max(parameter.shape, default=1) == parameter.numel()


@pytest.mark.parametrize(
    ("method", "encoder", "vectors"),
    [
        # A ResNet-50's 53 batch norms, and the biases of the head.
        (MoCoConfig(head="linear"), EncoderConfig("resnet50"), 107),
        (MoCoConfig(), EncoderConfig("resnet50"), 108),
        # 12 blocks of 4 norms' and 4 layers' tensors, the last norm, the class token, 6 of heads.
        (MoCoV3Config(), EncoderConfig("vit_small_patch16_224", position="sincos"), 105),
    ],
    ids=["v1", "v2", "v3"],
)
def test_moco_decays_every_parameter(method, encoder, vectors):
    module = built(method, encoder, "meta")
    groups = decayed(module)
    assert groups
    assert all(groups.values())
    assert sum(is_vector(module, name) for name in groups) == vectors


@pytest.mark.parametrize(
    ("method", "encoder", "expected"),
    [
        (tiny(SimCLRConfig), RESNET, set()),
        (tiny(BYOLConfig), RESNET, set()),
        (tiny(MAEConfig), VIT, {"mask_token", "encoder.backbone.cls_token"}),
        (tiny(BEiTConfig), BEIT, {"mask_token"}),
        (
            replace(tiny(DINOConfig), free_norms=True),
            VIT,
            {"student.backbone.cls_token", "student_head.norms"},
        ),
        (
            replace(tiny(DINOv2Config), separate_heads=True),
            replace(VIT, registers=1, layer_scale=0.1),
            {
                "mask_token",
                "student.backbone.cls_token",
                "student.backbone.reg_token",
                "student_head.norms",
                "student_patch_head.norms",
            },
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_vectors_that_are_decayed_are_the_authors_ones_and_all_matrices_are(
    method, encoder, expected
):
    module = built(method, encoder)
    groups = decayed(module)
    assert {name for name, on in groups.items() if on and is_vector(module, name)} == expected
    spared = {name for name, on in groups.items() if not on}
    assert all(is_vector(module, name) for name in spared)


def test_lars_decays_no_vector_whatever_the_method():
    module = built(tiny(MoCoV3Config), RESNET)
    optimizer = OptimizerConfig("lars").build(module, module.is_decayed)
    assert all(group["decays"] != group["is_vector"] for group in optimizer.param_groups)


def test_a_run_that_began_with_one_rule_for_all_goes_on_by_it():
    decays = OptimizerConfig("adamw", 1e-3, weight_decay=Constant(0.1))
    wanted = experiment(MAEConfig(decoder_width=32, decoder_depth=1, decoder_heads=2), VIT)
    wanted = replace(wanted, optimizer=decays)
    first = start(wanted)
    train_for(first, wanted, 2)
    saved = first.state_dict()
    names = [group["params"] for group in saved["optimizer"]["param_groups"]]
    # As the first version wrote it: two groups, matrices and the other parameters in their order.
    order = {id(p): place for place, p in enumerate(first.method.parameters())}
    ours = [p for group in first.optimizer.param_groups for p in group["params"]]
    flat = [number for group in names for number in group]
    vectors = sorted((p for p in ours if max(p.shape) == p.numel()), key=lambda p: order[id(p)])
    matrices = [p for p in ours if max(p.shape) < p.numel()]
    state = {id(p): saved["optimizer"]["state"][n] for p, n in zip(ours, flat, strict=True)}
    old = {
        "state": {n: state[id(p)] for n, p in enumerate([*matrices, *vectors])},
        "param_groups": [
            {
                name: value
                for name, value in saved["optimizer"]["param_groups"][0].items()
                if name not in ("params", "decays", "is_vector")
            }
            | {"is_vector": is_vector, "params": places}
            for is_vector, places in (
                (False, list(range(len(matrices)))),
                (True, list(range(len(matrices), len(ours)))),
            )
        ],
    }
    resumed = start(wanted)
    resumed.load_state_dict(saved | {"optimizer": old})
    train_for(resumed, wanted, 1)
    assert [g["weight_decay"] for g in resumed.optimizer.param_groups] == [0.1, 0.0]
    token = resumed.method.get_parameter("mask_token")
    assert int(resumed.optimizer.state[token]["step"]) == 3


# Positions and widths


def test_local_crops_have_positions_by_plain_bicubic_interpolation_of_the_authors_scale():
    torch.manual_seed(0)
    encoder = EncoderConfig("vit_small_patch16_224", depth=1).build().eval()
    backbone: Any = encoder.backbone
    images = torch.randn(1, 3, 96, 96)
    grid = backbone.pos_embed[:, 1:].reshape(1, 14, 14, 384).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, scale_factor=6.1 / 14, mode="bicubic")
    assert expected.shape[2:] == (6, 6)
    assert 0.015 < std(expected) < 0.02  # antialiased: 0.0072
    embedded = backbone.patch_embed(images).flatten(1, 2) + expected.flatten(2).mT
    cls = backbone.cls_token + backbone.pos_embed[:, :1]
    with torch.no_grad():
        tokens = backbone.norm(backbone.blocks(torch.cat([cls, embedded], dim=1)))
        torch.testing.assert_close(encoder(images).patches, tokens[:, 1:])
        # At its own size, the export is timm's own forward.
        whole = torch.randn(1, 3, 224, 224)
        torch.testing.assert_close(encoder(whole).cls, backbone(whole))


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("vit_small_patch16_224", 1024),
        ("vit_large_patch16_224", 2736),  # DINOv2's, where two thirds of 4096 are 2730
        ("vit_giant_patch14_224", 3760),
    ],
)
def test_gated_layers_are_as_wide_as_dinov2_s(name, hidden):
    config = EncoderConfig(name, depth=1, swiglu=True)
    with torch.device("meta"):
        backbone: Any = config.build().backbone
    assert backbone.blocks[0].mlp.fc1_x.out_features == hidden


# MoCo on one worker


def test_grouped_batch_norm_is_batch_norm_of_each_group():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(3))
    with torch.no_grad():
        plain[0].weight.uniform_(0.5, 2)  # type: ignore[union-attr]
    grouped = with_grouped_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), 4)
    grouped.load_state_dict(plain.state_dict())
    rows = torch.randn(8, 3, 5, 5) + torch.arange(8).view(8, 1, 1, 1)
    apart = torch.cat([plain(part) for part in rows.split(2)])
    torch.testing.assert_close(grouped(rows), apart)
    # The running mean is that of the groups' means.
    torch.testing.assert_close(
        grouped.get_buffer("0.running_mean"), 0.1 * rows.mean((0, 2, 3)), rtol=1e-5, atol=1e-6
    )
    grouped.eval()
    plain.eval()
    plain.load_state_dict(grouped.state_dict())
    torch.testing.assert_close(grouped(rows), plain(rows))


def test_moco_s_groups_deal_the_keys_out_anew_and_give_each_query_its_own_key():
    wanted = experiment(replace(tiny(MoCoConfig), batchnorm_groups=2), RESNET)
    method: Any = start(wanted).method
    images = prepared(positions(0, 8, wanted), wanted)["global"][:, 1]
    for step in range(3):
        keys = method._keys(images, step)
        order = torch.randperm(8, generator=torch.Generator().manual_seed(step))
        assert not torch.equal(order, torch.arange(8))
        expected = method.key_head(method.key_encoder(images[order]).cls)
        torch.testing.assert_close(keys[order], expected)
    encoders = [module for module in method.modules() if isinstance(module, Encoder)]
    norms = [m for e in encoders for m in e.modules() if hasattr(m, "running_mean")]
    assert {getattr(norm, "groups", None) for norm in norms} == {2}


def test_moco_refuses_groups_that_a_batch_does_not_divide_into():
    with pytest.raises(ValueError, match=r"batch_size 8 does not divide into --method\.batchnorm"):
        experiment(replace(tiny(MoCoConfig), batchnorm_groups=3), RESNET)
    with pytest.raises(ValueError, match="batchnorm_groups 2 is for encoders with batch norm"):
        experiment(replace(tiny(MoCoConfig), batchnorm_groups=2), VIT)


def test_gated_weights_of_before_they_were_rounded_are_refused_with_the_reason():
    encoder = replace(VIT, swiglu=True).build()
    weights = export_weights(encoder)
    old = {
        name: tensor[:85] if ".mlp.fc1" in name else tensor[:, :85] if ".fc2.w" in name else tensor
        for name, tensor in weights.items()
    }
    with pytest.raises(ValueError, match="written before gated layers were rounded to"):
        import_weights(encoder, old)
