import io
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from selfray.pixels import colour, parameters, random, resize
from selfray.pixels.augment import (
    apply,
    augment_batch,
    augment_image,
    evaluation_view,
    generator,
    image_key,
)
from selfray.pixels.codecs import BrokenImage, decode, encode_png
from selfray.pixels.parameters import Jitter, Parameters, draw
from selfray.views import (
    BLUR_SIGMA,
    ColorJitter,
    RandomMask,
    View,
    Views,
    blur_kernel_size,
)

SIMCLR = View(
    size=32,
    crop_scale=(0.08, 1.0),
    color_jitter=ColorJitter(),
    grayscale=0.2,
    blur=0.5,
    solarize=0.2,
)


def picture(height: int = 96, width: int = 96, seed: int = 0) -> np.ndarray:
    """A smooth colour image with some noise, over the whole range of values."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(-40, 296, (5, 5, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def pixels_of(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def errors(ours: np.ndarray, theirs: torch.Tensor) -> np.ndarray:
    assert ours.dtype == np.uint8
    assert ours.shape == pixels_of(theirs).shape
    return np.abs(ours.astype(int) - pixels_of(theirs).astype(int))


def changed(pixels: np.ndarray, operation: Callable[..., None], *arguments: float) -> np.ndarray:
    """What one of the kernels, which work in place on planes, makes of [H, W, 3]."""
    planes = pixels.transpose(2, 0, 1).reshape(3, -1).copy()
    operation(planes, *arguments)
    return planes.reshape(3, *pixels.shape[:2]).transpose(1, 2, 0)


def blurred(pixels: np.ndarray, kernel_size: int, sigma: float) -> np.ndarray:
    height, width = pixels.shape[:2]
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    reach = kernel_size // 2
    line = colour.blurred_length(width, reach)
    padded = np.zeros(line + 2 * reach, np.int16)
    room = np.empty(height * line, np.int16)
    colour.gaussian_blur(planes, reach, sigma, padded, room)
    return planes.transpose(1, 2, 0)


PICTURES = [picture(seed=seed) for seed in range(4)]
FACTORS = [0.0, 0.2, 0.7, 1.0, 1.3, 1.8]


# Operations against torchvision's, on uint8


@pytest.mark.parametrize("factor", FACTORS)
def test_brightness_is_torchvisions_exactly(factor):
    for pixels in PICTURES:
        ours = changed(pixels, colour.adjust_brightness, factor)
        assert errors(ours, reference.adjust_brightness(tensor(pixels), factor)).max() == 0


@pytest.mark.parametrize("factor", FACTORS)
def test_contrast_is_torchvisions_within_one_level(factor):
    for pixels in PICTURES:
        ours = changed(pixels, colour.adjust_contrast, factor)
        difference = errors(ours, reference.adjust_contrast(tensor(pixels), factor))
        assert difference.max() <= 1
        assert difference.mean() < 0.01


@pytest.mark.parametrize("factor", FACTORS)
def test_saturation_is_torchvisions_within_one_level(factor):
    for pixels in PICTURES:
        difference = errors(
            changed(pixels, colour.adjust_saturation, factor),
            reference.adjust_saturation(tensor(pixels), factor),
        )
        assert difference.max() <= 1
        assert difference.mean() < 0.02


@pytest.mark.parametrize("shift", [-0.5, -0.2, -0.03, 0.0, 0.1, 0.2, 0.45, 0.5])
def test_hue_is_torchvisions_within_one_level(shift):
    for pixels in PICTURES:
        difference = errors(
            changed(pixels, colour.adjust_hue, shift), reference.adjust_hue(tensor(pixels), shift)
        )
        assert difference.max() <= 1
        assert difference.mean() < 0.01


def test_grayscale_is_torchvisions_within_one_level():
    for pixels in PICTURES:
        theirs = reference.rgb_to_grayscale(tensor(pixels), num_output_channels=3)
        assert errors(changed(pixels, colour.to_grayscale), theirs).max() <= 1


@pytest.mark.parametrize("size", [32, 96, 224])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_torchvisions_within_one_level(size, sigma):
    pixels = picture(size, size)
    kernel = blur_kernel_size(size)
    theirs = reference.gaussian_blur(tensor(pixels), [kernel, kernel], [sigma, sigma])
    assert errors(blurred(pixels, kernel, sigma), theirs).max() <= 1


def test_white_stays_white_under_the_widest_blur():
    white = np.full((224, 224, 3), 255, np.uint8)
    assert (blurred(white, blur_kernel_size(224), 4.0) == 255).all()


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("flip", [False, True])
def test_the_weights_of_a_few_pixels_are_the_cubics(length, flip):
    """Each alone can weigh more than 1, which int16 does not hold."""
    size = 96
    first, weights, number = resize.resampling(length, 0.0, float(length), size, flip)
    ours = np.zeros((size, length))
    for new in range(size):
        for k in range(number):
            ours[new, min(max(first[new] + k, 0), length - 1)] += weights[new, k] / 2**15
    row = torch.eye(length)[:, None, None]  # as many images of one row, each with one pixel lit
    theirs = torch.nn.functional.interpolate(
        row, (1, size), mode="bicubic", align_corners=False, antialias=True
    )[:, 0, 0].numpy()
    assert np.abs(ours - (theirs[:, ::-1] if flip else theirs).T).max() < 1e-3


def test_solarize_is_torchvisions_exactly():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert (
        errors(changed(levels, colour.solarize), reference.solarize(tensor(levels), 128)).max() == 0
    )


@pytest.mark.parametrize("factor", [0.2, 0.4, 0.9, 1.0, 1.1, 1.5, 2.0, 3.3, 9.0])
@pytest.mark.parametrize("size", [48, 72])
def test_crop_and_resize_are_torchvisions_antialiased_bicubic_within_one_level(size, factor):
    side = round(size * factor)
    for seed in range(3):
        image = picture(side + 30, side + 20, seed)
        box = Parameters(top=7, left=11, height=side, width=side + 5)
        # In floats: on uint8 theirs rounds between its two passes as well.
        theirs = reference.resized_crop(
            tensor(image).float(),
            7,
            11,
            side,
            side + 5,
            [size] * 2,
            InterpolationMode.BICUBIC,
            True,
        )
        difference = np.abs(apply(image, box, size) - pixels_of(theirs.clamp(0, 255)))
        # Rounding alone is 0.5 and 0.25; each of up to 40 products is cut to 1/32 of a level.
        assert difference.max() < 1
        assert difference.mean() < 0.3


def test_a_flat_surface_stays_flat():
    for value, side in ((255, 50), (254, 31), (128, 70), (1, 13), (0, 90)):
        view = apply(np.full((90, 100, 3), value, np.uint8), Parameters(0, 9, side, side - 2), 48)
        assert (view == value).all()


def test_a_crop_of_the_views_size_is_copied_pixel_for_pixel():
    image = picture(60, 80)
    view = apply(image, Parameters(top=5, left=9, height=32, width=32), 32)
    assert np.array_equal(view, image[5:37, 9:41])


def test_operations_follow_one_another_in_the_order_of_simclr_and_byol():
    image = PICTURES[0]
    jitter = Jitter(("hue", "contrast", "saturation", "brightness"), 1.4, 0.6, 1.5, 0.15)
    parameters = Parameters(0, 0, 96, 96, True, jitter, False, 1.2, True)
    theirs = reference.horizontal_flip(tensor(image))
    theirs = reference.adjust_hue(theirs, 0.15)
    theirs = reference.adjust_contrast(theirs, 0.6)
    theirs = reference.adjust_saturation(theirs, 1.5)
    theirs = reference.adjust_brightness(theirs, 1.4)
    theirs = reference.gaussian_blur(theirs, [9, 9], [1.2, 1.2])
    theirs = reference.solarize(theirs, 128)
    assert errors(apply(image, parameters, 96), theirs).mean() < 1.5
    gray = apply(image, replace(parameters, grayscale=True), 96)
    assert np.ptp(gray.astype(int), axis=2).max() == 0


def test_apply_leaves_the_image_as_it_is():
    image = picture(32, 32)
    before = image.copy()
    rng = generator(0, 0, 0)
    for _ in range(50):
        apply(image, draw(replace(SIMCLR, crop_scale=(1, 1)), rng, 32, 32), 32)
    assert np.array_equal(image, before)


# Distributions


def test_crops_are_distributed_as_torchvisions():
    height, width, scale, draws = 120, 160, (0.08, 1.0), 6000
    view = View(size=32, crop_scale=scale)
    rng = generator(0, 0, 0)
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    transform = v2.RandomResizedCrop(32, scale=scale)
    ours, theirs = [], []
    for _ in range(draws):
        p = draw(view, rng, height, width)
        assert 0 <= p.top <= p.top + p.height <= height
        assert 0 <= p.left <= p.left + p.width <= width
        ours.append((p.top, p.left, p.height, p.width))
        box = transform.make_params([image])
        theirs.append((box["top"], box["left"], box["height"], box["width"]))
    for boxes in zip(
        statistics(ours, height, width), statistics(theirs, height, width), strict=True
    ):
        # Two-sample Kolmogorov-Smirnov; 1.63 is the 1 % level, ties only lower the statistic.
        assert kolmogorov_smirnov(*boxes) < 1.63 * math.sqrt(2 / draws)


def statistics(boxes: list[tuple[int, ...]], height: int, width: int) -> list[np.ndarray]:
    top, left, h, w = np.array(boxes, float).T
    return [h * w / (height * width), w / h, top, left, top + h / 2, left + w / 2]


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    values = np.sort(np.concatenate([a, b]))
    cumulative = [np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (a, b)]
    return float(np.abs(cumulative[0] - cumulative[1]).max())


def test_each_operation_comes_as_often_as_its_probability_says():
    view = replace(SIMCLR, flip=0.3, grayscale=0.2, blur=0.6, solarize=0.1)
    rng = generator(1, 0, 0)
    drawn = [draw(view, rng, 64, 64) for _ in range(6000)]
    for name, probability in {"flip": 0.3, "grayscale": 0.2, "solarize": 0.1}.items():
        assert np.mean([getattr(p, name) for p in drawn]) == pytest.approx(probability, abs=0.025)
    assert np.mean([p.blur_sigma is not None for p in drawn]) == pytest.approx(0.6, abs=0.025)
    sigmas = [p.blur_sigma for p in drawn if p.blur_sigma is not None]
    assert BLUR_SIGMA[0] <= min(sigmas) < 0.11
    assert 1.99 < max(sigmas) <= BLUR_SIGMA[1]
    jitters = [p.jitter for p in drawn if p.jitter is not None]
    assert len(jitters) / len(drawn) == pytest.approx(0.8, abs=0.025)
    assert len({jitter.order for jitter in jitters}) == 24
    for name, low, high in (("brightness", 0.2, 1.8), ("contrast", 0.2, 1.8), ("hue", -0.2, 0.2)):
        values = np.array([getattr(jitter, name) for jitter in jitters])
        assert low <= values.min()
        assert values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.03)


def test_a_jitter_stronger_than_one_has_no_negative_factors():
    view = View(size=32, color_jitter=ColorJitter(2.0, 2.0, 2.0, 0.0, probability=1.0))
    rng = generator(0, 0, 0)
    jitters = [draw(view, rng, 32, 32).jitter for _ in range(500)]
    brightness = [jitter.brightness for jitter in jitters if jitter is not None]
    assert 0 <= min(brightness) < 0.1
    assert 2.9 < max(brightness) <= 3


def test_a_crop_scale_of_one_takes_the_whole_square_image():
    view = View(size=32)
    for key in range(50):
        p = draw(view, generator(0, 0, key), 48, 48)
        assert (p.top, p.left, p.height, p.width) == (0, 0, 48, 48)


@pytest.mark.parametrize(("height", "width"), [(10, 100), (100, 10), (1, 1), (1, 50), (75, 100)])
def test_an_image_that_no_crop_fits_gives_its_centre(height, width):
    p = draw(View(size=8), generator(0, 0, 0), height, width)
    assert p.height == min(height, round(width * 4 / 3))
    assert p.width == min(width, round(height * 4 / 3))
    assert (p.top, p.left) == ((height - p.height) // 2, (width - p.width) // 2)
    assert apply(np.zeros((height, width, 3), np.uint8), p, 8).shape == (8, 8, 3)


def test_draw_always_takes_the_same_number_of_draws():
    states = set()
    for view in (View(size=8), SIMCLR, replace(SIMCLR, crop_scale=(0.9, 1.0))):
        for height, width in ((32, 32), (10, 200)):
            rng = generator(0, 0, 0)
            draw(view, rng, height, width)
            states.add(rng.random())
    assert len(states) == 1


# Evaluation


@pytest.mark.parametrize(("height", "width"), [(300, 300), (300, 400), (500, 260), (225, 1000)])
def test_the_evaluation_view_is_the_usual_resize_and_centre_crop(height, width):
    image = picture(height, width)
    theirs = reference.resize(tensor(image), [256], InterpolationMode.BICUBIC, antialias=True)
    theirs = reference.center_crop(theirs, [224, 224])
    assert errors(evaluation_view(image, 224), theirs).mean() < 2.5


def test_the_evaluation_view_keeps_small_images_whole():
    image = picture(32, 32)
    assert np.array_equal(evaluation_view(image, 32), image)
    enlarged = reference.resize(tensor(image), [48, 48], InterpolationMode.BICUBIC, antialias=True)
    assert errors(evaluation_view(image, 48), enlarged).mean() < 2.5
    assert np.array_equal(evaluation_view(picture(32, 40), 32), picture(32, 40)[:, 4:36])


# Batches

IMAGES = [jpeg(picture(40 + 7 * i, 60 - 4 * i, seed=i)) for i in range(8)]
VIEWS: Views = {
    "global": (replace(SIMCLR, mask=RandomMask(0.75), grid=8),) * 2,
    "local": (replace(SIMCLR, size=16, crop_scale=(0.05, 0.4)),) * 3,
}


def test_a_batch_mirrors_the_declared_views():
    batch = augment_batch(IMAGES, VIEWS, seed=0, epoch=0)
    shapes = {name: (array.shape, array.dtype.name) for name, array in batch.arrays.items()}
    assert shapes == {
        "global": ((8, 2, 3, 32, 32), "uint8"),
        "global_mask": ((8, 2, 64), "bool"),
        "local": ((8, 3, 3, 16, 16), "uint8"),
        "broken": ((8,), "bool"),
    }
    assert all(array.flags.c_contiguous for array in batch.arrays.values())
    assert (batch.arrays["global_mask"].sum(axis=2) == 48).all()
    assert len({mask.tobytes() for mask in batch.arrays["global_mask"].reshape(16, 64)}) == 16
    assert not batch.arrays["broken"].any()
    assert batch.reasons == {}


@pytest.mark.parametrize("size", [32, 64, 96])
def test_views_are_channels_first(size):
    views: Views = {"all": (View(size=size, flip=0),)}
    pixels = picture(size, size)
    batch = augment_batch([encode_png(pixels)] * 2, views, 0, 0)
    for row in range(2):
        assert np.array_equal(batch.arrays["all"][row, 0], pixels.transpose(2, 0, 1))


@dataclass(frozen=True)
class FirstPatches:
    """A mask that hides a random number of patches, as block-wise masks do."""

    def draw(
        self, rng: np.random.Generator, grid: int, quantile: float | None = None
    ) -> np.ndarray:
        return np.arange(grid * grid) < rng.integers(1, grid * grid)


def test_any_mask_is_drawn_with_its_view():
    view = View(size=32, mask=FirstPatches(), grid=14)
    masks = augment_batch(IMAGES, {"global": (view, view)}, 0, 0).arrays["global_mask"]
    assert masks.shape == (8, 2, 196)
    assert len(set(masks.sum(axis=2).ravel().tolist())) > 8


def test_the_views_of_an_image_depend_on_seed_epoch_and_image_alone():
    whole = augment_batch(IMAGES, VIEWS, seed=3, epoch=5).arrays
    order = [5, 2, 7, 2, 0]
    part = augment_batch([IMAGES[i] for i in order], VIEWS, seed=3, epoch=5).arrays
    for name in ("global", "global_mask", "local"):
        assert np.array_equal(part[name], whole[name][order])
    alone = augment_image(IMAGES[4], VIEWS, generator(3, 5, image_key(IMAGES[4])))
    assert all(np.array_equal(alone[name], whole[name][4]) for name in alone)


EXTREMES = (0, 1, 2**64 - 1)


def test_the_compiled_random_numbers_are_numpys():
    for key, seed, epoch in product(EXTREMES, repeat=3):
        drawn = np.empty((1, 2 * parameters.DRAWS))
        random.fill_uniforms(np.array([key], np.uint64), np.uint64(seed), np.uint64(epoch), drawn)
        assert np.array_equal(drawn[0], generator(seed, epoch, key).random(2 * parameters.DRAWS))


def test_memory_is_used_again_only_when_nobody_holds_it():
    first = augment_batch(IMAGES, VIEWS, 0, 0).arrays["global"]
    kept, tensors = first.copy(), torch.from_numpy(first)
    view, address = first[2:, 0], first.ctypes.data
    del first
    for epoch in range(1, 4):
        assert augment_batch(IMAGES, VIEWS, 0, epoch).arrays["global"].ctypes.data != address
    assert np.array_equal(view, kept[2:, 0])
    del view
    augment_batch(IMAGES, VIEWS, 0, 5)
    assert np.array_equal(tensors.numpy(), kept)
    del tensors
    addresses = set()
    for epoch in range(4):
        batch = augment_batch(IMAGES, VIEWS, 0, epoch).arrays
        addresses.add(batch["global"].ctypes.data)
        del batch
    assert address in addresses


def test_threads_never_draw_into_the_same_memory():
    expected = [
        augment_batch(IMAGES, VIEWS, 0, epoch).arrays["global"].copy() for epoch in range(8)
    ]

    def draw_often(epoch: int) -> bool:
        return all(
            np.array_equal(augment_batch(IMAGES, VIEWS, 0, epoch).arrays["global"], expected[epoch])
            for _ in range(20)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(draw_often, range(8)))

    def drawn_at(_) -> int:
        return augment_batch(IMAGES, VIEWS, 0, 0).arrays["global"].ctypes.data

    own = drawn_at(0)
    assert drawn_at(0) == own, "free again, and used again"
    with ThreadPoolExecutor(1) as pool:
        assert next(pool.map(drawn_at, [0])) != own, "but not by another thread"


def test_another_seed_epoch_or_image_gives_other_views():
    first = [generator(*words).random(4).tobytes() for words in product(EXTREMES, repeat=3)]
    assert len(set(first)) == 27
    for seed, epoch in ((0, 1), (1, 0)):
        a = augment_batch(IMAGES, VIEWS, 0, 0).arrays["global"]
        b = augment_batch(IMAGES, VIEWS, seed, epoch).arrays["global"]
        assert all(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    views = augment_batch(IMAGES, VIEWS, 0, 0).arrays["global"]
    assert not np.array_equal(views[:, 0], views[:, 1])


def test_images_that_differ_in_any_one_byte_or_in_length_have_keys_of_their_own():
    data = bytes(range(100))
    others = [data[:i] + b"\xff" + data[i + 1 :] for i in range(len(data))]
    others += [data[:i] for i in range(len(data))] + [data + bytes(i) for i in range(1, 70)]
    assert len({image_key(other) for other in [data, *others]}) == 1 + len(others)
    assert len({image_key(bytes(32 * i)) for i in range(10)}) == 10


def test_the_draws_of_a_known_image_never_change():
    # A checkpoint's cursor is exact only while the same seed draws the same views.
    assert image_key(b"selfray") == 8279838537314507309
    p = draw(SIMCLR, generator(1, 2, 3), 100, 100)
    assert (p.top, p.left, p.height, p.width, p.flip) == (8, 0, 90, 99, True)


def test_broken_rows_repeat_the_nearest_earlier_readable_row():
    broken = [b"", b"text"]
    images = [broken[0], IMAGES[0], broken[1], IMAGES[1][:200], IMAGES[2], b"", IMAGES[3]]
    batch = augment_batch(images, VIEWS, 0, 0)
    whole = augment_batch(IMAGES, VIEWS, 0, 0).arrays
    assert batch.arrays["broken"].tolist() == [True, False, True, True, False, True, False]
    for name in ("global", "global_mask", "local"):
        assert np.array_equal(batch.arrays[name], whole[name][[0, 0, 0, 0, 2, 2, 3]])
    assert batch.reasons.keys() == {0, 2, 3, 5}
    assert batch.reasons[0].startswith("empty")
    assert batch.reasons[2].startswith("not an image")
    assert batch.reasons[3].startswith("truncated")


def test_a_batch_without_a_readable_image_is_refused():
    with pytest.raises(BrokenImage, match="all 2 of the batch"):
        augment_batch([b"", b"text"], VIEWS, 0, 0)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"global": (View(),)}, "views.global has no size"),
        ({"global": ()}, "views.global is empty"),
        ({"global": (View(size=8), View(size=9))}, "of one size"),
        ({"global": (View(size=8, mask=RandomMask()),)}, "no grid"),
        ({"global": (View(size=8, grid=2, mask=RandomMask()), View(size=8, grid=2))}, "or none"),
        ({"broken": (View(size=8),)}, "cannot be called 'broken'"),
        ({"global_mask": (View(size=8),)}, "cannot be called 'global_mask'"),
    ],
)
def test_views_that_make_no_batch_are_refused_by_name(views, message):
    with pytest.raises(ValueError, match=message):
        augment_batch(IMAGES, views, 0, 0)


def test_an_unaugmented_view_is_the_decoded_image():
    pixels = decode(IMAGES[0])[:32, :32]
    data = encode_png(np.ascontiguousarray(pixels))
    out = augment_image(data, {"all": (View(size=32, flip=0),)}, generator(0, 0, 0))
    assert np.array_equal(out["all"][0], pixels.transpose(2, 0, 1))
