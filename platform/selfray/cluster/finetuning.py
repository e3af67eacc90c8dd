"""Fine-tunes encoders on labelled images; each fine-tuning is launched as a run, like
pretraining."""

import hashlib
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import safetensors.torch
import torch

from selfray import config
from selfray.cluster.embedding_tasks import Devices, write_embeddings
from selfray.cluster.evaluation import FEATURES, Judged, Split, Subject, keep, kept, place_of
from selfray.cluster.launch import PartOf, launch
from selfray.cluster.mlflow_store import named_store, tracking_uri
from selfray.console import Console
from selfray.data.data_sets import DataSets
from selfray.data.reader import read_rows
from selfray.data.shard_set import ShardSet, open_shards
from selfray.data.writer import write_arrays
from selfray.experiment import DataConfig, Experiment
from selfray.models.encoder import EncoderConfig, export_weights
from selfray.pace import Pace
from selfray.probes.embedding import EMBEDDING, KEY, PATCH_MEAN, Contents, Embedding, Rows
from selfray.probes.encoders import ENCODER_CONFIG, EncoderRef
from selfray.probes.feature_files import FeatureFiles
from selfray.probes.finetune import Head
from selfray.probes.finetuning import FineTuning, Placing
from selfray.probes.judgement import Judgement, of_predictions
from selfray.probes.subsets import balanced, image_digest
from selfray.runs.checkpoint import Checkpoint, latest
from selfray.runs.folder import RUN_RECORD
from selfray.storage import Location, read_object

FOLDER = "finetune"
"""Folder of a subject's fine-tuning runs and their data, beside its features."""
ROWS_EACH = 2048
"""Images that one task copies into a file of a subset."""


@dataclass(frozen=True)
class Labels:
    """The labels that a fine-tuning sees; all if neither `share` nor `count` is given."""

    key: str = "finetune"
    """The judgement's name."""
    share: float | None = None
    """Share of the train labels."""
    count: int | None = None
    """Number of train labels."""
    subsets: int = 1
    """Random subsets of this size, each with a fine-tuning."""

    def chosen(self, train: Split, labels: np.ndarray, seed: int) -> np.ndarray | None:
        """Indices int64 [k] of the chosen ones among the labelled train images; None for all.

        Args:
            train: all train images.
            labels: int64 [n], the classes of the labelled train images, from 0.
            seed: of the subset.
        """
        if self.share is None and self.count is None:
            return None
        wanted = self.count or max(1, round((self.share or 0) * len(labels)))
        return balanced(train.keys[train.labels >= 0], labels, wanted, seed)


@dataclass(frozen=True)
class Carrying:
    """Settings of fine-tunings that do not change what they compute, except for `precision`."""

    workers: int
    precision: Any
    devices: Devices
    tracking: str | None
    console: Console


def fine_tuned(
    judged: Judged, encoder: EncoderRef, protocol: FineTuning, which: Labels, how: Carrying
) -> Judgement:
    """Fine-tune an encoder on its data's train labels and judge it on the test images. Runs and
    judgements of an earlier call are reused.

    Args:
        judged: the encoder's features and figures on this data.
        encoder: the encoder to fine-tune; with `protocol.from_scratch` only its architecture is
            used.
        protocol: the settings.
        which: the labels to train on.
        how: workers, precision, devices and MLflow.
    """
    started = time.monotonic()
    subject = judged.subject
    place = place_of(subject, which.key, protocol, judged.features)
    known = kept(place)
    if known is not None:
        return known
    predicted, used = [], []
    for seed in range(which.subsets):
        chosen = which.chosen(judged.features[0], judged.examined.train, seed)
        data = train_data(judged, chosen)
        experiment = _experiment(judged, encoder, replace(protocol, seed=seed), data, how)
        found = trained(judged, experiment, data, which.key, how)
        predicted.append(_predictions(judged, found, how))
        used.append(data.train.rows if chosen is None else len(chosen))
    judgement = of_predictions(which.key, str(protocol), np.stack(predicted), judged.examined.test)
    more = dict(judgement.more)
    if which.share is not None or which.count is not None:
        more["labels"] = float(np.mean(used))
    judgement = replace(judgement, more=more, seconds=time.monotonic() - started)
    keep(place, judgement)
    return judgement


def trained(
    judged: Judged, experiment: Experiment, data: DataSets, what: str, how: Carrying
) -> Checkpoint:
    """Train a run on labels to its end, as a child of the MLflow run that trained the encoder.
    Returns its last checkpoint."""
    subject = judged.subject
    run = read_object(subject.home / RUN_RECORD)
    home = subject.home.parent if run else subject.home
    parent = run.get("run_id")
    try:
        uri = named_store(run, how.tracking, home)
    except ValueError as error:
        how.console.say(f"{what} gets no parent in MLflow: {error}")
        uri, parent = tracking_uri(home), None
    title = f"{subject.title} on {judged.data.name}, {what}"
    part = PartOf(parent, {}, title, brief=True)
    launch(experiment, how.console, uri, None, part, data)
    found = latest(Location.of(experiment.output) / experiment.run_name)
    assert found is not None
    return found


def _experiment(
    judged: Judged, encoder: EncoderRef, protocol: FineTuning, data: DataSets, how: Carrying
) -> Experiment:
    start = None if protocol.from_scratch else started_from(judged, encoder)
    return protocol.experiment(*settings(judged, encoder, data, how), start)


