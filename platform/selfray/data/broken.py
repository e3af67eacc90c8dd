"""Unreadable images of a run: each fault is reported once, and too many of them stop the run."""

import math
from dataclasses import dataclass, field

import numpy as np


def too_many(broken: int, seen: int, limit: float) -> bool:
    """Whether `broken` of `seen` images show that more than the share `limit` is broken.

    A small sample must not end a run whose true share is below the limit. So three standard
    deviations of the count are allowed (a false alarm in one of 700 checks), and at least ten
    images, so that a small data set may hold a few. The longer the run, the closer to the limit.
    """
    expected = limit * seen
    return broken > max(10.0, expected + 3 * math.sqrt(expected * (1 - limit)))


@dataclass
class BrokenTally:
    """Counts the broken images of one stream."""

    limit: float
    """data.max_broken_fraction."""
    seen: int = 0
    broken: int = 0
    _named: set[str] = field(default_factory=set)

    def see(self, is_broken: np.ndarray, reasons: np.ndarray) -> list[str]:
        """Count a micro-batch and return its new faults, one for each broken image or shard.

        A fault is returned once, regardless of the number of its rows and of epochs.

        Args:
            is_broken: bool [n]; reasons: str [n].

        Raises:
            ValueError: more than the allowed share cannot be read.
        """
        self.seen += len(is_broken)
        if not is_broken.any():
            return []
        self.broken += int(is_broken.sum())
        told = dict.fromkeys(str(reason) for reason in reasons[is_broken])
        new = [reason for reason in told if reason not in self._named]
        self._named.update(new)
        if too_many(self.broken, self.seen, self.limit):
            raise ValueError(
                f"{self.broken} of the first {self.seen} images cannot be read, more than "
                f"data.max_broken_fraction {self.limit}: the last is {list(told)[-1]}; look at the "
                "data with `selfray shards check --deep`"
            )
        return new
