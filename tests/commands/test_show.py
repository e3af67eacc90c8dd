"""`selfray shards show`: what it says of a set of images, and the picture that it draws."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from helpers import write, write_tar
from selfray.commands import main
from selfray.console import Console
from selfray.data.chosen import choose
from selfray.data.writer import write_arrays
from selfray.pixels.augment import augment_batch
from selfray.pixels.codecs import encode_channels, encode_png
from selfray.recipes import every


def pixels(seed: int, channels: int = 3, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)


@pytest.fixture
def shows(tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """Runs `selfray shards show` in this process, and returns what it said until it ended."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object, error: str = "") -> list[str]:
        stream = io.StringIO()
        command = main.parse(["shards", "show", *map(str, words)])
        if error:
            with pytest.raises(ValueError, match=error):
                command.run(Console(stream, None))
        else:
            assert command.run(Console(stream, None)) == 0
        return stream.getvalue().splitlines()

    return run


def is_inside(sheet: Image.Image, tile: np.ndarray) -> bool:
    """Whether a square image uint8 [3, h, h] occurs in a sheet, enlarged to a cell."""
    whole = np.asarray(sheet)
    for side in (80, 96, 192):
        cell = Image.fromarray(tile.transpose(1, 2, 0)).resize(
            (side, side), Image.Resampling.NEAREST
        )
        wanted = np.asarray(cell)
        for y, x in np.argwhere((whole == wanted[0, 0]).all(-1)):
            if np.array_equal(whole[y : y + side, x : x + side], wanted):
                return True
    return False


def test_shards_are_described_and_their_views_are_those_of_training(shows, tmp_path):
    images = [encode_png(pixels(seed)) for seed in range(5)]
    write_arrays(tmp_path / "scans", images, [0, 1, 0, 1, 1], label_names=["cat", "dog"])
    said = shows("scans", "--recipe", "simclr-digits")
    assert said[0].startswith(f"{tmp_path}/scans: 5 images in 1 shards, ")
    assert "splits: train 5; no test images of their own" in said
    assert "pixels (min / median / max): width 16 / 16 / 16, height 16 / 16 / 16" in said
    assert any(line.startswith("channels: 3 (RGB); mean 0.") for line in said)
    assert {"duplicates: none", "quarantined: none", "formats: PNG 5"} <= set(said)
    assert "depth: 8 bits, as in the files" in said
    assert "  dog 3, cat 2" in said
    assert said[-1].endswith("scans-images.png: 5 of 5 images, chosen by seed 0")
    sheet = Image.open(tmp_path / "scans-images.png")
    assert all(is_inside(sheet, pixels(seed).transpose(2, 0, 1)) for seed in range(5))
    recipe = every()["simclr-digits"]
    first = choose(str(tmp_path / "scans"), 64, 0).encoded[:4]
    views = augment_batch(first, recipe.views, recipe.seed, 0).arrays["global"]
    for drawn in views.reshape(-1, *views.shape[2:]):
        assert is_inside(sheet, drawn)


def test_raw_images_are_chosen_by_the_seed_and_described_as_a_sample(shows, tmp_path):
    ramp = np.linspace(0, 2702, 256).reshape(16, 16).astype(np.uint16)
    deep = io.BytesIO()
    Image.fromarray(ramp).save(deep, "PNG")
    files = {f"raw/{kind}/{i}.png": encode_png(pixels(i)) for i in range(40) for kind in "ab"}
    write(tmp_path, {**files, "raw/a/broken.png": b"no image", "raw/b/deep.png": deep.getvalue()})
    chosen = [choose(str(tmp_path / "raw"), 64, seed).encoded for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    said = shows("raw", "--to", "look.png", "--seed", 1)
    assert "82 train images of 2 classes (a, b)" in said
    assert any(
        line.endswith("/raw has no manifest: what follows is of some images only") for line in said
    )
    assert (tmp_path / "look.png").exists()


def test_images_of_many_channels_say_which_are_shown_and_refuse_hues_by_name(shows, tmp_path):
    images = [encode_channels(pixels(seed, 8)) for seed in range(3)]
    write_arrays(tmp_path / "bands", images)
    said = shows("bands", "--recipe", "simclr-cifar10", error="saturation .* not defined")
    assert "the picture shows channels 1, 2 and 3 of 8 as red, green and blue" in said
    sheet = Image.open(tmp_path / "bands-images.png")  # the images are shown all the same
    assert all(is_inside(sheet, pixels(seed, 8)[:, :, :3].transpose(2, 0, 1)) for seed in range(3))


def test_bad_input_to_show_is_one_line_with_the_way_out(shows, tmp_path):
    write_tar(tmp_path / "tars/train-0.tar", {"0.png": encode_png(pixels(0))})
    shows("tars", error="no table of contents: convert them by `selfray shards build ")
    write(tmp_path, {"odd/a.png": b"x", "good/a.png": encode_png(pixels(0))})
    shows("odd", error="none of 1 images of .* can be read; the first: a.png: not an image")
    shows("good", "--recipe", "simclr-digit", error="no recipe simclr-digit.*simclr-digits")
    shows("good", "--to", "a.jpg", error="--to takes a .png file, got a.jpg")
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        main.parse(["shards", "show", "nothing"]).run(Console(io.StringIO(), None))
