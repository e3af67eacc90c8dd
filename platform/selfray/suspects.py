"""Names the setting that most likely made figures not finite: the farthest from its usual range."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from selfray.experiment import Experiment
from selfray.limits import numbers

USUAL = {
    "std": (0.01, 10.0),
    "mean": (0.0, 2.0),
    "temperature": (0.02, 10.0),
    "teacher_temperature": (0.02, 10.0),
    "student_temperature": (0.02, 10.0),
    "layer_scale": (0.0, 10.0),
    "koleo_weight": (0.0, 10.0),
    "patch_weight": (0.0, 10.0),
}
"""Field name -> range of absolute values with which the papers' runs and ours stay finite."""
USUAL_IN_UPDATES = {
    "weight_decay": (0.0, 1.0),
    "trust_coefficient": (0.0, 0.1),
    "clip_norm": (0.0, 100.0),
}
"""The same for settings that matter only after the first update."""
HIGHEST_RATES = {"adamw": 0.01, "sgd": 2.0, "lars": 20.0}
"""Optimizer -> peak learning rate above which runs diverge."""


class _Suspect(NamedTuple):
    decades: float
    """Distance from the usual range, in powers of ten."""
    text: str


def suspect(experiment: Experiment, step: int) -> str:
    """Advice that names a flag, for a run whose loss was not finite at optimizer step `step`,
    counted from 1. At step 1 the optimizer's settings cannot be the cause."""
    found = max(_unusual(experiment, step), default=None)
    if found is not None:
        return found.text
    if step == 1:
        precision = experiment.precision
        return (
            f"--precision {precision} is suspect: give float32"
            if precision == "bf16"
            else "no weight was changed yet, so the images or the first weights are suspect: look "
            "at them, or give another --seed"
        )
    clip = experiment.optimizer.clip_norm is None
    return (
        "give a lower --optimizer.base-learning-rate, "
        + ("--optimizer.clip-norm 1, " if clip else "")
        + "a longer --optimizer.schedule.warmup-fraction or another --seed"
    )


def _unusual(experiment: Experiment, step: int) -> Iterator[_Suspect]:
    usual = USUAL if step == 1 else USUAL | USUAL_IN_UPDATES
    for name, own, value in numbers(experiment):
        if own in usual and value:
            least, most = usual[own]
            size = abs(value)
            far = math.log10(least / size) if size < least else math.log10(size / most)
            if far > 0:
                bound = f"at least {least:g}" if size < least else f"at most {most:g}"
                flag = name.replace("_", "-")
                yield _Suspect(far, f"--{flag} {value:g} is suspect: give {bound}")
    if step > 1:
        rate = experiment.optimizer.peak_learning_rate(experiment.batch_size)
        most = HIGHEST_RATES[experiment.optimizer.name]
        if rate > most:
            base = experiment.optimizer.base_learning_rate
            yield _Suspect(
                math.log10(rate / most),
                f"--optimizer.base-learning-rate {base:g} is suspect, since it makes a peak of "
                f"{rate:g}: give at most {base * most / rate:.2g}",
            )
