"""Encoders, data sets and protocols -> numbers, as Ray tasks that repeat nothing.

Features are computed once for each (encoder, rows, size) and stored as Parquet under
`<home>/features/<key>`, numbers under `<home>/evaluations/<key>.json`. A key is a hash of
everything that determines them, so existing files need not be computed again.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from selfray.cluster.embedding_tasks import Devices, write_embeddings
from selfray.console import Console
from selfray.pace import Pace
from selfray.probes.classifier import Gallery
from selfray.probes.embedding import EMBEDDING, OF_CROP, Contents, Embedding, Rows
from selfray.probes.encoders import EncoderRef
from selfray.probes.examine import Examined, examine
from selfray.probes.feature_files import FeatureFiles
from selfray.probes.judgement import Judgement
from selfray.probes.labelfree import LabelFree
from selfray.probes.protocol import PIXEL_BASELINE_SIZE, Protocol
from selfray.probes.suite import judge
from selfray.storage import Location
from selfray.views import RGB

FEATURES, EVALUATIONS = "features", "evaluations"


@dataclass(frozen=True)
class Subject:
    """An encoder to be judged."""

    title: str
    """Its name in tables."""
    encoder: EncoderRef | None
    """None for raw pixels."""
    home: Location
    """The folder for its features and numbers: its run's folder, if it has one."""
    size: int
    """Side in pixels to which images are resized."""
    channels: int = RGB
    """Channels of raw pixels; an encoder reads its own."""

    @classmethod
    def pixels(cls, home: Location, size: int, channels: int = RGB) -> "Subject":
        small = min(size, PIXEL_BASELINE_SIZE)
        return cls(f"raw pixels at {small} x {small}", None, home, small, channels)


@dataclass(frozen=True)
class Labelled:
    """A data set on which encoders are judged."""

    name: str
    """Its name in tables and metrics."""
    train: Rows
    test: Rows
    label_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Split:
    """Stored features of the train or test part of a data set."""

    files: FeatureFiles
    labels: np.ndarray
    """int64 [n], as in the data; -1 for none."""
    keys: np.ndarray
    """uint64 [n]: a hash of each image's bytes."""
    unreadable: int
    key: str
    """A hash of everything that determines the features."""


@dataclass(frozen=True)
class Judged:
    """All numbers of one encoder on one data set."""

    subject: Subject
    data: Labelled
    examined: Examined
    test_keys: np.ndarray
    """uint64 [m]: hashes of the test images to which the scores belong."""
    unreadable: int
    judgements: tuple[Judgement, ...]
    seconds: float
    features: tuple[Split, Split]


def compute_features(
    subject: Subject, data: Labelled, console: Console, devices: Devices, more: Contents
) -> tuple[Split, Split]:
    """Compute the features of train and test images, or read those of an earlier call."""
    found = []
    for part, rows in (("train", data.train), ("test", data.test)):
        contents = _contents(more, subject, part)
        channels = subject.channels
        job = Embedding(rows, subject.encoder, subject.size, contents, channels=channels)
        key = Embedding.key(job.plan())
        folder = subject.home / FEATURES / key
        title = f"{subject.title}: features of {data.name}, {part}"
        pace = Pace(console, title, len(rows))
        used = devices if subject.encoder is not None else Devices(devices.cpus)
        written = write_embeddings(job, folder, used, pace.advance)
        files = FeatureFiles(folder, job.blocks)
        labels, keys = files.labels_and_keys()
        found.append(Split(files, labels, keys, written.unreadable, key))
    return found[0], found[1]


def _contents(more: Contents, subject: Subject, part: str) -> Contents:
    """The columns that every protocol needs, plus those of `more` that the encoder has."""
    config = None if subject.encoder is None else subject.encoder.encoder_config
    return Contents(
        key=True,
        patch_mean=True,
        of_crop=more.of_crop and part == "test" and config is not None,
        earlier_layers=more.earlier_layers and config is not None and config.is_vit,
    )


