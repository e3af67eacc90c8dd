import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_augment import FACTORS, blurred, kolmogorov_smirnov, picture, tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from selfray.pixels import augment, device
from selfray.pixels import parameters as host_parameters
from selfray.pixels.codecs import encode_png
from selfray.pixels.device import BatchParameters, apply, parameters_from, uniforms
from selfray.pixels.parameters import DRAWS, JITTER_ORDERS, Jitter, Parameters
from selfray.views import ColorJitter, RandomMask, View, Views

SIZE = 32
SIMCLR = View(
    size=SIZE,
    crop_scale=(0.08, 1.0),
    color_jitter=ColorJitter(),
    grayscale=0.2,
    blur=0.5,
    solarize=0.2,
)
PICTURES = [picture(SIZE, SIZE, seed) for seed in range(4)]
IMAGES = torch.stack([tensor(pixels) for pixels in PICTURES])  # [4, 3, 32, 32]


def whole(**changes) -> Parameters:
    return replace(Parameters(0, 0, SIZE, SIZE), **changes)


def jitter(order: tuple[str, ...] = JITTER_ORDERS[0], **changes) -> Parameters:
    neutral = Jitter(order, 1.0, 1.0, 1.0, 0.0)
    return whole(jitter=replace(neutral, **changes))


def as_batch(rows: list[Parameters]) -> BatchParameters:
    """The same parameters as the device has them."""
    neutral = Jitter(JITTER_ORDERS[0], 1.0, 1.0, 1.0, 0.0)
    jitters = [row.jitter or neutral for row in rows]
    box = {name: [getattr(row, name) for row in rows] for name in BOX_NAMES}
    factors = {name: [getattr(each, name) for each in jitters] for name in FACTOR_NAMES}
    others = {
        "flip": [row.flip for row in rows],
        "order": [JITTER_ORDERS.index(each.order) for each in jitters],
        "grayscale": [row.grayscale for row in rows],
        "blur": [row.blur_sigma is not None for row in rows],
        "blur_sigma": [row.blur_sigma or 1.0 for row in rows],
        "solarize": [row.solarize for row in rows],
        "vertical_flip": [row.vertical_flip for row in rows],
        "quarter_turns": [row.quarter_turns for row in rows],
    }
    columns = {**box, **factors, **others}
    return BatchParameters(**{name: torch.tensor(column) for name, column in columns.items()})


BOX_NAMES = ("top", "left", "height", "width")
FACTOR_NAMES = ("brightness", "contrast", "saturation", "hue")


def differences(parameters: Parameters) -> np.ndarray:
    """How far the device's views of all pictures are from the host's, in levels."""
    ours = apply(IMAGES, as_batch([parameters] * len(PICTURES)), SIMCLR)
    host = torch.stack([tensor(augment.apply(each, parameters, SIZE)) for each in PICTURES])
    assert ours.dtype == torch.uint8
    return (ours.int() - host.int()).abs().numpy()


# Operations against augment.py's, for equal parameters


def test_an_unaugmented_view_is_the_image():
    assert differences(whole()).max() == 0
    assert differences(jitter()).max() == 0


def test_a_flip_is_the_hosts_exactly():
    assert differences(whole(flip=True)).max() == 0
    assert differences(Parameters(3, 5, 20, 24, flip=True)).mean() < 1


@pytest.mark.parametrize("factor", FACTORS)
def test_brightness_and_contrast_are_the_hosts_within_one_level(factor):
    # One level: the host truncates each result to an integer, the device rounds once.
    assert differences(jitter(brightness=factor)).max() <= 1
    assert differences(jitter(contrast=factor)).max() <= 1


@pytest.mark.parametrize("factor", FACTORS)
def test_saturation_is_the_hosts_within_two_levels(factor):
    # The host truncates the luma, too.
    assert differences(jitter(saturation=factor)).max() <= 2


@pytest.mark.parametrize("shift", [-0.5, -0.2, -0.03, 0.1, 0.2, 0.45, 0.5])
def test_hue_is_the_hosts_within_one_level(shift):
    assert differences(jitter(hue=shift)).max() <= 1


def test_grayscale_is_the_hosts_within_one_level():
    assert differences(whole(grayscale=True)).max() <= 1


@pytest.mark.parametrize("sigma", [0.1, 0.15, 0.2, 0.5, 1.0, 2.0])
def test_blur_is_the_hosts_within_one_level(sigma):
    assert differences(whole(blur_sigma=sigma)).max() <= 1


@pytest.mark.parametrize("size", [64, 224])
def test_a_wide_blur_is_the_hosts_within_one_level(size):
    pixels = picture(size, size)
    kernel = augment.blur_kernel_size(size)
    for sigma in (0.3, 2.0):
        host = tensor(blurred(pixels, kernel, sigma)).float()
        ours = device.gaussian_blur(tensor(pixels)[None].float(), kernel, torch.tensor([sigma]))
        assert (ours[0].round() - host).abs().max() <= 1


