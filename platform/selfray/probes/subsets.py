"""Subsets of labelled images: pure functions of a seed and of the images themselves.

An image is identified by its key, a hash of its bytes. So a subset does not depend on the order of
files, on the number of tasks or on other files in the folder.
"""

import hashlib

import numpy as np


def image_digest(data: bytes) -> int:
    """A 63-bit hash of an image's bytes, its key."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def ranks(keys: np.ndarray, seed: int) -> np.ndarray:
    """A pseudo-random number for each key uint64 [n], from (seed, key) only: uint64 [n], by
    splitmix64."""
    with np.errstate(over="ignore"):
        mixed = keys.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return mixed ^ (mixed >> np.uint64(31))


def balanced(keys: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sorted indices int64 of about `count` images: equally many of each class, at least one, and
    all images of a class that has fewer.

    Args:
        keys: uint64 [n]; labels: int64 [n].
    """
    order = np.lexsort((keys, ranks(keys, seed)))  # the key decides between equal ranks
    each = max(1, round(count / len(np.unique(labels))))
    place = _place_in_class(labels[order])
    return np.sort(order[place < each])


def held_out(keys: np.ndarray, labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """bool [n]: a share of each class's images, held out to choose settings. None of a class with
    fewer than two images."""
    order = np.lexsort((keys, ranks(keys, seed)))
    counts = np.bincount(labels)
    wanted = np.where(counts > 1, np.maximum(1, np.floor(counts * share)), 0)
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[order] = _place_in_class(labels[order]) < wanted[labels[order]]
    return chosen


def folds(keys: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """int64 [n] in 0..count-1: the cross-validation fold of each image; folds are stratified."""
    order = np.lexsort((keys, ranks(keys, seed)))
    part = np.empty(len(labels), dtype=np.int64)
    part[order] = _place_in_class(labels[order]) % count
    return part


def _place_in_class(labels: np.ndarray) -> np.ndarray:
    """int64 [n]: for each image, the number of earlier images with the same label."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    place = np.empty(len(labels), dtype=np.int64)
    place[order] = np.arange(len(labels)) - starts[labels[order]]
    return place
