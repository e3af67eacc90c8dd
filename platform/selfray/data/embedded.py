"""Writes data sets that come with a dependency as shards."""

import io
from typing import Any

import numpy as np

from selfray.data.manifest import MANIFEST
from selfray.data.writer import write_arrays
from selfray.storage import Location

EMBEDDED = "embedded:"
"""Prefix of data sets that come with a dependency: `embedded:digits` is scikit-learn's."""
DIGITS_TEST = 597
"""Number of digits, a third, drawn at random for the probes' test."""


def write_embedded(name: str, output: Location) -> Location:
    """The shards of an embedded data set, written on first use."""
    if name != "digits":
        raise ValueError(f"there is no embedded data set {name!r}; there is embedded:digits")
    folder = output / "data" / name
    if all((folder / part / MANIFEST).exists() for part in ("train", "test")):
        return folder
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images, labels = digits.images, digits.target  # [1797, 8, 8] in 0..16, [1797]
    order = np.random.default_rng(0).permutation(len(images))
    for part, chosen in (("test", order[:DIGITS_TEST]), ("train", order[DIGITS_TEST:])):
        write_arrays(
            folder / part,
            [_png(images[i]) for i in chosen],
            [int(labels[i]) for i in chosen],
            [f"digit-{i:04d}.png" for i in chosen],
            [str(digit) for digit in range(10)],
            rows_per_shard=512,
            source="sklearn.datasets.load_digits",
        )
    return folder


def _png(values: np.ndarray) -> bytes:
    """A digit [8, 8] in 0..16 as a gray PNG of 8 x 8 pixels."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((values * (255 / 16)).round().astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()
