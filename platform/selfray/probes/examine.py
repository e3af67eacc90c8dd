"""Checks of labelled images before an evaluation: faults that falsify a number give a note or
error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selfray.check import require


@dataclass(frozen=True)
class Examined:
    """Labels renumbered to 0, 1, 2, ..."""

    train: np.ndarray
    """int64 [n], in 0..classes-1."""
    test: np.ndarray
    """int64 [m]; numbers from `classes` on are classes without train images: always wrong."""
    names: tuple[str, ...]
    """Names of the train classes."""
    notes: tuple[str, ...]
    """Sentences that a reader of the numbers must know."""

    @property
    def classes(self) -> int:
        return len(self.names)


def examine(
    where: str,
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    train_keys: np.ndarray,
    test_keys: np.ndarray,
    label_names: Sequence[str] | None = None,
) -> Examined:
    """Number the classes and look for faults that falsify an evaluation.

    Args:
        where: the data set, for messages.
        train_labels: int64 [n] of labelled images, any integers; test_labels: int64 [m].
        train_keys: uint64 [n], a hash of each image's bytes; test_keys: uint64 [m].

    Raises:
        ValueError: there are no labelled train or test images, or only one class.
    """
    require(
        len(train_labels) > 0 and len(test_labels) > 0,
        f"{where} has {len(train_labels):,} labelled train and {len(test_labels):,} labelled test "
        "images, but needs both: give labels as class folders or an integer column `label`",
    )
    known, train, counts = np.unique(train_labels, return_inverse=True, return_counts=True)
    names: tuple[str, ...] = tuple(
        str(label_names[c]) if label_names and 0 <= c < len(label_names) else str(c)
        for c in known.tolist()
    )
    require(
        len(known) > 1,
        f"{where} has only one class ({names[0]}) in its train images: give at least two classes",
    )
    every = np.concatenate([known, np.setdiff1d(test_labels, known)])
    place = np.argsort(every)
    test = place[np.searchsorted(every[place], test_labels)]
    notes = []
    both = np.isin(test_keys, train_keys)
    if both.any():
        notes.append(
            f"warning: {int(both.sum()):,} of {len(test_keys):,} test images of {where} are also "
            "in train (the same bytes): every number below is too high"
        )
    alone = [names[int(i)] for i in np.flatnonzero(counts == 1)]
    if alone:
        notes.append(
            f"{_counted(len(alone), 'class')} with one train image ({_listed(alone)}): no image "
            "can be held out"
        )
    if (strange := int((test >= len(known)).sum())) > 0:
        notes.append(
            f"{strange:,} test images belong to classes without train images: they count as wrong"
        )
    return Examined(train.astype(np.int64), test.astype(np.int64), names, tuple(notes))


def _counted(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count:,} {noun}es"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