def test_solarize_is_the_hosts_exactly():
    assert differences(whole(solarize=True)).max() == 0


@pytest.mark.parametrize("order", JITTER_ORDERS, ids="-".join)
def test_jitter_follows_the_order_of_each_image(order):
    strong = jitter(order, brightness=1.4, contrast=0.5, saturation=1.6, hue=0.15)
    # The host truncates four times, and its operations amplify what was cut off before.
    assert differences(strong).mean() < 1.5
    other = jitter(order[::-1], brightness=1.4, contrast=0.5, saturation=1.6, hue=0.15)
    assert differences(replace(strong, grayscale=True)).mean() < 1.5
    views = apply(IMAGES[:1].expand(2, -1, -1, -1), as_batch([strong, other]), SIMCLR)
    assert (views[0].int() - views[1].int()).abs().float().mean() > 2


def test_a_batch_of_mixed_parameters_gives_each_image_its_own():
    rows = [
        jitter(JITTER_ORDERS[7], brightness=0.6, hue=-0.1),
        whole(blur_sigma=1.2, flip=True),
        Parameters(2, 3, 25, 21, solarize=True),
        jitter(JITTER_ORDERS[20], contrast=1.5, saturation=0.3),
    ]
    together = apply(IMAGES, as_batch(rows), SIMCLR)
    for image, row, view in zip(IMAGES, rows, together, strict=True):
        alone = apply(image[None], as_batch([row]), SIMCLR)[0]
        assert (view.int() - alone.int()).abs().max() <= 1


@pytest.mark.parametrize(("side", "size"), [(9, 32), (24, 32), (32, 32), (31, 20), (32, 8)])
def test_crop_and_resize_is_torchvisions_antialiased_bicubic_but_for_rounding(side, size):
    image = tensor(picture(40, 48))
    box = Parameters(top=5, left=7, height=side, width=side - 2)
    ours = apply(image[None], as_batch([box]), View(size=size))[0]
    # In floats: on uint8 theirs rounds between its two passes as well.
    theirs = reference.resized_crop(
        image.float(), 5, 7, side, side - 2, [size, size], InterpolationMode.BICUBIC, True
    )
    assert (ours - theirs.clamp(0, 255)).abs().max() < 0.51


@pytest.mark.parametrize("side", [8, 16, 24, 30, 32])
def test_crop_and_resize_is_near_the_hosts(side):
    box = Parameters(top=0, left=32 - side, height=side, width=side)
    assert differences(box).mean() < 1.2


# Distributions


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (48, 30), (10, 100), (100, 10), (1, 1), (75, 100)]
)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.4, 0.9), (1.0, 1.0)])
def test_the_same_uniform_numbers_mean_the_same_parameters_as_on_the_host(height, width, scale):
    view = replace(SIMCLR, crop_scale=scale, flip=0.3)
    drawn = uniforms(3, 1, torch.arange(300), 1)[:, 0]
    ours = parameters_from(view, drawn, height, width)
    for row, numbers in enumerate(drawn.tolist()):
        host = host_parameters.parameters_from(view, numbers, height, width)
        for name in (*BOX_NAMES, "flip", "grayscale", "solarize"):
            assert getattr(ours, name)[row].item() == getattr(host, name)
        assert bool(ours.blur[row]) == (host.blur_sigma is not None)
        if host.blur_sigma is not None:
            assert ours.blur_sigma[row].item() == pytest.approx(host.blur_sigma, rel=1e-12)
        wanted = host.jitter or Jitter(JITTER_ORDERS[int(ours.order[row])], 1.0, 1.0, 1.0, 0.0)
        assert JITTER_ORDERS[int(ours.order[row])] == wanted.order
        for name in FACTOR_NAMES:
            assert getattr(ours, name)[row].item() == pytest.approx(
                getattr(wanted, name), rel=1e-12, abs=1e-12
            )


@pytest.mark.parametrize(
    "view",
    [View(size=8), View(size=8, color_jitter=ColorJitter(2.0, 0.4, 0.0, 0.0, probability=1.0))],
)
def test_views_without_an_operation_never_draw_it(view):
    drawn = uniforms(0, 0, torch.arange(500), 1)[:, 0]
    ours = parameters_from(view, drawn, 32, 32)
    assert not (ours.grayscale | ours.blur | ours.solarize).any()
    assert (ours.hue == 0).all()
    assert (ours.saturation == 1).all()
    assert (ours.brightness >= 0).all()


