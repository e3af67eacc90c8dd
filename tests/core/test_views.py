"""Masks: their shapes and ratios."""

import cv2
import numpy as np
import pytest

from selfray.views import BlockMask, RandomMask


def drawn(mask: BlockMask, grid: int, count: int = 200) -> np.ndarray:
    """bool [count, grid, grid]."""
    rng = np.random.default_rng(0)
    return np.stack([mask.draw(rng, grid).reshape(grid, grid) for _ in range(count)])


@pytest.mark.parametrize(
    ("grid", "ratio", "hidden"), [(14, 75 / 196, 75), (14, 0.4, 78), (4, 0.4, 6), (8, 0.5, 32)]
)
def test_block_masks_hide_exactly_their_share_of_every_image(grid, ratio, hidden):
    masks = drawn(BlockMask((ratio, ratio)), grid)
    assert (masks.sum((1, 2)) == hidden).all()
    assert len({mask.tobytes() for mask in masks}) > 50, "they differ from image to image"


def test_blocks_hang_together_where_random_patches_do_not():
    def hidden_neighbours(masks: np.ndarray) -> float:
        """Of the pairs of neighbours with a hidden patch, the share whose other one is hidden."""
        pairs = [(masks[:, 1:], masks[:, :-1]), (masks[:, :, 1:], masks[:, :, :-1])]
        both = sum(int((a & b).sum()) for a, b in pairs)
        either = sum(int((a | b).sum()) for a, b in pairs)
        return both / either

    rng = np.random.default_rng(0)
    scattered = np.stack([RandomMask(0.4).draw(rng, 14).reshape(14, 14) for _ in range(200)])
    assert hidden_neighbours(drawn(BlockMask(), 14)) > 0.6
    assert hidden_neighbours(scattered) < 0.3


def test_beit_s_blocks_grow_together_as_the_authors_do():
    # 600 masks of the authors' generator have 1.44 connected parts each, of 75 patches at most.
    masks = drawn(BlockMask((75 / 196, 75 / 196), smallest=16), 14, 600)
    assert set(masks.sum((1, 2)).tolist()) == {75}
    parts = [connected_parts(mask) for mask in masks]
    assert np.mean(parts) == pytest.approx(1.44, abs=0.15)


def connected_parts(mask: np.ndarray) -> int:
    """How many groups of neighbouring True cells a mask [grid, grid] has."""
    count, _ = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    return count - 1


def test_block_masks_favour_no_side_and_spare_no_patch():
    often = drawn(BlockMask(), 14, 2000).mean(0)
    assert often.min() > 0.02  # corners are hidden seldom: few rectangles reach them
    for mirrored in (often[::-1], often[:, ::-1], often.T):
        assert np.abs(mirrored - often).max() < 0.08


def test_a_block_mask_hides_nothing_in_views_beyond_its_share():
    rng = np.random.default_rng(0)
    mask = BlockMask((0.1, 0.5), share=0.5, smallest=4)
    hidden = [int(mask.draw(rng, 14, q).sum()) for q in (0.0, 0.25, 0.499, 0.5, 0.9)]
    assert hidden == [20, 59, 98, 0, 0]


def test_a_block_mask_without_a_place_in_a_batch_draws_one():
    counts = drawn(BlockMask((0.1, 0.5), share=0.5, smallest=4), 14).sum((1, 2))
    assert 60 < (counts == 0).sum() < 140
    assert counts.max() > 80


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": (0.5, 0.1)}, r"mask_ratio must be shares with 0 < low <= high < 1, got \(0.5"),
        ({"ratio": (0.0, 0.1)}, "mask_ratio must be shares"),
        ({"share": 0.0}, r"masked_share must lie in \(0, 1\], got 0.0"),
        ({"smallest": 0}, "smallest_block must be positive, got 0"),
    ],
)
def test_a_block_mask_refuses_settings_outside_their_range(settings, message):
    with pytest.raises(ValueError, match=message):
        BlockMask(**settings)
