import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from helpers import BEIT, RESNET, VIT
from selfray.distributed import GlobalBatchNorm, with_global_batchnorm
from selfray.models import names
from selfray.models.encoder import (
    Encoder,
    EncoderConfig,
    encode_uint8,
    export_weights,
    import_weights,
    normalize,
)
from selfray.models.heads import projector
from selfray.models.vit import sincos_positions

REGISTERS = EncoderConfig(
    "vit_small_patch14_reg4_dinov2", image_size=16, patch_size=4, width=32, depth=1, heads=2
)


def build(config: EncoderConfig) -> Encoder:
    """An encoder in eval mode whose norms are not at their initial values."""
    torch.manual_seed(0)
    encoder = config.build()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        encoder.train()
        encoder(images(8, config.image_size))
    return encoder.eval()


def images(count: int = 3, size: int = 16, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator)


DINOV2 = replace(
    VIT, position="learned", registers=4, swiglu=True, layer_scale=1e-5, drop_path_uniform=True
)

ROTARY = replace(VIT, name="vit_small_patch16_dinov3", position="rotary")

# Names


def test_the_names_read_from_timms_source_are_timms_own():
    assert set(names.known()) == set(timm.list_models())
    for name in names.known():
        assert timm.model_entrypoint(name).__module__ == names.built_by(name)
    assert names.is_model("vit_small_patch14_dinov2.lvd142m")
    assert names.is_model("adv_inception_v3"), "a name of old"
    assert not names.is_model("vit_smal_patch16_224")
    assert names.similar("vit_smal_patch16_224")[0] == "vit_small_patch16_224"


# Features


def test_a_vit_gives_its_class_token_and_a_feature_for_each_patch():
    features = build(VIT)(images())
    assert features.cls.shape == (3, 32)
    assert features.patches.shape == (3, 16, 32)


@pytest.mark.parametrize(
    "config",
    [
        BEIT,
        replace(BEIT, swiglu=True),
        DINOV2,
        replace(BEIT, position="relative_each"),
        ROTARY,
        replace(ROTARY, registers=2, swiglu=True, layer_scale=0.1, drop_path_uniform=True),
        replace(ROTARY, name="eva02_tiny_patch14_224"),
        replace(ROTARY, name="vit_small_patch16_rope_mixed_224"),
        EncoderConfig("deit3_small_patch16_224", 16, patch_size=4, width=32, depth=2, heads=2),
        EncoderConfig("vit_base_patch16_reg4_gap_256", 32, width=32, depth=2, heads=2),
        EncoderConfig("convnext_tiny", 32, channels=None),
        EncoderConfig("efficientnet_b0", 32),
        EncoderConfig("regnety_002", 32),
    ],
    ids=lambda config: f"{config.name}{'-swiglu' * config.swiglu}",
)
def test_encoders_of_other_names_go_home_into_plain_timm(config):
    encoder = build(config)
    batch = images(size=config.image_size)
    plain: Any = timm.create_model(config.name, **config.options)
    plain.load_state_dict(export_weights(encoder), strict=True)
    features = encoder(batch)
    torch.testing.assert_close(plain.eval()(batch), features.cls)
    assert features.cls.shape == (3, encoder.width)
    assert features.patches.shape[::2] == (3, encoder.width)


@pytest.mark.parametrize("name", ["dinov3", "rope_mixed_224"])
def test_a_rotary_vits_patches_keep_their_places_where_others_are_left_out(name):
    encoder, batch = build(replace(ROTARY, name=f"vit_small_patch16_{name}")), images()
    order = torch.stack([torch.randperm(16) for _ in range(3)])
    shuffled, plain = encoder(batch, visible=order), encoder(batch)
    torch.testing.assert_close(shuffled.cls, plain.cls, rtol=1e-4, atol=1e-5)
    index = order.unsqueeze(-1).expand(-1, -1, 32)
    torch.testing.assert_close(
        shuffled.patches, plain.patches.gather(1, index), rtol=1e-4, atol=1e-5
    )
    few = torch.tensor([[5, 1, 2]] * 3)
    some = encoder(batch, visible=few)
    batch[:, :, :4, :4] += 1.0  # patch 0, which is not seen
    assert torch.equal(encoder(batch, visible=few).cls, some.cls)
    assert encoder(images(size=8)).patches.shape == (3, 4, 32), "local crops have their own grid"


@pytest.mark.parametrize("config", [VIT, BEIT, DINOV2, ROTARY], ids=lambda config: config.name)
def test_the_mask_token_stands_where_a_patch_is_hidden(config):
    encoder, batch = build(config), images()
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, [0, 5, 6]] = True
    token = torch.randn(32)
    features = encoder(batch, mask=mask, mask_token=token)
    changed = batch.clone()
    changed[:, :, :4, :4] = 7.0  # patch 0
    torch.testing.assert_close(encoder(changed, mask=mask, mask_token=token), features)
    changed[:, :, :4, 4:8] = 7.0  # patch 1, which is seen
    assert not torch.allclose(encoder(changed, mask=mask, mask_token=token).cls, features.cls)
    assert not torch.allclose(encoder(batch, mask=mask, mask_token=token * 2).cls, features.cls)


