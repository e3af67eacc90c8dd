"""How well an order is shuffled: how far a sorted data set's labels leak into batches. Pure."""

from dataclasses import dataclass

import numpy as np

from selfray.check import require


@dataclass(frozen=True)
class ShuffleQuality:
    """Mean total variation distance, 0 to 1, between a batch's label histogram and the data's."""

    measured: float
    perfect: float
    """Of a perfect shuffle of the same labels in batches of the same size: batches are finite."""
    unshuffled: float
    """Of the labels in sorted order."""

    @property
    def leak(self) -> float:
        """0 for a perfect shuffle, 1 for none."""
        return (self.measured - self.perfect) / (self.unshuffled - self.perfect)


def shuffle_quality(labels: np.ndarray, batch_size: int, seed: int = 0) -> ShuffleQuality:
    """Judge labels int [n] in the order in which they are seen; a last part batch is left out.

    ValueError where the labels cannot tell: one class only, or fewer than two batches."""
    whole = len(labels) // batch_size * batch_size
    require(whole >= 2 * batch_size, f"{len(labels)} labels are no two batches of {batch_size}")
    _, classes = np.unique(labels[:whole], return_inverse=True)
    require(int(classes.max()) > 0, "labels of one class say nothing about the order")
    shuffled = np.random.default_rng(seed).permutation(classes)
    figures = [_distance(c, batch_size) for c in (classes, shuffled, np.sort(classes))]
    return ShuffleQuality(*figures)


def _distance(classes: np.ndarray, batch_size: int) -> float:
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
