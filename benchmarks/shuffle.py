"""Measures how well an order is shuffled: how far a sorted data set's labels leak into batches.
Pure.
"""

from dataclasses import dataclass

import numpy as np

from selfray.check import require


@dataclass(frozen=True)
class ShuffleQuality:
    """Mean total variation distance, 0 to 1, between a batch's label histogram and the data's."""

    measured: float
    perfect: float
    """The distance of a perfect shuffle of the same labels; not 0, because batches are finite."""
    unshuffled: float
    """The distance of the labels in sorted order."""

    @property
    def leak(self) -> float:
        """0 for a perfect shuffle, 1 for none."""
        return (self.measured - self.perfect) / (self.unshuffled - self.perfect)


def shuffle_quality(labels: np.ndarray, batch_size: int, seed: int = 0) -> ShuffleQuality:
    """Judge the order of labels, int [n] as they are seen; an incomplete last batch is left out.

    ValueError if there is only one class, or fewer than two batches."""
    whole = len(labels) // batch_size * batch_size
    require(
        whole >= 2 * batch_size, f"{len(labels)} labels: fewer than two batches of {batch_size}"
    )
    _, classes = np.unique(labels[:whole], return_inverse=True)
    require(int(classes.max()) > 0, "labels of one class cannot show a shuffle")
    shuffled = np.random.default_rng(seed).permutation(classes)
    figures = [_distance(c, batch_size) for c in (classes, shuffled, np.sort(classes))]
    return ShuffleQuality(*figures)


def _distance(classes: np.ndarray, batch_size: int) -> float:
    """Mean total variation distance of batches of `classes`, int [n], to their overall
    histogram."""
    count = int(classes.max()) + 1
    overall = np.bincount(classes, minlength=count) / len(classes)
    batches = classes.reshape(-1, batch_size)
    return float(
        np.mean(
            [
                np.abs(np.bincount(b, minlength=count) / batch_size - overall).sum() / 2
                for b in batches
            ]
        )
    )
