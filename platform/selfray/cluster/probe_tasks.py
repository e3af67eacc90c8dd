"""Probes as Ray tasks, encoder -> features -> numbers: during training, or for `selfray probe`."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.data import DataContext, ExecutionResources
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from selfray.cluster.stream import blocks_of_ids, configure
from selfray.data.source import LABEL, VIEWS, Arrays, Sample
from selfray.metrics import PROBE
from selfray.models.encoder import Encoder
from selfray.probes.encoders import EncoderRef
from selfray.probes.features import LabelledFeatures, ProbeResult, embed, pixels, probe
from selfray.probes.labelfree import LabelFree

FEATURES, OF_CROPS = "features", "of_crops"


@dataclass(frozen=True)
class EmbedBlock:
    """The work of one task: reads and encodes a block of a sample."""

    sample: Sample
    encoder: EncoderRef | None
    """None gives the raw pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crops: bool = False
    """Whether a crop of each image is also encoded."""

    def run(self, ids: Arrays) -> Arrays:
        blocks = [self.sample.read(int(block)) for block in ids["id"]]
        labels = np.concatenate([block[LABEL] for block in blocks])
        views = np.concatenate([block[VIEWS] for block in blocks])
        if self.encoder is None:
            return {FEATURES: pixels(views), LABEL: labels}
        encoder = _loaded(self.encoder)
        embedded = {FEATURES: embed(encoder, views, self.mean, self.std), LABEL: labels}
        if self.crops:
            of_crops = embed(encoder, LabelFree().crops(views), self.mean, self.std)
            embedded[OF_CROPS] = of_crops[:, : encoder.width]
        return embedded


@lru_cache(maxsize=2)
def _loaded(ref: EncoderRef) -> Encoder:
    """The encoder on this process's device; cached, so that several blocks load it once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ref.load().to(device)


@dataclass(frozen=True)
class ProbeJob:
    """The images and resources of probes."""

    train: Sample | None
    """None for unlabelled data: only label-free figures are computed."""
    test: Sample
    mean: tuple[float, ...]
    std: tuple[float, ...]
    cpus: float = 1.0
    """CPUs of one task."""
    gpus: float = 0.0
    """GPUs of one task."""
    tasks: int = 1
    """Largest number of concurrent tasks; each is a process that imports torch."""

    def features(
        self, sample: Sample, encoder: EncoderRef | None, crops: bool = False
    ) -> LabelledFeatures:
        """Features of a sample in its order, float32 [n, D], computed in parallel; with `crops`
        also those of a crop of each image."""
        configure(DataContext.get_current())
        # Ray's type stubs do not allow a dict of arrays.
        run: Any = EmbedBlock(sample, encoder, self.mean, self.std, crops).run
        dataset = blocks_of_ids(sample.blocks).map_batches(
            run,
            batch_size=None,
            num_cpus=self.cpus,
            num_gpus=self.gpus or None,
        )
        options = dataset.context.execution_options
        options.preserve_order = True  # the linear probe's held-out part depends on the order
        options.resource_limits = ExecutionResources.for_limits(
            cpu=self.tasks * self.cpus, gpu=self.tasks * self.gpus or None
        )
        parts = list(dataset.iter_batches(batch_size=None, batch_format="numpy"))
        return LabelledFeatures(
            torch.from_numpy(np.concatenate([part[FEATURES] for part in parts])),
            torch.from_numpy(np.concatenate([part[LABEL] for part in parts])),
            None if encoder is None else encoder.width,
            torch.from_numpy(np.concatenate([part[OF_CROPS] for part in parts])) if crops else None,
        )

    def run(self, encoder: EncoderRef | None) -> ProbeResult:
        """Compute features of train and test images, then judge them by all protocols in one
        task."""
        train = None if self.train is None else self.features(self.train, encoder)
        test = self.features(self.test, encoder, crops=encoder is not None)
        # A sweep's trial runs in a placement group with almost no CPU: do not run this task in it.
        anywhere = PlacementGroupSchedulingStrategy(placement_group=None)  # type: ignore[arg-type]
        judge: Any = ray.remote(num_cpus=self.cpus, scheduling_strategy=anywhere)(probe)
        return ray.get(judge.remote(train, test))


def metrics_of(result: ProbeResult) -> dict[str, float]:
    return {f"{PROBE}{name}": v for name, v in result.values.items() if v is not None}


def tags_of(result: ProbeResult) -> dict[str, str]:
    return {f"probe.{name}.protocol": text for name, text in result.protocols.items()}
