"""95 % intervals of numbers, by the bootstrap over test images."""

from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np

from selfray.check import require

DRAWS = 2_000
"""Number of resamples of the test images."""
_CELLS = 2**22
"""Largest number of counts held at a time."""
_INTERSECTION, _UNION = 0, 1
"""The last axis of overlaps."""


class Interval(NamedTuple):
    value: float
    low: float
    """2.5 % quantile of the bootstrap."""
    high: float
    """97.5 % quantile of it."""

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def interval(scores: np.ndarray, seed: int = 0) -> Interval:
    """The mean of scores with its bootstrap interval.

    Args:
        scores: float [m], one for each test image; or [S, m] for S subsets of the labels, which are
            resampled as well.
    """
    scores = np.atleast_2d(np.asarray(scores, np.float64))
    require(scores.size > 0, "an interval needs at least one score")
    rng = np.random.default_rng(seed)
    subsets, images = scores.shape
    # S draws from S subsets give only a few distinct mixtures, each with its own frequency.
    mixtures = sorted(set(combinations_with_replacement(range(subsets), subsets)))
    drawn = np.sort(rng.integers(0, subsets, (DRAWS, subsets)), axis=1)
    means = []
    for mixture in mixtures:
        count = int((drawn == mixture).all(1).sum())
        if count:
            # Images with equal scores are drawn as one group: exact, and fast for scores 0 and 1.
            values, counts = np.unique(scores[list(mixture)].mean(0), return_counts=True)
            means.append(_resampled(counts, count, rng, lambda c, v=values: c @ v / images))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Interval(float(scores.mean()), float(low), float(high))


def difference(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """ours - theirs with its interval: the paired bootstrap of scores on the same images, shaped as
    in `interval`."""
    require(
        np.shape(ours) == np.shape(theirs),
        f"scores of shapes {np.shape(ours)} and {np.shape(theirs)} are not of the same images",
    )
    return interval(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))


def overlap_interval(overlaps: np.ndarray, seed: int = 0) -> Interval:
    """mIoU with its interval: intersection over union of pixels summed over images, mean over
    classes.

    Args:
        overlaps: float [m, C, 2], number of pixels in the (intersection, union) of each image and
            class.
    """
    images, classes, _ = overlaps.shape
    flat = overlaps.reshape(images, -1).astype(np.float64)

    def statistic(counts: np.ndarray) -> np.ndarray:
        return mean_overlap((counts @ flat).reshape(len(counts), classes, 2))

    drawn = _resampled(np.ones(images, np.int64), DRAWS, np.random.default_rng(seed), statistic)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(float(mean_overlap(flat.sum(0).reshape(1, classes, 2))[0]), low, high)


def overlap_difference(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> Interval:
    """mIoU of `ours` minus that of `theirs`, by the paired bootstrap; arguments as in
    `overlap_interval`."""
    require(ours.shape == theirs.shape, "overlaps are not of the same images and classes")
    images, classes, _ = ours.shape
    flat = np.concatenate([a.reshape(images, -1) for a in (ours, theirs)], 1).astype(np.float64)

    def statistic(counts: np.ndarray) -> np.ndarray:
        both = (counts @ flat).reshape(len(counts), 2, classes, 2)
        return mean_overlap(both[:, 0]) - mean_overlap(both[:, 1])

    drawn = _resampled(np.ones(images, np.int64), DRAWS, np.random.default_rng(seed), statistic)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(float(statistic(np.ones((1, images)))[0]), float(low), float(high))


def mean_overlap(totals: np.ndarray) -> np.ndarray:
    """mIoU over the classes that occur: totals [b, C, 2] of (intersection, union) -> [b]."""
    inside, union = totals[..., _INTERSECTION], totals[..., _UNION]
    shares = np.where(union > 0, inside / np.maximum(union, 1e-12), np.nan)
    occurs = (union > 0).any(-1)
    return np.where(occurs, np.nansum(shares, -1) / np.maximum((union > 0).sum(-1), 1), 0.0)


def _resampled(
    counts: np.ndarray,
    draws: int,
    rng: np.random.Generator,
    statistic: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Bootstrap values [draws] of a statistic, which maps the counts [b, groups] of drawn images to
    [b]."""
    total = int(counts.sum())
    shares = counts / total
    step = max(1, _CELLS // len(counts))
    found = []
    for first in range(0, draws, step):
        drawn = rng.multinomial(total, shares, size=min(step, draws - first))  # [b, groups]
        found.append(statistic(drawn))
    return np.concatenate(found)
