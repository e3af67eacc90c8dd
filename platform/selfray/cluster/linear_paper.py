"""The linear evaluation of the papers, trained by a run on Ray Train workers."""

import time
from dataclasses import replace

import numpy as np
import torch

from selfray.cluster.evaluation import Judged, keep, kept, place_of
from selfray.cluster.finetuning import (
    Carrying,
    embeddings,
    places_of,
    settings,
    started_from,
    train_data,
    trained,
)
from selfray.probes.embedding import EARLIER, EMBEDDING, PATCH_MEAN, Contents, Rows
from selfray.probes.encoders import EncoderRef
from selfray.probes.judgement import Judgement, of_predictions
from selfray.probes.linear_paper import Grid, LinearOnViews
from selfray.probes.subsets import held_out
from selfray.runs.checkpoint import Checkpoint

KEY = "linear-paper"
CHUNK = 1024
"""Images per forward pass of the linear layers."""
COLUMNS = (EARLIER, EMBEDDING, PATCH_MEAN)
"""Columns of features, in the order of `probes.linear_paper.tokens`."""


def on_views(
    judged: Judged, encoder: EncoderRef, protocol: LinearOnViews, how: Carrying
) -> Judgement:
    """Train the grid on all train images except the held-out ones, choose a layer on these, and
    judge it on the test images. Runs and judgements of an earlier call are reused."""
    started = time.monotonic()
    place = place_of(judged.subject, KEY, protocol, judged.features)
    known = kept(place)
    if known is not None:
        return known
    train, labels = judged.features[0], judged.examined.train
    labelled = np.flatnonzero(train.labels >= 0)
    away = held_out(train.keys[labelled], labels, protocol.held_out, protocol.seed)
    if not away.any():
        raise ValueError(
            f"{judged.data.name} has too few train images to hold some out, on which linear-paper "
            "chooses its layer: give --by logistic"
        )
    data = train_data(judged, np.flatnonzero(~away))
    start = started_from(judged, encoder)
    experiment = protocol.experiment(*settings(judged, encoder, data, how), start)
    found = trained(judged, experiment, data, KEY, how)

    rows = judged.data.train
    places = places_of(train, rows)[labelled[away]]
    apart = Rows(rows.shards, rows.groups[places], rows.rows[places])
    is_vit = encoder.encoder_config.is_vit
    contents = Contents(key=True, patch_mean=True, earlier_layers=is_vit)
    grid = grid_of(found)
    chosen_by = embeddings(judged.subject, encoder, apart, contents, how, "held-out features")
    right = predictions(grid, chosen_by.features(COLUMNS)) == torch.from_numpy(labels[away])
    accuracies = right.float().mean(1)  # [R]
    best = int(accuracies.argmax())
    test = judged.features[1]
    of_test = embeddings(judged.subject, encoder, judged.data.test, contents, how, "features")
    predicted = predictions(grid, of_test.features(COLUMNS, test.labels >= 0))[best]
    choice = grid.choices[best]._asdict() | {"held_out_accuracy": float(accuracies[best])}
    judgement = of_predictions(KEY, str(protocol), predicted.numpy(), judged.examined.test, choice)
    judgement = replace(judgement, seconds=time.monotonic() - started)
    keep(place, judgement)
    return judgement


def grid_of(found: Checkpoint) -> Grid:
    """The trained layers of a run's checkpoint, in eval mode."""
    method = found.experiment().method
    state = {
        name.removeprefix("heads."): values
        for name, values in found.state()["method"].items()
        if name.startswith("heads.")
    }
    choices = method.grid(found.experiment().encoder)  # type: ignore[attr-defined]
    classes, seen = state["layers.0.weight"].shape
    width = seen // (choices[0].layers + choices[0].patch_mean)
    grid = Grid(width, classes, choices, method)  # type: ignore[arg-type]
    grid.load_state_dict(state)
    return grid.eval()


@torch.no_grad()
def predictions(grid: Grid, features: torch.Tensor) -> torch.Tensor:
    """int64 [R, n]: the class of each image predicted by each of the R layers, from features
    float32 [n, 5 D] (of a ResNet [n, D])."""
    return torch.cat([grid(chunk).argmax(-1) for chunk in features.split(CHUNK)], dim=1)
