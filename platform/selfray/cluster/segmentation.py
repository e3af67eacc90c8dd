"""Judges encoders on images with masks, by Ray tasks: how well they locate objects."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from selfray.cluster.embedding_tasks import Devices
from selfray.cluster.evaluation import EVALUATIONS, Subject, keep, kept
from selfray.console import Console
from selfray.models.encoder import normalize
from selfray.pace import Pace
from selfray.probes.classifier import Gallery
from selfray.probes.embedding import loaded
from selfray.probes.encoders import EncoderRef
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
"""Images per task."""
SHOWN = 8
"""Images shown in the picture."""


class Seen(NamedTuple):
    """The result of a task for its b images."""

    values: list[int]
    """Distinct values in the masks."""
    keys: list[int]
    """Digests of the images' bytes."""
    attention: np.ndarray
    """float16 [b, heads, N]: attention of the class token to the patches."""
    patches: np.ndarray
    """float16 [b, N, D]: patch tokens."""
    labels: np.ndarray
    """uint8 [b, size, size]: the masks' values."""


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
    """Judge one encoder on images with masks. ValueError names a file that cannot be used."""
    assert subject.encoder is not None
    started = time.monotonic()
    pace = Pace(console, f"{subject.title}: attention and patches", len(pairs))
    task: Any = ray.remote(num_cpus=devices.cpus, num_gpus=devices.gpus)(_see)
    waiting = [pairs[first : first + BLOCK] for first in range(0, len(pairs), BLOCK)]
    running = [task.remote(subject.encoder, block, subject.size) for block in waiting]
    seen = []
    for reference, block in zip(running, waiting, strict=True):
        seen.append(ray.get(reference))
        pace.advance(len(block))
    classes = classes_of(sorted({value for each in seen for value in each.values}))
    attended = np.concatenate([each.attention for each in seen])
    patches = np.concatenate([each.patches for each in seen])
    labels = np.concatenate([each.labels for each in seen])
    keys = np.array([key for each in seen for key in each.keys], np.uint64)
    by_head = _by_head(attended, labels, classes)
    console.live(f"{subject.title}: a linear classifier on patch tokens")
    judgements = (
        _of_attention(by_head),
        _of_patches(subject, pairs, patches, labels, keys, classes),
    )
    shown = slice(0, SHOWN)
    views = np.stack([_view(*pair, subject.size) for pair in pairs[shown]])
    best = np.take_along_axis(attended[shown], by_head[shown, :-1].argmax(1)[:, None, None], 1)
    best = best[:, 0].astype(np.float32)
    low, high = best.min(-1, keepdims=True), best.max(-1, keepdims=True)
    heads = enlarged((best - low) / np.maximum(high - low, 1e-12), subject.size)
    colours = principal_colours(patches[shown]).transpose(0, 2, 1)
    seconds = time.monotonic() - started
    judgements = tuple(Judgement(**{**vars(j), "seconds": seconds}) for j in judgements)
    pictures = enlarged(colours, subject.size)
    return Segmented(subject, judgements, views, heads, pictures, len(pairs), len(classes))


def _see(ref: EncoderRef, pairs: Sequence[tuple[str, str]], size: int) -> Seen:
    encoder = loaded(ref)
    device = next(encoder.parameters()).device
    views, labels, keys = [], [], []
    for image, mask in pairs:
        data = Location.of(image).read_bytes()
        view, values = views_of(data, Location.of(mask).read_bytes(), size, (image, mask))
        views.append(view)
        labels.append(values)
        keys.append(image_digest(data))
    images = normalize(torch.from_numpy(np.stack(views)).to(device), *ref.normalization)
    attended, patches = attention(encoder, images)
    found = np.stack(labels).astype(np.uint8)
    values = np.unique(found).tolist()
    return Seen(values, keys, attended.half().cpu().numpy(), patches.half().cpu().numpy(), found)


def _view(image: str, mask: str, size: int) -> np.ndarray:
    data, labels = Location.of(image).read_bytes(), Location.of(mask).read_bytes()
    return views_of(data, labels, size, (image, mask))[0]


def _by_head(attended: np.ndarray, labels: np.ndarray, classes: dict[int, int]) -> np.ndarray:
    """float [n, heads + 1]: the Jaccard index of each head with the foreground of each image, and
    in the last column that of the heads' mean attention."""
    found, protocol = [], Attention()
    for weights, values in zip(attended.astype(np.float32), labels, strict=True):
        both = np.concatenate([weights, weights.mean(0, keepdims=True)])
        kept = enlarged(of_most_mass(both, protocol.mass), len(values))
        found.append(jaccard(kept, recoded(values, classes) > 0))
    return np.stack(found)


def _of_attention(by_head: np.ndarray) -> Judgement:
    best = by_head[:, :-1].max(1)
    means = by_head[:, :-1].mean(0)
    more = {"mean_of_heads": float(by_head[:, -1].mean()), "best_single_head": float(means.max())}
    return Judgement("attention", str(Attention()), "Jaccard", best[None], {}, more)


def _of_patches(
    subject: Subject,
    pairs: Sequence[tuple[str, str]],
    patches: np.ndarray,
    labels: np.ndarray,
    keys: np.ndarray,
    classes: dict[int, int],
) -> Judgement:
    protocol, classifier = Patches(), Logistic(l2=(1e-1, 1e-2, 1e-3, 1e-4), iterations=50)
    assert subject.encoder is not None
    text = [str(protocol), str(classifier), subject.encoder.digest, subject.size, list(pairs)]
    digest = hashlib.sha256(json.dumps([*text, keys.tolist()]).encode()).hexdigest()[:16]
    place = subject.home / EVALUATIONS / f"{digest}.json"
    known = kept(place)
    if known is not None:
        return known
    order = np.lexsort((keys, ranks(keys, protocol.seed)))
    half = max(1, round(protocol.train_share * len(order)))
    train, test = np.sort(order[:half]), np.sort(order[half:])
    side = subject.size // round(patches.shape[1] ** 0.5)
    true = recoded(labels, classes)
    of_patch = np.stack([patch_classes(true[i], side, len(classes)) for i in train])
    usable = of_patch >= 0
    gallery = Gallery(
        torch.from_numpy(patches[train][usable].astype(np.float32)),
        torch.from_numpy(of_patch[usable]),
        np.repeat(keys[train], usable.sum(1)),
        len(classes),
    )
    flat = torch.from_numpy(patches[test].reshape(-1, patches.shape[-1]).astype(np.float32))
    predicted, chosen = classifier.classify(gallery, flat)
    grids = enlarged(predicted.numpy().reshape(len(test), -1), subject.size)
    scores = np.stack(
        [overlaps(grid, true[i], len(classes)) for grid, i in zip(grids, test, strict=True)]
    )
    judgement = Judgement("patches", f"{protocol} {classifier}", "mIoU", scores, chosen)
    keep(place, judgement)
    return judgement
