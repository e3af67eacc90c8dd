"""Bounds of the numbers in an experiment, by field name. NaN and infinity are never allowed.

Each config checks its own fields and their combinations. Bounds that hold for a field name in every
method and schedule, such as a momentum in [0, 1], are listed here once.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from selfray.check import is_finite, require, require_number


class Bounds(NamedTuple):
    least: float = -math.inf
    most: float = math.inf
    above: float | None = None
    below: float | None = None


SHARE = Bounds(0.0, 1.0)
POSITIVE = Bounds(above=0.0)
NOT_NEGATIVE = Bounds(0.0)
COUNT = Bounds(1.0, 2.0**31)

LIMITS: Mapping[str, Bounds] = {
    "momentum": SHARE,
    "center_momentum": SHARE,
    "codebook_momentum": SHARE,
    "temperature": POSITIVE,
    "teacher_temperature": POSITIVE,
    "student_temperature": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "base_learning_rate": NOT_NEGATIVE,
    "trust_coefficient": POSITIVE,
    "clip_norm": POSITIVE,
    "betas": Bounds(0.0, below=1.0),
    "layer_decay": Bounds(above=0.0, most=1.0),
    "patch_embed_rate": NOT_NEGATIVE,
    "koleo_weight": NOT_NEGATIVE,
    "patch_weight": NOT_NEGATIVE,
    "brightness": Bounds(0.0, 1e3),
    "contrast": Bounds(0.0, 1e3),
    "saturation": Bounds(0.0, 1e3),
    "layer_scale": Bounds(above=0.0, most=1e3),
    "mean": Bounds(-1e6, 1e6),
    "std": Bounds(above=0.0, most=1e6),
    "minutes": POSITIVE,
    "data_cpus": POSITIVE,
    "cpus_per_worker": POSITIVE,
    "gpus_per_worker": NOT_NEGATIVE,
    "depth": Bounds(1.0, 1e4),
    "heads": Bounds(1.0, 1e4),
    "width": Bounds(1.0, 2.0**20),
    "patch_size": Bounds(1.0, 1e5),
    "image_size": Bounds(1.0, 1e5),
    "registers": Bounds(0.0, 1e4),
    "decoder_depth": Bounds(1.0, 1e4),
    "decoder_heads": Bounds(1.0, 1e4),
    "decoder_width": Bounds(1.0, 2.0**20),
    "local_crops": Bounds(0.0, 1e3),
    "prototypes": Bounds(2.0, 2.0**24),
    "patch_prototypes": Bounds(2.0, 2.0**24),
    "queue_size": Bounds(1.0, 2.0**31),
    "hidden": Bounds(1.0, 2.0**20),
    "bottleneck": Bounds(1.0, 2.0**20),
    "projector_hidden": Bounds(1.0, 2.0**20),
    "projector_width": Bounds(1.0, 2.0**20),
    "predictor_hidden": Bounds(1.0, 2.0**20),
    "projector_layers": Bounds(1.0, 1e3),
    "train_limit": COUNT,
    "test_limit": COUNT,
    "epochs": COUNT,
    "batch_size": COUNT,
    "window_rows": Bounds(1.0, 2.0**40),
}
"""Bounds by the last part of a field's dotted name. The numbers of a schedule have the bounds of
the field that holds the schedule."""


def require_possible(experiment: Any) -> None:
    """Raise ValueError that gives the dotted field name for a number outside its bounds."""
    for name, own, value in numbers(experiment):
        bounds = LIMITS.get(own)
        if bounds is None:
            require(is_finite(value), f"{name} must be a finite number, got {value}")
        else:
            require_number(name, value, **bounds._asdict())


def numbers(value: Any, name: str = "", own: str = "") -> Iterator[tuple[str, str, float]]:
    """(dotted name, name of the field whose bounds apply, number) of every number in a config."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return
    if isinstance(value, int | float):
        yield name, own, value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from numbers(item, name, own)
    elif dataclasses.is_dataclass(value):
        is_schedule = type(value).__module__ == "selfray.schedules" and own in LIMITS
        for field in dataclasses.fields(value):
            inner = f"{name}.{field.name}" if name else field.name
            # A ramp's `fraction` is a share of the run; Ramp checks it.
            held = own if is_schedule and field.name != "fraction" else field.name
            yield from numbers(getattr(value, field.name), inner, held)
