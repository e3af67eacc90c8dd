"""Duplicates among images: keys and hashes of each image, groups of alike images, and who stays.

The perceptual hash is the signs of the 64 lowest frequencies of the discrete cosine transform of an
image's brightness at 32 x 32 pixels. Measured on 200 photographs, 95 % of copies differ from their
original by at most 1 bit (JPEG quality 50, or half the size), 3 bits (a third of the size, or 10 %
brighter), 10 bits (a crop to 95 % of the side). Of 4.5 million pairs of different images (300
photographs, and 3,000 blood cells) none differ by 6 bits or fewer. A mirrored copy is not found,
nor is every copy of an image that is almost smooth, such as one of sky alone.
"""

import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from selfray.pixels.augment import image_key

BITS = 64
SIDE = 32
"""Side in pixels of the image that is hashed."""
LEAST_DEVIATION = 1.0
"""An image of less deviation, in levels of 0..255, has no hash: its frequencies are noise."""
STRIP = 1024
"""Rows of one side of a block of comparisons."""
PAIRS_AT_ONCE = 2**21
"""Pairs that are held before they are reduced to groups."""
BYTES, PIXELS, NEAR = "bytes", "pixels", "near"

_PLACES = sorted(
    ((row, column) for row in range(12) for column in range(12)),
    key=lambda place: (sum(place), place[0]),
)[1 : BITS + 1]
_ROWS, _COLUMNS = (np.array(places) for places in zip(*_PLACES, strict=True))


