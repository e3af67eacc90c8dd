"""The core alone: trains and probes one method in one plain Python process, without Ray or MLflow.

python experiments/minimal.py            # SimCLR on scikit-learn's digits, about two minutes
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import NoReturn

import torch

from selfray.data.data_sets import DataSets, open_data
from selfray.data.source import Sample, Source, source_of
from selfray.experiment import Experiment
from selfray.probes.features import LabelledFeatures, embed, probe
from selfray.recipes.digits import SIMCLR
from selfray.storage import Location
from selfray.train import Step, TrainState, train


def batches(source: Source, experiment: Experiment) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of views, uint8 [B, V, C, H, W] by name, in the order of the read plan."""
    for start in range(0, source.plan.total_images, experiment.batch_size):
        drawn = source.draw(start, experiment.batch_size)
        yield {name: torch.from_numpy(drawn[name]) for name in experiment.views}


def features(state: TrainState, experiment: Experiment, sample: Sample) -> LabelledFeatures:
    encoder, data = state.method.encoder.eval(), experiment.data
    rows = [sample.read(block) for block in range(sample.blocks)]
    values = [embed(encoder, block["views"], data.mean, data.std) for block in rows]
    labels = [torch.from_numpy(block["label"]) for block in rows]
    return LabelledFeatures(torch.cat([torch.from_numpy(v) for v in values]), torch.cat(labels))


def judged(state: TrainState, experiment: Experiment, data: DataSets) -> str:
    samples = data.samples(experiment.encoder.image_size, 5_000, 1_000)
    found = probe(*(features(state, experiment, sample) for sample in samples))
    return f"kNN {found.knn:.1%}, linear {found.linear:.1%}"


def no_build(*_: object) -> NoReturn:
    raise NotImplementedError("the digits are shards already; Ray makes shards of other images")


def show(step: Step) -> None:
    if step.progress.step % 20 == 0:
        print(f"step {step.progress.step}: loss {float(step.loss):.3f}")


if __name__ == "__main__":
    experiment = replace(SIMCLR, epochs=40)
    with tempfile.TemporaryDirectory() as folder:
        data = open_data(experiment.data, Location.of(folder), print, no_build)
        source = source_of(experiment, data.train)
        state = TrainState.start(experiment, source.plan.total_images)
        print("untrained:", judged(state, experiment, data))
        train(state, batches(source, experiment), experiment, show)
        print("trained:  ", judged(state, experiment, data))
