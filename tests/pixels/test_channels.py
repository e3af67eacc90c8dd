"""Gray and multispectral images, from stored bytes to a trained encoder and its features."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from selfray.experiment import DataConfig, Experiment
from selfray.methods.mae import MAEConfig
from selfray.methods.simclr import SimCLRConfig
from selfray.models.encoder import EncoderConfig
from selfray.optim import OptimizerConfig
from selfray.pixels import device
from selfray.pixels.augment import (
    apply,
    augment_batch,
    augment_image,
    evaluation_view,
    generator,
)
from selfray.pixels.codecs import (
    BrokenImage,
    ImageInfo,
    check,
    decode,
    encode_channels,
    encode_jpeg,
    encode_png,
)
from selfray.pixels.parameters import parameters_from
from selfray.probes.features import embed
from selfray.train import TrainState, train
from selfray.views import ColorJitter, View, Views

JITTER = ColorJitter(0.4, 0.4, 0.0, 0.0, probability=1.0)


def image(channels: int, kind: type = np.uint8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.iinfo(kind).max + 1, (40, 52, channels)).astype(kind)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8, 16])
def test_every_number_of_channels_is_stored_and_read_back(channels: int) -> None:
    values = image(channels)
    data = encode_channels(values)
    assert check(data) == ImageInfo(52, 40, "PNG")
    assert np.array_equal(decode(data, channels=channels), values)
    deep = image(channels, np.uint16)
    wanted = np.round(deep / 257).astype(int)
    read = decode(encode_channels(deep), channels=channels).astype(int)
    assert np.abs(read - wanted).max() <= 1


def test_channels_that_are_not_the_data_sets_are_refused_by_number() -> None:
    with pytest.raises(
        BrokenImage, match=r"channels: the image has 8 channels, but data.channels is 3"
    ):
        decode(encode_channels(image(8)))
    with pytest.raises(BrokenImage, match=r"has 8 channels, but data.channels is 4"):
        augment_batch([encode_channels(image(8))], {"g": (View(size=8),)}, 0, 0, channels=4)
    with pytest.raises(BrokenImage, match=r"has 3 channels, but data.channels is 5"):
        decode(encode_png(image(3)), channels=5)


def test_a_gray_view_of_a_colour_jpeg_is_its_brightness() -> None:
    smooth = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 48, 0)
    data = encode_jpeg(np.concatenate([smooth, 255 - smooth, smooth // 2], axis=2))
    views: Views = {"g": (View(size=32, crop_scale=(0.3, 1.0)),) * 4}
    gray = augment_batch([data], views, 0, 0, channels=1).arrays["g"][0].astype(int)
    rgb = augment_batch([data], views, 0, 0).arrays["g"][0].astype(float)
    assert gray.shape == (4, 1, 32, 32)
    luma = 0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2]
    assert np.abs(gray[:, 0] - luma).mean() < 1.5
    assert np.abs(decode(data, channels=1)[:, :, 0].astype(int) - luma.mean()).max() < 255


def test_a_channel_of_a_multispectral_view_is_the_view_of_that_channel() -> None:
    values = image(8)
    views: Views = {"g": (View(size=24, crop_scale=(0.2, 1.0), blur=0.5, solarize=0.5),) * 6}
    many = augment_image(encode_channels(values), views, generator(1, 2, 3), channels=8)["g"]
    for channel in range(8):
        one = encode_channels(values[:, :, channel : channel + 1])
        alone = augment_image(one, views, generator(1, 2, 3), channels=1)["g"]
        assert np.array_equal(many[:, channel], alone[:, 0])


def test_jitter_is_a_gain_of_each_channel_on_multispectral_images() -> None:
    values = np.full((16, 16, 5), 100, np.uint8)
    view = View(size=16, color_jitter=replace(JITTER, contrast=0.0))
    drawn = augment_image(encode_channels(values), {"g": (view,)}, generator(0, 0, 0), channels=5)
    levels = drawn["g"][0].reshape(5, -1)
    assert (levels == levels[:, :1]).all()
    assert len(set(levels[:, 0].tolist())) > 1
    assert levels.min() >= 60
    assert levels.max() <= 140


def test_what_means_nothing_on_the_channels_is_named_by_its_field() -> None:
    data = encode_channels(image(8))
    for view, field in (
        (View(size=8, grayscale=0.2), "grayscale"),
        (View(size=8, color_jitter=ColorJitter(hue=0.0)), "color_jitter.saturation"),
        (View(size=8, color_jitter=ColorJitter(saturation=0.0)), "color_jitter.hue"),
    ):
        with pytest.raises(ValueError, match=field.replace(".", r"\.") + r" .* data.channels 8"):
            augment_batch([data], {"g": (view,)}, 0, 0, channels=8)
    # On gray images they change nothing.
    gray = encode_channels(image(1))
    colourful = View(size=16, color_jitter=ColorJitter(0, 0, 0.8, 0.2, 1.0), grayscale=0.5)
    for epoch in range(4):
        ours = augment_batch([gray], {"g": (colourful,)}, 0, epoch, channels=1).arrays["g"]
        plain = augment_batch([gray], {"g": (View(size=16),)}, 0, epoch, channels=1).arrays["g"]
        assert np.array_equal(ours, plain)


@pytest.mark.parametrize("orientation", [1, 6])
def test_flips_and_turns_are_numpys(orientation: int) -> None:
    values = image(3)
    for drawn in range(8):
        uniform = np.full(33, 0.99)
        base = parameters_from(View(size=24), uniform, 40, 52)
        turned = replace(
            base, flip=drawn % 2 == 1, vertical_flip=drawn >= 4, quarter_turns=drawn % 4
        )
        plain = apply(values, replace(base, flip=False), 24)
        wanted = plain[:, ::-1] if turned.flip else plain
        wanted = wanted[::-1] if turned.vertical_flip else wanted
        ours = apply(values, turned, 24).astype(int)
        assert np.abs(ours - np.rot90(wanted, turned.quarter_turns)).max() <= 1


def test_the_four_orientations_come_equally_often_and_leave_other_views_alone() -> None:
    values = np.zeros((16, 16, 3), np.uint8)
    values[:8, :8] = 255  # one bright corner
    turning = View(size=16, flip=0.0, rotate90=0.75)
    data = [encode_png(values + np.uint8(0)) for _ in range(1)]
    corners = np.zeros(4)
    for epoch in range(200):
        (view,) = augment_batch(data, {"g": (turning,)}, 0, epoch).arrays["g"][0]
        quarters = [view[0, :8, :8], view[0, :8, 8:], view[0, 8:, 8:], view[0, 8:, :8]]
        corners[int(np.argmax([q.mean() for q in quarters]))] += 1
    assert corners.min() > 25
    crop = View(size=16, crop_scale=(0.2, 1.0))
    alone = augment_batch(data, {"g": (crop,)}, 3, 1).arrays["g"]
    upright = View(size=16, crop_scale=(0.2, 1.0), rotate90=1e-9)
    assert np.array_equal(augment_batch(data, {"g": (upright,)}, 3, 1).arrays["g"], alone)


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_the_device_computes_what_the_data_tasks_compute(channels: int) -> None:
    smooth = np.linspace(0, 1, 40)[:, None, None] * np.linspace(20, 230, 52)[None, :, None]
    values = (smooth * np.linspace(0.5, 1, channels)).astype(np.uint8)
    view = View(
        size=24, color_jitter=JITTER, blur=0.5, solarize=0.3, vertical_flip=0.5, rotate90=0.75
    )
    group = (view,) * 12
    data = encode_channels(values)
    whole = augment_batch([data], {"g": group}, 5, 0, channels=channels).arrays["g"]
    halves = augment_batch([data], {"g": group}, 5, 0, photometric="device", channels=channels)
    rows = torch.from_numpy(halves.arrays["g_parameters"])
    ours = device.recolour(torch.from_numpy(halves.arrays["g"].copy()), rows, group).numpy()
    assert np.abs(ours.astype(int) - whole).mean() < 1
    assert np.percentile(np.abs(ours.astype(int) - whole), 98) <= 2
    images = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None]
    views = device.augment(images, torch.arange(1), {"g": group}, 5, 0)["g"]
    assert views.shape == (1, 12, channels, 24, 24)


def test_the_devices_flips_and_turns_are_numpys() -> None:
    values = np.ascontiguousarray(image(2).transpose(2, 0, 1))
    images = torch.from_numpy(values)[None].repeat(4, 1, 1, 1)
    view = View(size=20, vertical_flip=0.5, rotate90=0.75)
    uniform = torch.full((4, 33 + 2), 0.99, dtype=torch.float64)
    uniform[:, 33] = torch.tensor([0.2, 0.2, 0.8, 0.8])
    uniform[:, 34] = torch.tensor([0.1, 0.3, 0.6, 0.9])  # of 0.75: one, two, three turns, none
    ours = device.draw_view(images, uniform, view).numpy()
    plain = ours[3, :, ::1]
    for row, (turns, flipped) in enumerate([(1, True), (2, True), (3, False), (0, False)]):
        wanted = plain[:, ::-1] if flipped else plain
        assert np.array_equal(ours[row], np.rot90(wanted, turns, (1, 2)))


def experiment(channels: int, method: MAEConfig | SimCLRConfig) -> Experiment:
    vit = EncoderConfig("vit_tiny_patch16_224", 32, 8, 24, 2, 2, in_channels=channels)
    data = DataConfig(mean=(0.5,) * channels, std=(0.25,) * channels, channels=channels)
    return Experiment("test", method, vit, data, OptimizerConfig("adamw"), 1, 8)


@pytest.mark.parametrize("channels", [1, 13])
@pytest.mark.parametrize("method", ["mae", "simclr"])
def test_an_encoder_is_trained_and_answers_on_any_channels(channels: int, method: str) -> None:
    view = View(crop_scale=(0.5, 1.0), color_jitter=JITTER)
    mae = MAEConfig(decoder_width=16, decoder_depth=1, decoder_heads=2)
    chosen = experiment(channels, mae if method == "mae" else SimCLRConfig(view=view))
    images = [encode_channels(image(channels, seed=seed)) for seed in range(8)]
    drawn = augment_batch(images, chosen.views, 0, 0, channels=channels).arrays
    batch = {name: torch.from_numpy(v) for name, v in drawn.items() if name != "broken"}
    state = TrainState.start(chosen, 16)
    losses: list[float] = []
    train(state, iter([batch, batch]), chosen, lambda step: losses.append(float(step.loss)))
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    views = np.stack(
        [evaluation_view(decode(data, channels=channels), 32).transpose(2, 0, 1) for data in images]
    )
    features = embed(state.method.encoder, views, chosen.data.mean, chosen.data.std)
    assert features.shape == (8, 48)


def test_settings_that_do_not_fit_the_channels_name_the_flag() -> None:
    right = experiment(1, MAEConfig(decoder_width=16, decoder_depth=1, decoder_heads=2))
    with pytest.raises(ValueError, match=r"data.mean has 3 values and data.channels is 1"):
        replace(right.data, mean=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match=r"give --encoder.in-channels 1"):
        replace(right, encoder=replace(right.encoder, in_channels=3))
    with pytest.raises(ValueError, match=r"data.channels must lie in \[1, 16\], got 17"):
        replace(right.data, channels=17)
