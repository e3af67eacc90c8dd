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
from selfray.models.fitting import Fitted, fit, fitted_for, for_channels
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
    return {
        "model": tensors
        | index
        | {"mask_token": torch.zeros(1, 1, 32), "lm_head.bias": torch.ones(9)}
    }


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
    ("config", "layout", "name"),
    [(c, f, n) for _, c, f, n in LAYOUTS],
    ids=[i for i, *_ in LAYOUTS],
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
    put_into(encoder, found)
    batch = images(config.image_size)
    with torch.no_grad():
        expected = model(batch)
        torch.testing.assert_close(encoder(batch).cls, expected, rtol=1e-5, atol=1e-5)


def put_into(encoder: Encoder, found: Fitted) -> None:
    encoder.backbone.load_state_dict(encoder.backbone.state_dict() | found.tensors)


def saved(content: Any, folder: Path, name: str = "weights.pth") -> str:
    torch.save(content, folder / name)
    return str(folder / name)


# Fitting


def test_positions_are_interpolated_for_another_image_size_and_registers_get_none(tmp_path):
    model = published(LEARNED)
    file = saved(model.state_dict(), tmp_path)
    larger = replace(LEARNED, image_size=32)
    found = fitted_for(file, larger, least=0.95)
    assert found.tensors["pos_embed"].shape == (1, 65, 32)
    assert found.changes == ("positions of 4 x 4 patches interpolated to 8 x 8",)
    with_registers = replace(LEARNED, registers=2)
    found = fitted_for(file, with_registers, least=0.95)
    assert found.missing == ("reg_token",)
    assert not found.tensors["pos_embed"][:, 1:3].any()
    encoder = with_registers.build().eval()
    put_into(encoder, found)
    assert encoder(images()).patches.shape == (3, 16, 32)


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_a_first_layer_for_other_channels_gives_the_same_where_all_channels_are_alike(channels):
    weight = torch.randn(5, 3, 4, 4)
    gray = images(8, 1)
    expected = torch.nn.functional.conv2d(gray.repeat(1, 3, 1, 1), weight)
    found = torch.nn.functional.conv2d(
        gray.repeat(1, channels, 1, 1), for_channels(weight, channels)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_patches_of_another_size_are_resampled_and_one_table_of_positions_is_one_for_each(tmp_path):
    file = saved(published(LEARNED).state_dict(), tmp_path)
    found = fitted_for(file, replace(LEARNED, patch_size=2), least=0.95)
    assert found.tensors["patch_embed.proj.weight"].shape == (32, 3, 2, 2)
    assert "patch embedding of 4 pixels resampled to 2 pixels" in found.changes
    tables = published(BEIT).state_dict()
    found = fitted_for(saved(beit(tables), tmp_path), BEIT_EACH, least=1.0)
    table = tables["rel_pos_bias.relative_position_bias_table"]
    assert torch.equal(found.tensors["blocks.1.attn.relative_position_bias_table"], table)


def test_an_exported_small_stem_goes_back_into_one(tmp_path):
    from selfray.models.encoder import export_weights

    encoder = RESNET.build().eval()
    file = saved(export_weights(encoder), tmp_path)
    other = RESNET.build().eval()
    put_into(other, fitted_for(file, RESNET, least=1.0))
    assert torch.equal(other(images()).cls, encoder(images()).cls)


def test_it_says_what_was_taken_and_what_was_not(tmp_path):
    found = fitted_for(saved(dino(published(LEARNED).state_dict()), tmp_path), LEARNED, least=0.95)
    first, second = found.described
    assert re.fullmatch(
        r"starting from .*weights.pth \(ViT layout\): 30 of 30 tensors, 100.0% of the encoder's "
        r"0.0 million weights",
        first,
    )
    assert second == "in the file, not used: head.mlp.0.weight, head.last_layer.weight_g"
    partly = {k: v for k, v in published(LEARNED).state_dict().items() if "blocks.1" not in k}
    found = fitted_for(saved(partly, tmp_path), LEARNED, least=0.4)
    assert 0.5 < found.share < 0.6
    assert "initialised at random: blocks.1.norm1.weight, " in found.described[1]


def test_dinov3s_owners_terms_are_told(tmp_path):
    file = saved(dinov3(published(ROTARY).state_dict()), tmp_path)
    assert "trained from them: DINOv3 License" in fitted_for(file, ROTARY, 1.0).described[-1]


# Refusals, each of one line with the file and the way out


def test_weights_of_another_architecture_are_refused_with_the_encoder_that_they_are_of(tmp_path):
    file = saved(published(LEARNED).state_dict(), tmp_path)
    deeper = replace(LEARNED, depth=5)
    with pytest.raises(
        ValueError, match=r"weights.pth fits 4\d% of the weights of encoder.name vi"
    ):
        fitted_for(file, deeper, least=0.95)
    assert fitted_for(file, deeper, least=0.0).missing
    with pytest.raises(ValueError, match=r"resnet18 .*or accept less with --init-share 0"):
        fitted_for(file, replace(RESNET), least=0.95)


def test_a_vit_without_its_positions_is_refused_whatever_share_it_has(tmp_path):
    blind = {k: v for k, v in published(LEARNED).state_dict().items() if k != "pos_embed"}
    with pytest.raises(ValueError, match=r"fits 9\d% of .*\(no pos_embed\)"):
        fitted_for(saved(blind, tmp_path), LEARNED, least=0.5)


def test_moco_v3s_small_vit_has_twelve_heads():
    shapes = {
        "patch_embed.proj.weight": torch.zeros(384, 3, 16, 16),
        "norm.weight": torch.ones(384),
    }
    facts = named(mocov3(shapes), "file").facts
    assert (facts["heads"], facts["position"]) == (12, "sincos")


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_a_pickle_that_needs_code_is_refused_and_none_of_it_is_run(tmp_path, capsys):
    file = saved({"model": published(LEARNED).state_dict(), "hook": Evil()}, tmp_path)
    with pytest.raises(
        ValueError, match=r"weights.pth can only be read by running code in it \(.*print.*\), which"
    ) as e:
        read(file)
    assert "\n" not in str(e.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("size", [0, 5, 100, -100])
def test_a_file_that_was_cut_off_is_refused_in_one_line(suffix, size, tmp_path):
    whole = tmp_path / f"whole{suffix}"
    tensors = published(LEARNED).state_dict()
    if suffix == ".pth":
        torch.save(tensors, whole)
    else:
        safetensors.torch.save_file(tensors, str(whole))
    torn = tmp_path / f"torn{suffix}"
    torn.write_bytes(whole.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=rf"torn{suffix} is not a complete .*download it again"
    ) as error:
        read(str(torn))
    assert "\n" not in str(error.value)


def test_a_missing_file_an_unknown_layout_and_an_unknown_name_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.pth: there is no such file; give a .safe"):
        read(str(tmp_path / "gone.pth"))
    with pytest.raises(ValueError, match=r"has an unknown layout, it holds a.weight: kno"):
        read(saved({"a.weight": torch.ones(2)}, tmp_path))
    with pytest.raises(ValueError, match=r"no tensor at all"):
        read(saved([1, 2], tmp_path))
    with pytest.raises(
        ValueError, match=r"'vit_smal_patch16_224' is not a timm model; did you mean"
    ):
        encoder_of("timm:vit_smal_patch16_224")
    with pytest.raises(
        ValueError, match=r"timm has no such weights; it has vit_small_patch16_224.a"
    ):
        read("timm:vit_small_patch16_224.nobodys")


# Which encoder

VITS = {
    "dinov2": ("vit_base_patch14_dinov2", 768, 12, {"mask_token": (1, 768)}),
    "registers": ("vit_small_patch14_reg4_dinov2", 384, 12, {"register_tokens": (1, 4, 384)}),
    "dino": ("vit_small_patch16_224", 384, 12, {}),
    "mae": ("vit_huge_patch14_224", 1280, 32, {"decoder_embed.weight": (2, 2)}),
    "dinov3": ("vit_large_patch16_dinov3", 1024, 24, {"storage_tokens": (1, 4, 1024)}),
    "beit": (
        "beit_large_patch16_224",
        1024,
        24,
        {"rel_pos_bias.relative_position_bias_table": (732, 16)},
    ),
}


@pytest.mark.parametrize("layout", VITS)
def test_shapes_tell_which_encoder_weights_are_of(layout):
    name, width, depth, more = VITS[layout]
    patch = int(name.split("patch")[1][:2])
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 197, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        **{f"blocks.{block}.norm1.weight": (width,) for block in range(depth)},
        **more,
    }
    content = {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}
    assert architecture(named(content, "file"))[0] == name


def test_a_resnets_stages_tell_its_name():
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2"):
        with torch.device("meta"):
            content = timm.create_model(name).state_dict()
        assert architecture(named(content, "file")) == (name, {})


def test_timms_names_tell_the_encoder_and_its_positions():
    given = EncoderConfig(image_size=112, drop_path=0.1)
    assert encoder_of("timm:vit_small_patch14_dinov2.lvd142m", given) == replace(
        given, name="vit_small_patch14_dinov2"
    )
    assert encoder_of("timm:vit_small_patch16_dinov3.lvd1689m").position == "rotary"
    assert encoder_of("timm:beit_base_patch16_224").position == "relative_each"
    assert encoder_of("timm:resnet50.a1_in1k").name == "resnet50"
    assert not is_public("runs/mae-digits-01234567")


def test_weights_are_found_in_the_hugging_face_cache_without_a_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    name = "vit_tiny_patch16_224.augreg_in21k"
    settings: Any = timm.get_pretrained_cfg(name)
    repository = settings.hf_hub_id
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123")
    model = published(EncoderConfig("vit_tiny_patch16_224"))
    head = {"head.weight": torch.zeros(21843, 192), "head.bias": torch.zeros(21843)}
    safetensors.torch.save_file({**model.state_dict(), **head}, str(snapshot / "model.safetensors"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found = fitted_for(f"timm:{name}", EncoderConfig("vit_tiny_patch16_224", 64), least=1.0)
    assert found.share == 1.0
    assert torch.equal(found.tensors["norm.weight"], model.state_dict()["norm.weight"])
    with pytest.raises(
        FileNotFoundError, match=r"dino cannot be fetched .*give a file, or fill the cac"
    ):
        read("timm:vit_small_patch16_224.dino")


def test_an_encoder_is_kept_apart_from_its_start(tmp_path):
    """`fit` leaves what it was given as it was: two encoders may start from one reading."""
    weights = read(saved(published(LEARNED).state_dict(), tmp_path))
    before = {k: v.clone() for k, v in weights.named.tensors.items()}
    fit(weights, Encoder(replace(LEARNED, image_size=32)))
    assert all(torch.equal(v, weights.named.tensors[k]) for k, v in before.items())


def test_a_file_of_ours_tells_its_encoder_whole(tmp_path):
    from selfray import config

    shaped = replace(ROTARY, registers=2, swiglu=True, drop_path=0.3)
    header = {"encoder_config": config.dumps(shaped)}
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(published(shaped).state_dict(), str(file), header)
    given = EncoderConfig(image_size=32, drop_path=0.1)
    assert encoder_of(str(file), given) == replace(shaped, image_size=32, drop_path=0.1)