def test_beits_blocks_share_one_relative_position_bias_and_have_no_other_position():
    backbone: Any = build(BEIT).backbone
    assert backbone.pos_embed is None
    tables = [name for name, _ in backbone.named_parameters() if "relative_position" in name]
    assert tables == ["rel_pos_bias.relative_position_bias_table"]
    assert backbone.rel_pos_bias.relative_position_bias_table.shape == (7 * 7 + 3, 2)


def test_dinov2s_blocks_are_gated_and_skipped_alike():
    backbone: Any = replace(DINOV2, drop_path=0.3).build().backbone
    assert backbone.num_prefix_tokens == 1 + 4
    for block in backbone.blocks:
        assert block.mlp.fc1_g.out_features == 88  # 85.3, up to a multiple of 8
        assert (block.drop_path1.drop_prob, block.drop_path2.drop_prob) == (0.3, 0.3)
        assert torch.equal(block.ls1.gamma, torch.full((32,), 1e-5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"registers": 2}, "encoder.registers 2 is for ViTs, not for resnet18"),
        ({"swiglu": True}, "encoder.swiglu True is for ViTs, not for resnet18"),
        ({"layer_scale": 0.1}, "encoder.layer_scale 0.1 is for ViTs, not for resnet18"),
        (
            {"name": "vit_tiny_patch16_224", "position": "relative"},
            "give --encoder.position learned or s",
        ),
        ({"name": "vit_small_patch16_dinov3", "position": "learned"}, "--encoder.position rotary"),
        ({"name": "beit_base_patch16_224"}, "position learned is not possible with beit_base_pa"),
    ],
)
def test_an_encoder_refuses_what_it_does_not_have(settings, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**{"name": "resnet18", "image_size": 32, **settings})


def test_backbones_of_an_unknown_shape_are_refused_by_name():
    with pytest.raises(ValueError, match="vit_relpos_small_patch16_224 does not take the option"):
        EncoderConfig("vit_relpos_small_patch16_224", 32, width=64, depth=1).build()
    with pytest.raises(ValueError, match="cannot be built: Token pooling needs the class token"):
        EncoderConfig("vit_medium_patch16_rope_reg1_gap_256", 32, position="rotary").build()
    swin = EncoderConfig("swin_tiny_patch4_window7_224", 224).build()
    with pytest.raises(ValueError, match="SwinTransformer does not end in a map"):
        swin(images(1, 224))


def test_a_resnet_gives_its_pooled_map_and_the_map_as_patches():
    encoder = build(RESNET)
    features = encoder(images())
    assert features.cls.shape == (3, encoder.width) == (3, 16)
    assert features.patches.shape == (3, 4, 16)  # 16 px, three strides of 2
    torch.testing.assert_close(features.patches.mean(1), features.cls)


def test_registers_are_no_patches():
    features = build(REGISTERS)(images())
    assert features.patches.shape == (3, 16, 32)


@pytest.mark.parametrize("config", [RESNET, VIT, REGISTERS])
def test_features_are_timms_own(config):
    encoder = build(config)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images()).cls, encoder.backbone(images()))


def test_visible_patches_are_seen_in_the_order_given():
    encoder = build(VIT)
    visible = torch.tensor([[3, 1, 7], [0, 15, 2], [4, 5, 6]])
    with torch.no_grad():
        forwards, backwards = encoder(images(), visible), encoder(images(), visible.flip(1))
    assert forwards.patches.shape == (3, 3, 32)
    torch.testing.assert_close(forwards.patches, backwards.patches.flip(1))
    torch.testing.assert_close(forwards.cls, backwards.cls)


def test_showing_all_patches_is_showing_the_image():
    encoder = build(VIT)
    everything = torch.arange(16).expand(3, -1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images(), everything), encoder(images()))


