"""The pictures of a run: augmented views, the method's own pictures, neighbours and feature
maps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from selfray.data.source import LABEL, VIEWS, Sample, Source
from selfray.experiment import Experiment
from selfray.models.encoder import Encoder
from selfray.probes.features import embed
from selfray.probes.knn import nearest
from selfray.report import live_map
from selfray.report.charts import training_curves
from selfray.report.maps import embedding_maps
from selfray.report.projection import project_2d
from selfray.report.sheets import neighbours, views_grid
from selfray.runs.checkpoint import Checkpoint
from selfray.runs.history import History
from selfray.train import TrainState

IMAGES = 8
"""Images in a grid of views or reconstructions."""
MAP_POINTS = 600
NEIGHBOURS = 8


def curves(
    runs: Mapping[str, History], baselines: Mapping[str, float] | None = None
) -> Image.Image:
    """A chart of losses and probes of runs by name; baselines are accuracies in 0..1 by name."""
    return training_curves(
        {name: history.loss for name, history in runs.items()},
        {
            name: {"knn": history.knn, "linear": history.linear}
            for name, history in runs.items()
            if history.knn
        },
        baselines,
    )


@dataclass(frozen=True)
class LabelledViews:
    """Images for the pictures: uint8 [n, 3, H, W] and their labels int64 [n]."""

    views: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, sample: Sample, limit: int) -> "LabelledViews":
        blocks = min(sample.blocks, -(-limit // sample.block_rows))
        read = [sample.read(block) for block in range(blocks)]
        return cls(
            np.concatenate([block[VIEWS] for block in read])[:limit],
            np.concatenate([block[LABEL] for block in read])[:limit],
        )


def augmented_views(experiment: Experiment, source: Source) -> Image.Image:
    """The first images of the run's plan, each beside its augmented views."""
    count = min(IMAGES, source.plan.batch_size)
    drawn = source.draw(0, count)
    originals = source.originals(0, count, experiment.encoder.image_size)
    mask = drawn.get("global_mask")
    return views_grid(originals, drawn["global"], mask, title_of(experiment))


def nearest_neighbours(
    experiment: Experiment,
    encoder: Encoder,
    train: LabelledViews,
    test: LabelledViews,
    label_names: tuple[str, ...] | None,
) -> Image.Image:
    """Some test images, each beside the train images with the most similar features."""
    of_train, of_test = (
        features(experiment, encoder, train),
        features(experiment, encoder, LabelledViews(test.views[:IMAGES], test.labels[:IMAGES])),
    )
    index = nearest(torch.from_numpy(of_train), torch.from_numpy(of_test), NEIGHBOURS).numpy()
    return neighbours(
        test.views[:IMAGES],
        train.views[index],
        test.labels[:IMAGES],
        train.labels[index],
        label_names,
        f"Nearest neighbours of test images in the features of {title_of(experiment)}",
    )


def features(experiment: Experiment, encoder: Encoder, images: LabelledViews) -> np.ndarray:
    """float32 [n, D], or [n, 2D] for a ViT: see `embed`."""
    return embed(encoder, images.views, *experiment.data.normalization)


def untrained_encoder(experiment: Experiment) -> Encoder:
    """The encoder before the first step."""
    return TrainState.start(experiment, total_images=1).method.encoder.eval()


def method_of(checkpoint: Checkpoint) -> TrainState:
    """The whole pretrained state: encoder, heads and decoder."""
    state = TrainState.start(checkpoint.experiment(), total_images=1)
    state.load_state_dict(checkpoint.state())
    return state


def title_of(experiment: Experiment) -> str:
    """The method's name in pictures, spelled as in its paper."""
    return type(experiment.method).__name__.removesuffix("Config")


def run_pictures(
    experiment: Experiment,
    checkpoint: Checkpoint,
    source: Source,
    train: Sample,
    test: Sample,
    label_names: tuple[str, ...] | None,
) -> dict[str, Image.Image | dict[str, Any]]:
    """All pictures of one run by file name, and as JSON the data of those that a page draws itself.
    Without labels, pictures that need them are left out."""
    state = method_of(checkpoint)
    encoder = state.method.encoder.eval()
    test_images = LabelledViews.of(test, MAP_POINTS)
    made: dict[str, Image.Image | dict[str, Any]] = {
        "views.png": augmented_views(experiment, source)
    }
    data = experiment.data
    state.method.eval()
    of_method = state.method.pictures(
        test_images.views[:IMAGES], experiment.views, data.normalization
    )
    made |= {f"{name}.png": picture for name, picture in of_method.items()}
    if (test_images.labels >= 0).any():
        train_images = LabelledViews.of(train, 5_000)
        made["neighbours.png"] = nearest_neighbours(
            experiment, encoder, train_images, test_images, label_names
        )
        maps = {
            "untrained": untrained_encoder(experiment),
            f"after {title_of(experiment)}": encoder,
        }
        flat = {
            name: project_2d(features(experiment, each, test_images)) for name, each in maps.items()
        }
        made["embedding.png"] = embedding_maps(flat, test_images.labels, label_names)
        made[live_map.THUMBNAILS] = live_map.thumbnails(test_images.views)
        made[live_map.POINTS] = live_map.as_json(flat, test_images.labels, label_names)
    return made