def evaluate(
    subject: Subject,
    data: Labelled,
    protocols: dict[str, Protocol],
    console: Console,
    devices: Devices,
    more: Contents,
) -> Judged:
    """Judge one encoder on one data set by protocols, given by key, that need only features.

    Raises ValueError if the data has no usable labels.
    """
    started = time.monotonic()
    train, test = compute_features(subject, data, console, devices, more)
    on_train, on_test = train.labels >= 0, test.labels >= 0
    examined = examine(
        data.name,
        train.labels[on_train],
        test.labels[on_test],
        train.keys[on_train],
        test.keys[on_test],
        data.label_names,
    )
    judgements = _judged(subject, protocols, (train, test), console)
    return Judged(
        subject,
        data,
        examined,
        test.keys[on_test],
        train.unreadable + test.unreadable,
        tuple(judgements),
        time.monotonic() - started,
        (train, test),
    )


def _judged(
    subject: Subject,
    protocols: dict[str, Protocol],
    splits: tuple[Split, Split],
    console: Console,
) -> list[Judgement]:
    """Run each protocol as a separate task, except those whose numbers are stored."""
    found: dict[str, Judgement] = {}
    running: dict[Any, str] = {}
    width = None if subject.encoder is None else subject.encoder.width
    task: Any = ray.remote(num_cpus=1)(_judge)
    places = {}
    for key, protocol in protocols.items():
        places[key] = place_of(subject, key, protocol, splits)
        known = kept(places[key])
        if known is not None:
            found[key] = known
            continue
        running[task.remote(key, protocol, *splits, width)] = key
    while running:
        names = ", ".join(running.values())
        console.live(f"{subject.title}: {names}")
        (done,), _ = ray.wait(list(running), num_returns=1)
        key = running.pop(done)
        found[key] = ray.get(done)
        keep(places[key], found[key])
    return [found[key] for key in protocols]


def place_of(subject: Subject, key: str, protocol: object, splits: tuple[Split, Split]) -> Location:
    """The file of a number, named after a hash of everything that determines it."""
    known = json.dumps([key, str(protocol), *(split.key for split in splits)])
    digest = hashlib.sha256(known.encode()).hexdigest()[:16]
    return subject.home / EVALUATIONS / f"{digest}.json"


def kept(place: Location) -> Judgement | None:
    return Judgement.from_json(place.read_json()) if place.exists() else None


def keep(place: Location, judgement: Judgement) -> None:
    place.parent.make_folder()
    place.write_json(judgement.to_json())


def galleries(splits: Sequence[Split], width: int | None) -> tuple[Gallery, Gallery]:
    """(train, test) galleries for protocols: only labelled images, classes numbered from 0."""
    train, test = splits
    on = [split.labels >= 0 for split in splits]
    examined = examine(
        "the data", train.labels[on[0]], test.labels[on[1]], train.keys[on[0]], test.keys[on[1]]
    )
    found = [
        Gallery(
            split.files.features(kept=mask),
            torch.from_numpy(labels),
            split.keys[mask],
            examined.classes,
            width,
        )
        for split, mask, labels in zip(splits, on, (examined.train, examined.test), strict=True)
    ]
    return found[0], found[1]


def _judge(key: str, protocol: Protocol, train: Split, test: Split, width: int | None) -> Judgement:
    started = time.monotonic()
    judgement = judge(key, protocol, *galleries((train, test), width))
    return Judgement(**{**vars(judgement), "seconds": time.monotonic() - started})


def label_free(judged: Judged) -> dict[str, float]:
    """Label-free figures of the test images' features, by name."""
    task: Any = ray.remote(num_cpus=1)(_label_free)
    encoder = judged.subject.encoder
    return ray.get(task.remote(judged.features[1], None if encoder is None else encoder.width))


def _label_free(test: Split, width: int | None) -> dict[str, float]:
    kept = test.labels >= 0
    protocol = LabelFree()
    cls = test.files.features((EMBEDDING,), kept)[:, :width]
    has_crops = test.files.has(OF_CROP)
    return protocol.figures(cls, test.files.features((OF_CROP,), kept) if has_crops else None)
