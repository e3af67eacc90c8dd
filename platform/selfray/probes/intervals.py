"""How sure a number is: 95 % intervals by the bootstrap over test images."""

from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np

from selfray.check import require

DRAWS = 2_000
"""Resamples of the test images."""
_CELLS = 2**24
"""Counts held at a time."""


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
    """The mean of scores and how far chance may have moved it.

    Args:
        scores: float [m], one for each test image; or [S, m] where S subsets of the labels were
            used, which are then drawn anew, too.
    """
    scores = np.atleast_2d(np.asarray(scores, np.float64))
    require(scores.size > 0, "an interval needs at least one score")
    rng = np.random.default_rng(seed)
    subsets, images = scores.shape
    # Drawing S of S subsets gives few mixtures, each with its probability.
    mixtures = sorted(set(combinations_with_replacement(range(subsets), subsets)))
    drawn = np.sort(rng.integers(0, subsets, (DRAWS, subsets)), axis=1)
    means = []
    for mixture in mixtures:
        count = int((drawn == mixture).all(1).sum())
        if count:
            # Images of equal score are drawn together: exact, and cheap where scores are 0 or 1.
            values, counts = np.unique(scores[list(mixture)].mean(0), return_counts=True)
            means.append(_resampled(counts, count, rng, lambda c, v=values: c @ v / images))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Interval(float(scores.mean()), float(low), float(high))


def difference(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """The paired bootstrap: of the difference of two encoders' scores on the same images."""
    require(
        np.shape(ours) == np.shape(theirs),
        f"scores of {np.shape(ours)} and {np.shape(theirs)} are not of the same images",
    )
    return interval(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))


def overlap_interval(overlaps: np.ndarray, seed: int = 0) -> Interval:
    """Mean over classes of intersection over union, which is no mean over images.

    Args:
        overlaps: float [m, C, 2], pixels in the intersection and in the union, by image and class.
    """
    images, classes, _ = overlaps.shape
    flat = overlaps.reshape(images, -1).astype(np.float64)

    def statistic(counts: np.ndarray) -> np.ndarray:
        return mean_overlap((counts @ flat).reshape(len(counts), classes, 2))

    drawn = _resampled(np.ones(images, np.int64), DRAWS, np.random.default_rng(seed), statistic)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(float(mean_overlap(flat.sum(0).reshape(1, classes, 2))[0]), low, high)


def overlap_difference(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> Interval:
    """The paired bootstrap for mIoU; arguments as of `overlap_interval`."""
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
    """[b, C, 2] -> [b]: mIoU over the classes that occur."""
    inside, union = totals[..., 0], totals[..., 1]
    shares = np.where(union > 0, inside / np.maximum(union, 1e-12), np.nan)
    occurs = (union > 0).any(-1)
    return np.where(occurs, np.nansum(shares, -1) / np.maximum((union > 0).sum(-1), 1), 0.0)


def _resampled(
    counts: np.ndarray,
    draws: int,
    rng: np.random.Generator,
    statistic: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """[draws]: a statistic of how often each group of equal images is drawn."""
    total = int(counts.sum())
    shares = counts / total
    step = max(1, _CELLS // len(counts))
    found = []
    for first in range(0, draws, step):
        drawn = rng.multinomial(total, shares, size=min(step, draws - first))  # [b, groups]
        found.append(statistic(drawn))
    return np.concatenate(found)
