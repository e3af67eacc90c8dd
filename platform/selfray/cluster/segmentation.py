"""Judges encoders on images with masks, by Ray tasks: how well they locate objects.

Each task writes the attention, patch tokens and masks of a block of images to a Parquet file of
`<home>/features/<key>`. All that follows reads these block by block, so memory does not grow with
the number of images, except for a few numbers of each.
"""

import hashlib
import json
import posixpath
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch

from selfray.cluster.embedding_tasks import Devices, in_blocks
from selfray.cluster.evaluation import EVALUATIONS, FEATURES, Subject, keep, kept
from selfray.console import Console
from selfray.models.encoder import normalize
from selfray.pace import Pace
from selfray.probes.classifier import Gallery
from selfray.probes.embedding import KEY, PATCHES, fixed_lists, loaded, part_name, write_part
from selfray.probes.encoders import EncoderRef
from selfray.probes.feature_files import matrix, read_part, scratch
from selfray.probes.judgement import Judgement
from selfray.probes.logistic import Logistic
from selfray.probes.segmentation import (
    Attention,
    Patches,
    attention,
    classes_of,
    enlarged,
    jaccard,
    of_most_mass,
    overlaps,
    patch_classes,
    principal_colours,
    recoded,
    views_of,
)
from selfray.probes.subsets import image_digest, ranks
from selfray.storage import Location

BLOCK = 32
"""Images per task and file."""
SHOWN = 8
"""Images shown in the picture."""
ATTENTION, MASK = "attention", "mask"


