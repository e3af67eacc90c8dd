"""Frozen features of labelled images, and the probes that judge them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfray.models.encoder import Encoder, encode_uint8
from selfray.probes.knn import KNN
from selfray.probes.linear import Linear


@dataclass(frozen=True)
class LabelledFeatures:
    features: Tensor
    """float32 [n, D]."""
    labels: Tensor
    """int64 [n]; -1 where an image has none."""

    def labelled(self) -> "LabelledFeatures":
        known = self.labels >= 0
        return LabelledFeatures(self.features[known], self.labels[known])


@dataclass(frozen=True)
class ProbeResult:
    """The numbers of one encoder, each in 0..1, with the protocols that made them."""

    knn: float
    linear: float
    train_images: int
    test_images: int
    protocols: dict[str, str]


def embed(
    encoder: Encoder,
    views: np.ndarray,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int = 256,
) -> np.ndarray:
    """Features float32 [n, D] of uint8 views [n, 3, H, W], on the encoder's device."""
    device = next(encoder.parameters()).device
    chunks = [
        encode_uint8(encoder, torch.from_numpy(views[i : i + batch_size]).to(device), mean, std)
        .cls.float()
        .cpu()
        for i in range(0, len(views), batch_size)
    ]
    return torch.cat(chunks).numpy()


def pixels(views: np.ndarray) -> np.ndarray:
    """The raw-pixel baseline's features: float32 [n, 3 * H * W] in 0..1."""
    return views.reshape(len(views), -1).astype(np.float32) / 255


def probe(train: LabelledFeatures, test: LabelledFeatures) -> ProbeResult:
    """Judge features by every protocol. ValueError where train or test holds no label."""
    train, test = train.labelled(), test.labelled()
    if len(train.labels) < 2 or len(test.labels) < 1:
        raise ValueError(
            f"probes need labelled images; {len(train.labels)} of train and {len(test.labels)} of "
            "test have a label"
        )
    knn, linear = KNN(), Linear()
    arguments = (train.features, train.labels, test.features, test.labels)
    return ProbeResult(
        knn.accuracy(*arguments),
        linear.accuracy(*arguments),
        len(train.labels),
        len(test.labels),
        {"knn": str(knn), "linear": str(linear)},
    )
