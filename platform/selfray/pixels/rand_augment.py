"""Applies timm's RandAugment to views, as a pure function of (seed, epoch, image)."""

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from selfray.views import Views

FILL = (124, 116, 104)
"""Colour outside a moved image: ImageNet's mean, as in timm's recipes."""
REACH = 0.45
"""Largest translation as a share of the side, as in timm's recipes."""


def rand_augment(
    arrays: Mapping[str, np.ndarray], views: Views, seed: int, epoch: int, key: int
) -> None:
    """Apply each view's policy in place; views without one are not changed.

    Args:
        arrays: group -> the views of one image, uint8 [V, 3, size, size].
        views: group -> the views' settings.
        seed: of the run.
        epoch: the present epoch.
        key: the image's key, from `image_key`.
    """
    for name, group in views.items():
        for index, view in enumerate(group):
            if view.rand_augment:
                image = arrays[name][index]
                image[:] = _augmented(image, view.rand_augment, f"{seed} {epoch} {key} {index}")


def _augmented(image: np.ndarray, policy: str, known: str) -> np.ndarray:
    """The image uint8 [3, H, W] after a policy; `known` seeds all its random choices."""
    from PIL import Image

    transform = _transform(policy, image.shape[1])
    words = hashlib.blake2b(known.encode(), digest_size=4).digest()
    number = int.from_bytes(words, "little")
    with seeded(number):
        found = transform(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))))
    return np.asarray(found).transpose(2, 0, 1)


@contextmanager
def seeded(number: int) -> Iterator[None]:
    """Inside, Python's and numpy's global generators, from which timm's augmentations draw, start
    from a seed. Their states are restored afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(number)
    np.random.seed(number)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@lru_cache(maxsize=8)
def _transform(policy: str, size: int) -> Any:
    # Imported here, since timm imports torch, which data tasks do not need.
    from timm.data.auto_augment import rand_augment_transform

    settings = {"translate_const": int(size * REACH), "img_mean": FILL}
    return rand_augment_transform(policy, settings)
