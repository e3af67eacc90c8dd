"""Attention and patch tokens against masks."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from selfray.contract import RESNET, VIT
from selfray.probes.segmentation import (
    attention,
    classes_of,
    enlarged,
    jaccard,
    of_most_mass,
    overlaps,
    pairs_of,
    patch_classes,
    principal_colours,
    recoded,
    require_attention,
    views_of,
)
from selfray.report.sheets import segmentation
from selfray.storage import Location

BEIT = replace(VIT, name="beit_base_patch16_224", position="relative")


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("config", [VIT, replace(VIT, registers=2, position="learned"), BEIT])
def test_attention_is_the_share_of_each_patch_and_changes_no_feature(config):
    encoder = config.build().eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    weights, patches = attention(encoder, images)
    assert weights.shape == (2, config.heads, 16)
    assert (weights >= 0).all()
    prefix = encoder.backbone.num_prefix_tokens
    assert (weights.sum(-1) < 1).all()
    assert (weights.sum(-1) > 1 - 5 * prefix / 16).all()
    with torch.no_grad():
        assert torch.allclose(patches, encoder(images).patches, atol=1e-5)


def test_the_fewest_patches_that_hold_the_mass_are_kept():
    weights = np.array([[0.1, 0.5, 0.1, 0.3], [0.25, 0.25, 0.25, 0.25]])
    kept = of_most_mass(weights, 0.6)
    assert kept[0].tolist() == [False, True, False, True]
    assert kept[1].sum() == 3


def test_jaccard_is_its_formula():
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    found = np.zeros((2, 4, 4), bool)
    found[0, 1:3] = True
    assert jaccard(found, mask).tolist() == [4 / 12, 0.0]
    assert jaccard(found[1], np.zeros((4, 4), bool)) == 1


def test_patches_become_pixels_and_back():
    values = np.arange(4)
    pixels = enlarged(values, 6)
    assert pixels.shape == (6, 6)
    assert patch_classes(pixels, 3, 4).tolist() == [0, 1, 2, 3]
    pixels[:3, :3] = -1
    assert patch_classes(pixels, 3, 4).tolist() == [-1, 1, 2, 3]


def test_pixels_of_no_class_do_not_count():
    true = np.array([[0, 0], [1, -1]])
    assert overlaps(np.array([[0, 1], [1, 1]]), true, 2).tolist() == [[1, 2], [1, 2]]


def test_what_values_mean_in_masks():
    assert classes_of([0, 255]) == {0: 0, 255: 1}
    assert classes_of([0, 3, 255]) == {0: 0, 3: 1}
    assert recoded(np.array([0, 3, 255]), {0: 0, 3: 1}).tolist() == [0, 1, -1]
    with pytest.raises(ValueError, match="only one class"):
        classes_of([0])


def test_a_mask_is_cut_as_its_image_is():
    pixels = np.zeros((40, 60), np.uint8)
    pixels[10:30, 20:40] = 255
    view, labels = views_of(png(np.dstack([pixels] * 3)), png(pixels), 32, ("a.png", "m.png"))
    assert set(np.unique(labels)) == {0, 255}
    assert np.mean((view[0] > 127) == (labels == 255)) > 0.98


def test_a_mask_of_another_size_is_named():
    with pytest.raises(ValueError, match=r"m.png has 4 x 4 pixels, but its image has 8 x 8"):
        views_of(png(np.zeros((8, 8, 3))), png(np.zeros((4, 4))), 8, ("a.png", "m.png"))


def test_images_find_their_masks_by_name(tmp_path):
    for name in ("images/b.jpg", "images/a.png", "masks/a.png", "masks/b.png", "masks/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    images, masks = Location.of(tmp_path / "images"), Location.of(tmp_path / "masks")
    names = [tuple(part.rpartition("/")[2] for part in pair) for pair in pairs_of(images, masks)]
    assert names == [("a.png", "a.png"), ("b.jpg", "b.png")]
    (tmp_path / "masks" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images have no mask in .*, such as b"):
        pairs_of(images, masks)


def test_a_resnet_has_no_attention_and_is_told_what_works():
    with pytest.raises(ValueError, match=r"a.step is a resnet18, which has no attention"):
        require_attention(RESNET, "a.step")


def test_principal_components_tell_two_kinds_of_patches_apart_and_are_drawn():
    tokens = np.zeros((2, 4, 6))
    tokens[:, 2:] = 1
    tokens += np.random.default_rng(0).normal(0, 0.01, tokens.shape)
    colours = principal_colours(tokens)
    first = colours[..., 0].astype(int)
    assert np.abs(first[:, :2].mean() - first[:, 2:].mean()) > 200
    drawn = enlarged(colours.transpose(0, 2, 1), 8)
    sheet = segmentation(np.zeros((2, 3, 8, 8), np.uint8), np.ones((2, 8, 8)), drawn, "t")
    assert sheet.width > 8