@pytest.mark.parametrize("config", [VIT, REGISTERS])
def test_hidden_pixels_do_not_reach_the_features(config):
    encoder = build(config)
    visible = torch.tensor([[0, 5, 10]]).expand(3, -1)
    changed = images().clone()
    for patch in set(range(16)) - {0, 5, 10}:
        row, column = divmod(patch, 4)
        changed[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = 1e3
    with torch.no_grad():
        seen, unseen = encoder(images(), visible), encoder(changed, visible)
        assert torch.equal(seen.cls, unseen.cls)
        assert torch.equal(seen.patches, unseen.patches)
        changed[:, :, :4, :4] = 0.0  # patch 0 is visible
        assert not torch.equal(seen.cls, encoder(changed, visible).cls)


def test_pixels_are_normalised_channel_by_channel():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4), np.uint8))
    mean, std = (0.1, 0.4, 0.8), (0.2, 0.3, 0.5)
    found = normalize(pixels, mean, std)
    for channel in range(3):
        expected = (pixels[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(found[:, channel].double(), expected, rtol=1e-5, atol=1e-6)
    encoder = build(VIT)
    views = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = encoder(normalize(views, mean, std)).cls
    torch.testing.assert_close(encode_uint8(encoder, views, mean, std).cls, expected)


# Positions


def test_sincos_positions_are_their_formula():
    width, grid = 8, 3
    found = sincos_positions(width, grid)
    for row in range(grid):
        for column in range(grid):
            expected = []
            for place in (column, row):
                angles = [place / 10_000 ** (i / (width // 4)) for i in range(width // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert found[row * grid + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_sincos_positions_are_fixed_and_zero_for_the_class_token():
    encoder = VIT.build()
    assert "backbone.pos_embed" not in dict(encoder.named_parameters())
    positions = encoder.backbone.get_buffer("pos_embed")
    torch.testing.assert_close(positions[0, 1:], sincos_positions(32, 4))
    assert not positions[0, 0].any()


def test_learned_positions_are_trained():
    encoder = EncoderConfig(
        "vit_tiny_patch16_224", image_size=16, patch_size=4, width=32, depth=1, heads=2
    ).build()
    assert "backbone.pos_embed" in dict(encoder.named_parameters())


# Taking the encoder home


@pytest.mark.parametrize("config", [RESNET, VIT, REGISTERS])
def test_exported_weights_load_strictly_into_plain_timm_and_give_the_same_features(
    config, tmp_path
):
    encoder = build(config)
    file = str(tmp_path / "encoder.safetensors")
    safetensors.torch.save_file(export_weights(encoder), file)
    plain: Any = timm.create_model(config.name, pretrained=False, **config.options)
    plain.load_state_dict(safetensors.torch.load_file(file), strict=True)
    if config.small_stem:
        plain.conv1.stride, plain.maxpool = (1, 1), nn.Identity()  # the recipe's line
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images()), encoder(images()).cls)


@pytest.mark.parametrize("config", [RESNET, VIT])
def test_an_import_undoes_an_export(config):
    encoder = build(config)
    other = config.build().eval()
    import_weights(other, export_weights(encoder))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_global_batch_norm_has_plain_batch_norms_names():
    plain = build(RESNET)
    ours = with_global_batchnorm(RESNET.build())
    assert any(isinstance(module, GlobalBatchNorm) for module in ours.modules())
    import_weights(ours, export_weights(plain))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images()).cls, plain(images()).cls)


@pytest.mark.parametrize(("config", "other"), [(RESNET, VIT), (VIT, RESNET), (VIT, REGISTERS)])
def test_weights_of_another_encoder_are_refused(config, other):
    with pytest.raises(ValueError, match=f"these weights are not of encoder {config.name}"):
        import_weights(config.build(), export_weights(other.build()))


def test_weights_of_another_size_are_refused():
    wider = EncoderConfig(
        "resnet18", image_size=16, small_stem=True, layers=(1, 1, 1, 1), channels=(8, 16, 16, 32)
    )
    with pytest.raises(ValueError, match="these weights are not of encoder resnet18"):
        import_weights(RESNET.build(), export_weights(wider.build()))


def test_importing_weights_does_not_change_the_weights_that_were_given():
    weights = export_weights(build(RESNET))
    before = weights["conv1.weight"].clone()
    import_weights(RESNET.build(), weights)
    assert torch.equal(weights["conv1.weight"], before)


# The rest


def test_a_small_stem_keeps_the_resolution():
    backbone: Any = RESNET.build().backbone
    stem = backbone.maxpool(backbone.conv1(images()))
    assert stem.shape[-2:] == (16, 16)


@pytest.mark.parametrize("layers", [2, 3])
def test_a_projector_has_a_batch_norm_after_each_layer_and_no_relu_at_its_end(layers):
    head = projector(16, 32, 8, layers)
    kinds = [type(module).__name__ for module in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * (layers - 1) + ["Linear", "BatchNorm1d"]
    assert head(torch.randn(4, 16)).shape == (4, 8)
    assert all(module.bias is None for module in head if isinstance(module, nn.Linear))


def test_stochastic_depth_acts_in_training_only():
    encoder = EncoderConfig(
        "vit_tiny_patch16_224", 16, patch_size=4, width=32, depth=2, heads=2, drop_path=0.5
    ).build()
    with torch.no_grad():
        assert torch.equal(encoder.eval()(images()).cls, encoder(images()).cls)
        assert not torch.equal(encoder.train()(images(64)).cls, encoder(images(64)).cls)