def settings(
    judged: Judged, encoder: EncoderRef, data: DataSets, how: Carrying
) -> tuple[EncoderConfig, DataConfig, tuple[int, ...], int, Placing]:
    """(encoder, images, labels of the classes in ascending order, number of images, output and
    workers) for a run on labels."""
    mean, std = encoder.normalization
    kind = replace(encoder.encoder_config, image_size=judged.subject.size)
    images = DataConfig(data.train.uri, mean=mean, std=std, channels=kind.in_channels)
    labels = judged.features[0].labels
    is_copy = data.train.uri != judged.data.train.shards.uri
    known = np.unique(judged.examined.train if is_copy else labels[labels >= 0])
    run = Placing((judged.subject.home / FOLDER).uri, how.workers, how.precision)
    return kind, images, tuple(map(int, known)), data.train.rows, run


def started_from(judged: Judged, encoder: EncoderRef) -> str:
    """Write the encoder's weights, unless done before, as a file for `init_from`. Returns its
    URI."""
    name = f"{encoder.digest[:16]}.safetensors"
    place = judged.subject.home / FOLDER / "start" / name
    if not place.exists():
        place.parent.make_folder()
        header = {"format": "pt", ENCODER_CONFIG: config.dumps(encoder.encoder_config)}
        place.write_bytes(safetensors.torch.save(export_weights(encoder.load()), header))
    return place.uri


# Which images ------------------------------------------------------------------------------------


def train_data(judged: Judged, chosen: np.ndarray | None) -> DataSets:
    """The train images as a data set: the original files if all images are used, else a copy of the
    chosen images."""
    rows, train = judged.data.train, judged.features[0]
    if chosen is None and len(rows) == rows.shards.rows:
        return DataSets(rows.shards, None)
    labelled = np.flatnonzero(train.labels >= 0)
    kept = labelled if chosen is None else labelled[chosen]
    labels = judged.examined.train if chosen is None else judged.examined.train[chosen]
    text = train.key.encode() + kept.astype("<i8").tobytes()
    folder = judged.subject.home / FOLDER / "data" / hashlib.sha256(text).hexdigest()[:16]
    places = places_of(train, rows)[kept]
    return DataSets(_copied(rows, places, labels, judged.examined.classes, folder), None)


def places_of(split: Split, rows: Rows) -> np.ndarray:
    """int64 [n]: for each image with features, its index among the rows. Unreadable images have no
    features, so the two orders differ."""
    each = Embedding.block_rows
    found, first = [], 0
    for block, count in enumerate(split.files.counts()):
        asked = np.arange(block * each, min((block + 1) * each, len(rows)))
        if count < len(asked):
            images, _ = read_rows(rows.shards, rows.groups[asked], rows.rows[asked])
            keys = iter(split.keys[first : first + count])
            wanted, places = next(keys, None), []
            for place, data in zip(asked, images, strict=True):
                if wanted is not None and image_digest(data) == wanted:
                    places.append(place)
                    wanted = next(keys, None)
            asked = np.array(places, np.int64)
        found.append(asked)
        first += count
    return np.concatenate(found)


def _copied(
    rows: Rows, places: np.ndarray, labels: np.ndarray, classes: int, folder: Location
) -> ShardSet:
    """Write the images at `places`, int64 [k], with their classes `labels`, int64 [k], to Parquet
    files, by Ray tasks."""
    task: Any = ray.remote(num_cpus=1)(_copy)
    shared = ray.put(rows)
    files = ray.get(
        [
            task.remote(
                shared,
                places[i : i + ROWS_EACH],
                labels[i : i + ROWS_EACH],
                classes,
                (folder / f"{i:09d}").uri,
            )
            for i in range(0, len(places), ROWS_EACH)
        ]
    )
    return open_shards([uri for part in files for uri in part], folder.uri)


def _copy(
    rows: Rows, places: np.ndarray, labels: np.ndarray, classes: int, folder: str
) -> list[str]:
    images, _ = read_rows(rows.shards, rows.groups[places], rows.rows[places])
    names = [str(c) for c in range(classes)]
    place = Location.of(folder)
    written = write_arrays(place, images, labels.tolist(), label_names=names, source="a subset")
    return [(place / shard.name).uri for shard in written.shards]


# Predictions -------------------------------------------------------------------------------------


def _predictions(judged: Judged, found: Checkpoint, how: Carrying) -> np.ndarray:
    """The predicted class of each labelled test image, int64 [m], in the order of `judged`."""
    test, rows = judged.features[1], judged.data.test
    contents = Contents(key=True, patch_mean=True)
    ref = EncoderRef.of(found)
    files = embeddings(judged.subject, ref, rows, contents, how, "predictions")
    assert np.array_equal(files.labels_and_keys()[1], test.keys), KEY
    method = found.experiment().method
    pool = method.pool  # type: ignore[attr-defined]
    column = EMBEDDING if pool == "cls" else PATCH_MEAN
    state = {
        name.removeprefix("head."): values
        for name, values in found.state()["method"].items()
        if name.startswith("head.")
    }
    classes, width = state["linear.weight"].shape
    head = Head(width, classes, pool)
    head.load_state_dict(state)
    with torch.no_grad():
        logits = head.of_pooled(files.features((column,), test.labels >= 0))
    return logits.argmax(1).numpy()


def embeddings(
    subject: Subject, ref: EncoderRef, rows: Rows, contents: Contents, how: Carrying, what: str
) -> FeatureFiles:
    """Features of some rows, cached in the folder of the subject's features."""
    job = Embedding(rows, ref, subject.size, contents)
    folder = subject.home / FEATURES / Embedding.key(job.plan())
    pace = Pace(how.console, f"{subject.title}: {what}", len(rows))
    write_embeddings(job, folder, how.devices, pace.advance)
    return FeatureFiles(folder, job.blocks)
