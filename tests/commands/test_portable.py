"""Exported folders in plain timm: nothing of selfray is used to open them."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

from helpers import BEIT, RESNET, VIT
from selfray import config
from selfray.models.encoder import EncoderConfig
from selfray.models.portable import Portable, verify
from selfray.probes.encoders import ENCODER_CONFIG, EncoderRef

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
ENCODERS = {
    "vit": replace(VIT, depth=3),
    "registers": replace(VIT, depth=3, registers=2, layer_scale=1e-5, position="learned"),
    "gated": replace(VIT, depth=3, swiglu=True, registers=1, position="learned"),
    "beit": replace(BEIT, depth=3),
    "gray": replace(VIT, depth=3, in_channels=1),
    "group": EncoderConfig("resnet18", image_size=32, norm="group"),
    "resnet": EncoderConfig("resnet18", image_size=32, channels=(8, 8, 16, 16)),
}


@pytest.fixture(params=ENCODERS)
def exported(request, tmp_path):
    wanted = ENCODERS[request.param]
    torch.manual_seed(0)
    encoder = wanted.build().eval()
    header = {"format": "pt", ENCODER_CONFIG: config.dumps(wanted)}
    mean, std = MEAN[: wanted.in_channels], STD[: wanted.in_channels]
    header |= {"mean": str(list(mean)), "std": str(list(std))}
    Portable.of(encoder).write(tmp_path, encoder, (mean, std), header)
    return tmp_path, encoder


def opened(folder: Path, **arguments) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()


@torch.no_grad()
def test_plain_timm_opens_an_exported_folder(exported):
    folder, encoder = exported
    side = encoder.config.image_size
    channels = encoder.config.in_channels
    images = torch.randn(2, channels, side, side)
    torch.testing.assert_close(opened(folder)(images), encoder(images).cls)
    with_head = opened(folder, num_classes=10)
    assert with_head(images).shape == (2, 10)
    own = opened(folder).state_dict()
    assert all(torch.equal(with_head.state_dict()[name], tensor) for name, tensor in own.items())
    maps = opened(folder, features_only=True)(images)
    last = maps[-1].flatten(2).transpose(1, 2)
    assert last.shape == encoder(images).patches.shape
    data = resolve_model_data_config(opened(folder))
    assert tuple(data["input_size"]) == (channels, side, side)
    assert (tuple(data["mean"]), tuple(data["std"])) == (MEAN[:channels], STD[:channels])
    assert data["interpolation"] == "bicubic"


@torch.no_grad()
def test_plain_timm_opens_it_for_another_image_size(exported):
    folder, encoder = exported
    size = 2 * encoder.config.image_size
    arguments = {"img_size": size} if encoder.config.is_vit else {}
    assert opened(folder, **arguments)(
        torch.randn(1, encoder.config.in_channels, size, size)
    ).shape == (1, encoder.width)


@torch.no_grad()
def test_selfray_reads_its_own_export_back(exported):
    folder, encoder = exported
    ref = EncoderRef.of_file(str(folder))
    assert ref.encoder_config == encoder.config
    side, channels = encoder.config.image_size, encoder.config.in_channels
    assert ref.normalization == (MEAN[:channels], STD[:channels])
    images = torch.randn(2, channels, side, side)
    torch.testing.assert_close(ref.load()(images).patches, encoder(images).patches)


def test_an_export_that_gives_other_features_is_not_called_verified(exported):
    folder, encoder = exported
    assert verify(folder, encoder).startswith("verified")
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1)
    with pytest.raises(RuntimeError, match="timm computes different features"):
        verify(folder, encoder)


def test_a_small_stem_needs_one_more_line_which_is_printed(tmp_path):
    encoder = RESNET.build().eval()
    Portable.of(encoder).write(tmp_path, encoder, (MEAN, STD), {"format": "pt"})
    assert verify(tmp_path, encoder).startswith("verified")