@dataclass(frozen=True)
class Looking:
    """Images with masks, and the encoder that looks at them."""

    encoder: EncoderRef
    pairs: tuple[tuple[str, str], ...]
    """(URI of an image, URI of its mask)"""
    size: int
    """Side in pixels to which images are resized."""

    @property
    def blocks(self) -> int:
        return -(-len(self.pairs) // BLOCK)

    def of_block(self, block: int) -> Sequence[tuple[str, str]]:
        return self.pairs[block * BLOCK : (block + 1) * BLOCK]

    def key(self) -> str:
        """A hash of everything that determines the files."""
        found = hashlib.sha256(f"looking-v1 {BLOCK} {self.size} {self.encoder.digest}".encode())
        found.update(repr(self.encoder.normalization).encode())
        for files in zip(*self.pairs, strict=True):
            folder = Location.of(files[0]).parent
            known = {info.base_name: info for info in folder.list()}
            for uri in files:
                info = known[posixpath.basename(uri)]
                found.update(json.dumps([uri, info.size, info.mtime_ns]).encode())
        return found.hexdigest()[:16]


class Block(NamedTuple):
    """The content of a file, for its b images."""

    keys: np.ndarray
    """uint64 [b]: digests of the images' bytes."""
    attention: np.ndarray
    """float16 [b, heads, N]: attention of the class token to the patches."""
    patches: np.ndarray
    """float16 [b, N, D]: patch tokens."""
    masks: np.ndarray
    """uint8 [b, size, size]: the masks' values."""


@dataclass(frozen=True)
class Seen:
    """All files of a folder."""

    folder: Location
    size: int
    heads: int
    width: int
    """D"""
    counts: tuple[int, ...]
    """Images of each file."""
    keys: np.ndarray
    """uint64 [n]"""
    classes: dict[int, int]
    """Value in masks -> class."""

    def blocks(self) -> Iterator[tuple[slice, Block]]:
        """(places of its images, content) of each file."""
        first = 0
        for number, count in enumerate(self.counts):
            yield slice(first, first + count), self.block(number)
            first += count

    def block(self, number: int) -> Block:
        table = read_part(self.folder / part_name(number))
        found = [matrix(table[name].combine_chunks()) for name in (ATTENTION, PATCHES, MASK)]
        attended, patches, masks = found
        count = table.num_rows
        return Block(
            table[KEY].to_numpy(),
            attended.reshape(count, self.heads, -1),
            patches.reshape(count, -1, self.width),
            masks.reshape(count, self.size, self.size),
        )


@dataclass(frozen=True)
class Segmented:
    """An encoder's judgements on images with masks, and some images to show."""

    subject: Subject
    judgements: tuple[Judgement, ...]
    views: np.ndarray
    """uint8 [s, 3, size, size]"""
    heads: np.ndarray
    """float [s, size, size]: the attention of the best head, 0..1."""
    colours: np.ndarray
    """uint8 [s, 3, size, size]: principal components of the patch tokens."""
    images: int
    classes: int


def segmented(
    subject: Subject, pairs: Sequence[tuple[str, str]], console: Console, devices: Devices
) -> Segmented:
    """Judge one encoder on images with masks; what an earlier call computed is reused. ValueError
    names a file that cannot be used."""
    started = time.monotonic()
    seen = _look(subject, pairs, console, devices)
    console.live(f"{subject.title}: attention against masks")
    # Tasks end in any order.
    of_block = dict(in_blocks(_jaccards, seen, range(len(seen.counts)), Devices()))
    by_head = np.concatenate([of_block[block] for block in range(len(seen.counts))])
    console.live(f"{subject.title}: a linear classifier on patch tokens")
    judgements = (_of_attention(by_head), _of_patches(subject, pairs, seen))
    first = seen.block(0)
    shown = slice(0, SHOWN)
    views = np.stack([_view(*pair, subject.size) for pair in pairs[shown]])
    best = by_head[: len(views), :-1].argmax(1)
    weights = first.attention[shown][np.arange(len(views)), best].astype(np.float32)  # [s, N]
    low, high = weights.min(-1, keepdims=True), weights.max(-1, keepdims=True)
    heads = enlarged((weights - low) / np.maximum(high - low, 1e-12), subject.size)
    colours = principal_colours(first.patches[shown]).transpose(0, 2, 1)
    seconds = time.monotonic() - started
    judgements = tuple(Judgement(**{**vars(j), "seconds": seconds}) for j in judgements)
    pictures = enlarged(colours, subject.size)
    return Segmented(subject, judgements, views, heads, pictures, len(pairs), len(seen.classes))


def _look(
    subject: Subject, pairs: Sequence[tuple[str, str]], console: Console, devices: Devices
) -> Seen:
    """Write the files that are missing."""
    assert subject.encoder is not None
    job = Looking(subject.encoder, tuple(pairs), subject.size)
    folder = subject.home / FEATURES / job.key()
    folder.make_folder()
    pace = Pace(console, f"{subject.title}: attention and patches", len(pairs))
    found: dict[int, _Written] = {}
    for block, written in in_blocks(_see, (job, folder.uri), range(job.blocks), devices):
        found[block] = written
        pace.advance(len(job.of_block(block)))
    of_all = [found[block] for block in range(job.blocks)]
    keys = np.array([key for each in of_all for key in each.keys], np.uint64)
    classes = classes_of(sorted({value for each in of_all for value in each.values}))
    counts = tuple(len(each.keys) for each in of_all)
    return Seen(folder, job.size, of_all[0].heads, of_all[0].width, counts, keys, classes)


class _Written(NamedTuple):
    values: list[int]
    """Distinct values in the masks of a file."""
    keys: list[int]
    heads: int
    width: int


_OF_FILE = b"selfray"
"""The file's metadata: a `_Written`."""


def _see(given: tuple[Looking, str], block: int) -> _Written:
    """Write a block's file, unless it exists."""
    job, folder = given
    place = Location.of(folder) / part_name(block)
    if place.exists():
        return _Written(*json.loads(read_part(place, [KEY]).schema.metadata[_OF_FILE]))
    encoder = loaded(job.encoder)
    device = next(encoder.parameters()).device
    views, masks, keys = [], [], []
    for image, mask in job.of_block(block):
        data = Location.of(image).read_bytes()
        view, values = views_of(data, Location.of(mask).read_bytes(), job.size, (image, mask))
        views.append(view)
        masks.append(values)
        keys.append(image_digest(data))
    images = normalize(torch.from_numpy(np.stack(views)).to(device), *job.encoder.normalization)
    attended, patches = attention(encoder, images)
    found = np.stack(masks).astype(np.uint8)
    written = _Written(np.unique(found).tolist(), keys, attended.shape[1], patches.shape[2])
    flat = {
        ATTENTION: attended.half().flatten(1).cpu().numpy(),
        PATCHES: patches.half().flatten(1).cpu().numpy(),
        MASK: found.reshape(len(found), -1),
    }
    columns = {
        KEY: pa.array(np.array(keys, np.uint64)),
        **{n: fixed_lists(v) for n, v in flat.items()},
    }
    table = pa.table(columns).replace_schema_metadata({_OF_FILE: json.dumps(written)})
    write_part(table, place)
    return written


def _view(image: str, mask: str, size: int) -> np.ndarray:
    data, labels = Location.of(image).read_bytes(), Location.of(mask).read_bytes()
    return views_of(data, labels, size, (image, mask))[0]


def _jaccards(seen: Seen, block: int) -> np.ndarray:
    """float [b, heads + 1]: the Jaccard index of each head with the foreground of each image, and
    in the last column that of the heads' mean attention."""
    found, protocol, content = [], Attention(), seen.block(block)
    for weights, values in zip(content.attention.astype(np.float32), content.masks, strict=True):
        both = np.concatenate([weights, weights.mean(0, keepdims=True)])
        kept = enlarged(of_most_mass(both, protocol.mass), len(values))
        found.append(jaccard(kept, recoded(values, seen.classes) > 0))
    return np.stack(found)


def _of_attention(by_head: np.ndarray) -> Judgement:
    best = by_head[:, :-1].max(1)
    means = by_head[:, :-1].mean(0)
    more = {"mean_of_heads": float(by_head[:, -1].mean()), "best_single_head": float(means.max())}
    return Judgement("attention", str(Attention()), "Jaccard", best[None], {}, more)


def _of_patches(subject: Subject, pairs: Sequence[tuple[str, str]], seen: Seen) -> Judgement:
    protocol, classifier = Patches(), Logistic(l2=(1e-1, 1e-2, 1e-3, 1e-4), iterations=50)
    assert subject.encoder is not None
    text = [str(protocol), str(classifier), subject.encoder.digest, subject.size, list(pairs)]
    digest = hashlib.sha256(json.dumps([*text, seen.keys.tolist()]).encode()).hexdigest()[:16]
    place = subject.home / EVALUATIONS / f"{digest}.json"
    known = kept(place)
    if known is not None:
        return known
    task: Any = ray.remote(num_cpus=1)(_classified)
    judgement: Any = ray.get(task.remote(seen, protocol, classifier))
    keep(place, judgement)
    return judgement


def _classified(seen: Seen, protocol: Patches, classifier: Logistic) -> Judgement:
    """Train on the patches of one half of the images and judge on the other half."""
    order = np.lexsort((seen.keys, ranks(seen.keys, protocol.seed)))
    is_train = np.zeros(len(order), bool)
    is_train[order[: max(1, round(protocol.train_share * len(order)))]] = True
    count = len(seen.classes)
    patches = seen.block(0).patches.shape[1]
    side = seen.size // round(patches**0.5)
    # Large arrays are mapped from unnamed files. Not all rows of the first are used: patches of no
    # class are left out.
    learned = scratch(int(is_train.sum()) * patches, seen.width)
    judged = scratch(int((~is_train).sum()) * patches, seen.width)
    labels, keys = [], []
    at = of_test = 0
    for places, block in seen.blocks():
        here = is_train[places]
        true = recoded(block.masks[here], seen.classes)
        of_patch = (
            np.stack([patch_classes(one, side, count) for one in true]) if len(true) else None
        )
        if of_patch is not None:
            usable = of_patch >= 0
            chosen = block.patches[here][usable]
            learned[at : at + len(chosen)] = chosen
            at += len(chosen)
            labels.append(of_patch[usable])
            keys.append(np.repeat(block.keys[here], usable.sum(1)))
        others = block.patches[~here].reshape(-1, seen.width)
        judged[of_test : of_test + len(others)] = others
        of_test += len(others)
    gallery = Gallery(
        torch.from_numpy(learned[:at]),
        torch.from_numpy(np.concatenate(labels)),
        np.concatenate(keys),
        count,
    )
    predicted, chosen = classifier.classify(gallery, torch.from_numpy(judged))
    grids = predicted.numpy().reshape(-1, patches)
    scores, at = [], 0
    for places, block in seen.blocks():
        for values in block.masks[~is_train[places]]:
            grid = enlarged(grids[at], seen.size)
            scores.append(overlaps(grid, recoded(values, seen.classes), count))
            at += 1
    return Judgement("patches", f"{protocol} {classifier}", "mIoU", np.stack(scores), chosen)