def test_the_uniform_numbers_are_uniform_and_independent():
    n = 20_000
    drawn = uniforms(5, 9, torch.arange(n), 2).flatten(1).numpy()  # [n, 2 * DRAWS]
    assert drawn.shape == (n, 2 * DRAWS)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    even = (np.arange(n) + 0.5) / n
    # One-sample Kolmogorov-Smirnov in each column; 1.95 is the 0.1 % level of 66 columns.
    assert max(kolmogorov_smirnov(column, even) for column in drawn.T) < 1.95 / math.sqrt(n)
    correlations = np.corrcoef(drawn.T) - np.eye(2 * DRAWS)
    assert np.abs(correlations).max() < 5 / math.sqrt(n)
    # Neighbouring images, epochs and seeds share nothing.
    for other in (
        uniforms(5, 9, torch.arange(1, n + 1), 2),
        uniforms(5, 10, torch.arange(n), 2),
        uniforms(6, 9, torch.arange(n), 2),
    ):
        columns = other.flatten(1).numpy()
        assert abs(np.corrcoef(drawn.ravel(), columns.ravel())[0, 1]) < 0.005


def test_the_uniform_numbers_are_splitmix64s_and_never_change():
    # A checkpoint's cursor is exact only while the same seed draws the same views.
    def mixed(word: int) -> int:
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        return word ^ (word >> 31)

    seed, epoch, key = 1, 2, 3
    stream = mixed((mixed((mixed(seed) + epoch) % 2**64) + key) % 2**64)
    words = [mixed((stream + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(1, 2 * DRAWS + 1)]
    drawn = uniforms(seed, epoch, torch.tensor([key]), 2)[0].flatten().tolist()
    assert drawn == [(word >> 11) / 2**53 for word in words]
    assert drawn[0] == 0.35539665882011373


# Batches

VIEWS: Views = {
    "global": (SIMCLR, replace(SIMCLR, solarize=0.0), SIMCLR),
    "local": (replace(SIMCLR, size=16, crop_scale=(0.05, 0.4)),) * 2,
}


def test_a_batch_mirrors_the_declared_views():
    batch = device.augment(IMAGES, torch.arange(4), VIEWS, seed=0, epoch=0)
    shapes = {name: (tuple(views.shape), views.dtype) for name, views in batch.items()}
    assert shapes == {
        "global": ((4, 3, 3, 32, 32), torch.uint8),
        "local": ((4, 2, 3, 16, 16), torch.uint8),
    }
    assert len({view.numpy().tobytes() for view in batch["global"].flatten(0, 1)}) == 12


def test_the_views_of_an_image_depend_on_seed_epoch_and_key_alone():
    together = device.augment(IMAGES, torch.arange(4), VIEWS, seed=3, epoch=5)
    order = torch.tensor([2, 0, 2])
    part = device.augment(IMAGES[order], order, VIEWS, seed=3, epoch=5)
    for name in VIEWS:
        assert (part[name].int() - together[name][order].int()).abs().max() <= 1
    for seed, epoch in ((3, 6), (4, 5)):
        other = device.augment(IMAGES, torch.arange(4), VIEWS, seed, epoch)
        assert (other["global"].int() - together["global"].int()).abs().float().mean() > 5


def test_the_whole_chain_is_near_the_hosts():
    keys = torch.arange(400) % 4
    images = IMAGES[keys]
    drawn = uniforms(0, 0, torch.arange(400), 1)
    views = device.draw_view(images, drawn[:, 0], SIMCLR)
    total = []
    for key, view, numbers in zip(keys, views, drawn[:, 0].tolist(), strict=True):
        parameters = host_parameters.parameters_from(SIMCLR, numbers, SIZE, SIZE)
        host = augment.apply(PICTURES[int(key)], parameters, SIZE)
        total.append((view.int() - tensor(host).int()).abs().float().mean())
    assert torch.stack(total).mean() < 2
    assert torch.stack(total).max() < 12


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"global": ()}, "views.global is empty"),
        ({"global": (View(),)}, "views.global has no size"),
        ({"global": (View(size=8), View(size=9))}, "of one size"),
        ({"global": (View(size=8, grid=2, mask=RandomMask()),)}, "drawn on the host"),
    ],
)
def test_views_that_the_device_cannot_draw_are_refused_by_name(views, message):
    with pytest.raises(ValueError, match=message):
        device.augment(IMAGES, torch.arange(4), views, 0, 0)


def test_views_finished_on_the_device_are_those_of_the_cpu():
    images = [encode_png(picture(40 + i, 60 - i, seed=i)) for i in range(24)]
    views: Views = {name: tuple(replace(v, size=48) for v in g) for name, g in VIEWS.items()}
    host = augment.augment_batch(images, views, seed=2, epoch=3).arrays
    crops = augment.augment_batch(images, views, 2, 3, photometric="device").arrays
    for name, group in views.items():
        rows = torch.from_numpy(crops[name + augment.PARAMETERS_SUFFIX])
        finished = device.recolour(torch.from_numpy(crops[name]), rows, group)
        difference = (finished.int() - torch.from_numpy(host[name]).int()).abs().float()
        assert (crops[name] != host[name]).mean() > 0.5
        # One level apart before a contrast or a turn of the hue can be some after it; at 128 one
        # level decides whether a value is solarized.
        assert difference.mean() < 0.1
        assert (difference > 2).float().mean() < 0.002