def perceptual_hash(pixels: np.ndarray) -> int | None:
    """64 bits of an image uint8 [H, W, C]; None for one that is nearly of one colour."""
    brightness = pixels.mean(2, dtype=np.float32)
    small = cv2.resize(brightness, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    if small.std() < LEAST_DEVIATION:
        return None
    signs = cv2.dct(small)[_ROWS, _COLUMNS] > 0
    return int.from_bytes(np.packbits(signs).tobytes(), "big")


def most_bits(similarity: float) -> int:
    """How many of the 64 bits may differ at this similarity, which is the share of equal bits."""
    return int((1 - similarity) * BITS + 1e-9)


@dataclass(frozen=True)
class Prints:
    """What identifies each of n images, without their pixels."""

    names: tuple[str, ...]
    """The row of the data set that holds the image."""
    paths: tuple[str, ...]
    of_bytes: np.ndarray
    """uint64 [n]: a key of the encoded bytes."""
    of_pixels: np.ndarray
    """uint64 [n]: a key of the decoded pixels."""
    hashes: np.ndarray
    """uint64 [n]: the perceptual hash."""
    hashed: np.ndarray
    """bool [n]: whether it has one."""
    sizes: np.ndarray
    """int64 [n]: number of pixels."""
    labels: np.ndarray
    """int64 [n]: -1 for none."""
    is_test: np.ndarray
    """bool [n]."""

    _ARRAYS = ("of_bytes", "of_pixels", "hashes", "hashed", "sizes", "labels", "is_test")

    def __len__(self) -> int:
        return len(self.names)

    def packed(self) -> bytes:
        """As a file; see `unpacked`."""
        file = io.BytesIO()
        texts = {key: np.array(getattr(self, key), np.str_) for key in ("names", "paths")}
        np.savez_compressed(file, **texts, **{key: getattr(self, key) for key in self._ARRAYS})
        return file.getvalue()

    @classmethod
    def unpacked(cls, data: bytes) -> "Prints":
        """The inverse of `packed`. Raises ValueError, KeyError or OSError for anything else."""
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            texts = {key: tuple(found[key].tolist()) for key in ("names", "paths")}
            return cls(**texts, **{key: found[key] for key in cls._ARRAYS})

    @classmethod
    def joined(cls, parts: "Sequence[Prints]") -> "Prints":
        arrays = {key: np.concatenate([getattr(p, key) for p in parts]) for key in cls._ARRAYS}
        return cls(
            tuple(name for part in parts for name in part.names),
            tuple(path for part in parts for path in part.paths),
            **arrays,
        )


class Printing:
    """Collects the prints of images."""

    def __init__(self) -> None:
        self._rows: list[tuple[Any, ...]] = []

    def add(
        self, name: str, path: str, data: bytes, pixels: np.ndarray, label: int, is_test: bool
    ) -> None:
        found = perceptual_hash(pixels)
        key = image_key(pixels.tobytes() + f"{pixels.shape}".encode())
        size = pixels.shape[0] * pixels.shape[1]
        exact = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        row = (name, path, exact, key, found or 0, found is not None, size, label, is_test)
        self._rows.append(row)

    def result(self) -> Prints:
        columns: list[Sequence[Any]] = list(zip(*self._rows, strict=True)) or [()] * 9
        kinds = (np.uint64, np.uint64, np.uint64, bool, np.int64, np.int64, bool)
        arrays = [np.array(c, kind) for c, kind in zip(columns[2:], kinds, strict=True)]
        return Prints(tuple(columns[0]), tuple(columns[1]), *arrays)


# Groups of alike images ---------------------------------------------------------------------------

Links = np.ndarray
"""int64 [k, 2]: pairs of images. Images that links connect are one group."""
NO_LINKS: Links = np.empty((0, 2), np.int64)


def equal_links(keys: np.ndarray) -> Links:
    """Links between images with equal keys uint64 [n]."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    return np.stack([order[:-1][same], order[1:][same]], axis=1)


def equal_hashes(prints: Prints) -> tuple[Links, np.ndarray]:
    """(links between images of equal hashes, bool [n]: one image for each hash)."""
    rows = np.flatnonzero(prints.hashed)
    firsts = np.zeros(len(prints), bool)
    firsts[rows[np.unique(prints.hashes[rows], return_index=True)[1]]] = True
    return rows[equal_links(prints.hashes[rows])].reshape(-1, 2), firsts


def bands(most: int) -> list[tuple[int, int]]:
    """(first bit, bits) of each of most + 1 parts of a hash. Two hashes that differ by `most` bits
    or fewer are equal in at least one part."""
    edges = np.linspace(0, BITS, most + 2).astype(int).tolist()
    return [(low, high - low) for low, high in itertools.pairwise(edges)]


def near_links(hashes: np.ndarray, chosen: np.ndarray, band: tuple[int, int], most: int) -> Links:
    """Links between hashes uint64 [n] that are equal in one part and differ by at most `most` bits.

    Compares the images of each bucket, which have the part in common: n^2 / 2^bits comparisons for
    hashes that are spread evenly. Memory grows with n only.

    Args:
        chosen: bool [n]; others are not compared.
    """
    first, bits = band
    places = np.flatnonzero(chosen)
    parts = (hashes[places] >> np.uint64(first)) & np.uint64(2**bits - 1)
    order = places[np.argsort(parts, kind="stable")]
    _, counts = np.unique(parts, return_counts=True)
    ends = np.cumsum(counts)
    gathering = _Gathering()
    for end, count in zip(ends[counts > 1], counts[counts > 1], strict=True):
        bucket = order[end - count : end]
        for start, other in itertools.product(range(0, count, STRIP), repeat=2):
            if other >= start:
                rows, columns = bucket[start : start + STRIP], bucket[other : other + STRIP]
                differ = np.bitwise_count(hashes[rows][:, None] ^ hashes[columns][None])
                gathering.add(rows, columns, differ <= most)
    return gathering.links()


def cosine_links(
    rows: np.ndarray, others: np.ndarray, first: int, second: int, least: float
) -> Links:
    """Links between features, float32 [n, D] and [m, D] of length 1, of at least this cosine.

    Args:
        first, second: the numbers of the first row of each.
    """
    gathering = _Gathering()
    for start in range(0, len(rows), STRIP):
        alike = rows[start : start + STRIP] @ others.T >= least
        own = np.arange(first + start, first + start + len(alike))
        gathering.add(own, np.arange(second, second + len(others)), alike)
    return gathering.links()


class _Gathering:
    """Links of alike images, reduced to one per image when they are many."""

    def __init__(self) -> None:
        self._parts: list[Links] = []
        self._count = 0

    def add(self, rows: np.ndarray, columns: np.ndarray, alike: np.ndarray) -> None:
        """Add rows int64 [a] and columns int64 [b] where alike bool [a, b]."""
        at, to = np.nonzero(alike)
        pairs = np.stack([rows[at], columns[to]], axis=1)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        if len(pairs):
            self._parts.append(pairs.astype(np.int64))
            self._count += len(pairs)
        if self._count > PAIRS_AT_ONCE:
            self._parts = [self.links()]
            self._count = len(self._parts[0])

    def links(self) -> Links:
        """At most one link for each image, with the same groups."""
        if not self._parts:
            return NO_LINKS
        pairs = np.concatenate(self._parts)
        linked = np.zeros(pairs.max() + 1, bool)
        linked[pairs] = True
        nodes = np.flatnonzero(linked)
        groups = groups_of(len(nodes), (np.cumsum(linked) - 1)[pairs])
        _, heads = np.unique(groups, return_index=True)
        head = heads[groups]
        is_other = head != np.arange(len(nodes))
        return np.stack([nodes[head][is_other], nodes[is_other]], axis=1)


def groups_of(count: int, links: Links) -> np.ndarray:
    """int64 [count]: the number of each image's group, where links connect groups."""
    ones = np.ones(len(links), bool)
    graph = coo_array((ones, (links[:, 0], links[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


# Who stays ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """A train image that goes, because another image is alike."""

    row: int
    stays: int
    """The alike image of its group that stays."""
    kind: str
    """BYTES, PIXELS or NEAR."""


@dataclass(frozen=True)
class Decision:
    removals: tuple[Removal, ...]
    test_in_test: int
    """Test images that are alike to another test image; they all stay."""
    several_classes: int
    """Groups that hold images of several classes."""


def decide(prints: Prints, groups: np.ndarray) -> Decision:
    """One image of each group stays; a group with test images keeps these, and no train image.

    A train image stays rather than another if it has a label, then if it has more pixels, then by
    its key and path, so that the order of files does not matter. Test images are never removed.
    """
    removals: list[Removal] = []
    test_in_test = several = 0
    for members in _groups_of_several(groups):
        labels = prints.labels[members]
        several += len(np.unique(labels[labels >= 0])) > 1
        tests = members[prints.is_test[members]]
        test_in_test += len(tests) if len(tests) > 1 else 0
        train = members[~prints.is_test[members]]
        first = min(tests if len(tests) else train, key=lambda row: _rank(prints, row))
        for row in sorted(train, key=lambda row: _rank(prints, row)):
            if row != first:
                removals.append(_removal(prints, int(row), int(first), tests))
    return Decision(tuple(removals), test_in_test, several)


def _rank(prints: Prints, row: int) -> tuple[Any, ...]:
    has_label, size = prints.labels[row] >= 0, prints.sizes[row]
    return not has_label, -size, prints.of_bytes[row], prints.paths[row]


def _removal(prints: Prints, row: int, stays: int, tests: np.ndarray) -> Removal:
    """With the test image that is the most alike, where there are some."""
    if len(tests):
        differ = np.bitwise_count(prints.hashes[tests] ^ prints.hashes[row])
        same = prints.of_pixels[tests] == prints.of_pixels[row]
        stays = int(tests[np.lexsort((tests, differ, ~same))[0]])
    if prints.of_bytes[row] == prints.of_bytes[stays]:
        return Removal(row, stays, BYTES)
    return Removal(row, stays, PIXELS if prints.of_pixels[row] == prints.of_pixels[stays] else NEAR)


def _groups_of_several(groups: np.ndarray) -> Iterator[np.ndarray]:
    order = np.argsort(groups, kind="stable")
    edges = np.flatnonzero(np.diff(groups[order])) + 1
    for members in np.split(order, edges):
        if len(members) > 1:
            yield members
