"""Frozen features of labelled images, and the probes of a run, which judge them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfray.metrics import ACCURACIES, PROBES
from selfray.models.encoder import Encoder, Features, encode_uint8
from selfray.probes.classifier import Gallery
from selfray.probes.knn import KNN
from selfray.probes.labelfree import LabelFree
from selfray.probes.linear import Linear


@dataclass(frozen=True)
class LabelledFeatures:
    features: Tensor
    """float32 [n, D], or [n, 2D] for a ViT, as from `embed`."""
    labels: Tensor
    """int64 [n]; -1 for an image without label."""
    cls_width: int | None = None
    """D, the width of the class token's part; None if the features have only that part."""
    of_crops: Tensor | None = None
    """float32 [n, D]: class tokens of a crop of each image; None if not computed."""

    @property
    def cls(self) -> Tensor:
        return self.features[:, : self.cls_width]

    def labelled(self) -> "LabelledFeatures":
        known = self.labels >= 0
        of_crops = None if self.of_crops is None else self.of_crops[known]
        return LabelledFeatures(self.features[known], self.labels[known], self.cls_width, of_crops)


@dataclass(frozen=True)
class ProbeResult:
    """The numbers of one encoder and the protocols that produced them: accuracies in 0..1 (None
    without labels), and label-free figures (see LabelFree; None if not computed)."""

    knn: float | None
    linear: float | None
    train_images: int
    test_images: int
    protocols: dict[str, str]
    rankme: float | None = None
    uniformity: float | None = None
    alignment: float | None = None
    hits: Mapping[str, str] = field(default_factory=dict)
    """For each probe, one bit per test image, 1 if it was classified correctly: packed, in hex."""

    more: Mapping[str, float] = field(default_factory=dict)
    """Name -> value of figures without a field of their own."""

    @classmethod
    def of(
        cls,
        values: Mapping[str, float | None],
        train_images: int,
        test_images: int,
        protocols: dict[str, str],
        hits: Mapping[str, str],
    ) -> "ProbeResult":
        """A result with the figures in `values`, by name; missing ones are None."""
        own = {name: values.get(name) for name in _FIELDS}
        more = {n: v for n, v in values.items() if n not in _FIELDS and v is not None}
        return cls(
            train_images=train_images,
            test_images=test_images,
            protocols=protocols,
            hits=hits,
            more=more,
            **own,
        )

    @property
    def values(self) -> dict[str, float | None]:
        """Every figure of metrics.PROBES by name; None if it was not computed."""
        return {
            name: getattr(self, name) if name in _FIELDS else self.more.get(name) for name in PROBES
        }

    def correct(self, probe: str) -> np.ndarray | None:
        """float64 [m]: 1 for each test image that a probe classified correctly, else 0; None if not
        recorded."""
        if probe not in self.hits:
            return None
        packed = np.frombuffer(bytes.fromhex(self.hits[probe]), np.uint8)
        return np.unpackbits(packed, count=self.test_images).astype(np.float64)

    @property
    def described(self) -> str:
        """The accuracies, or the label-free figures if there are none, as text."""
        return described(self.values)


_FIELDS = ("knn", "linear", "rankme", "uniformity", "alignment")
"""Figures that are fields of a ProbeResult. Later ones are in `more`, which keeps old files
valid."""


def described(found: Mapping[str, Any]) -> str:
    """A probe's numbers by name as text: the accuracies, or the label-free figures."""
    if all(found[name] is not None for name in ACCURACIES):
        return ", ".join(f"{PROBES[n].name} {PROBES[n].shown(found[n])}" for n in ACCURACIES)
    known = [(m, found.get(name)) for name, m in PROBES.items() if not m.is_accuracy]
    return ", ".join(f"{m.name} {m.shown(value)}" for m, value in known if value is not None)


def embed(
    encoder: Encoder,
    views: np.ndarray,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int = 256,
) -> np.ndarray:
    """Features of uint8 views [n, C, H, W], computed on the encoder's device.

    Returns float32 [n, D]; for a ViT [n, 2D], the class token and the mean of the patch tokens,
    since some methods (MAE, BEiT) put most information into the patches.
    """
    device = next(encoder.parameters()).device
    chunks = []
    for first in range(0, len(views), batch_size):
        images = torch.from_numpy(views[first : first + batch_size]).to(device)
        features = encode_uint8(encoder, images, mean, std)
        chunks.append(of_linear(encoder, features).float().cpu())
    return torch.cat(chunks).numpy()


def of_linear(encoder: Encoder, features: Features) -> torch.Tensor:
    """The inputs of the linear probe, [n, D]; for a ViT [n, 2D], the class token and the mean of
    the patch tokens."""
    if not encoder.config.is_vit:
        return features.cls
    return torch.cat([features.cls, features.patches.mean(1)], dim=1)


def pixels(views: np.ndarray) -> np.ndarray:
    """Features of the raw-pixel baseline: uint8 [n, C, H, W] -> float32 [n, C * H * W] in 0..1."""
    return views.reshape(len(views), -1).astype(np.float32) / 255


def probe(train: LabelledFeatures | None, test: LabelledFeatures) -> ProbeResult:
    """Judge features by every protocol: kNN uses the class token, as in DINO's paper; the linear
    probe uses all features. Without `train`, only label-free figures are computed. Raises
    ValueError if train or test has no labels."""
    labelfree = LabelFree()
    if train is None:
        figures = labelfree.figures(test.cls, test.of_crops)
        protocols = {"labelfree": str(labelfree)}
        return ProbeResult.of(figures, 0, len(test.labels), protocols, {})
    train, test = train.labelled(), test.labelled()
    if len(train.labels) < 2 or len(test.labels) < 1:
        raise ValueError(
            f"probes need labelled images, but only {len(train.labels)} train and "
            f"{len(test.labels)} test images have a label"
        )
    train, test = _renumbered(train, test)
    knn, linear = KNN(), Linear()
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    gallery = Gallery(train.features, train.labels, np.zeros(0, np.uint64), classes)
    right = {
        "knn": knn.predict(train.cls, train.labels, test.cls) == test.labels,
        "linear": linear.classify(gallery, test.features).predicted == test.labels,
    }
    accuracies = {name: float(hits.float().mean()) for name, hits in right.items()}
    return ProbeResult.of(
        {**accuracies, **labelfree.figures(test.cls, test.of_crops)},
        len(train.labels),
        len(test.labels),
        {"knn": str(knn), "linear": str(linear), "labelfree": str(labelfree)},
        {name: np.packbits(hits.numpy()).tobytes().hex() for name, hits in right.items()},
    )


def _renumbered(
    train: LabelledFeatures, test: LabelledFeatures
) -> tuple[LabelledFeatures, LabelledFeatures]:
    """Renumber labels to 0..C-1 if an id exceeds the number of images, because probes allocate
    memory for each id up to the largest.

    Smaller ids stay, gaps included, so that numbers do not change from earlier versions: the linear
    probe has an output for each gap too.
    """
    both = torch.cat([train.labels, test.labels])
    if int(both.max()) < len(both):
        return train, test
    labels = torch.unique(both, return_inverse=True)[1]
    count = len(train.labels)
    return replace(train, labels=labels[:count]), replace(test, labels=labels[count:])
