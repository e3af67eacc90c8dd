"""Which temperature is best for these images? SimCLR's and MoCo's, or the one of DINO's teacher.

    python experiments/sweep_temperature.py                          # SimCLR on digits
    python experiments/sweep_temperature.py --recipe mocov2-digits --temperatures 0.07 0.2 0.5
    python experiments/sweep_temperature.py --search optuna --between 0.03 1.0 --stop-worse
    python experiments/sweep_temperature.py --recipe dino-digits --temperatures 0.02 0.04 0.07

The same command goes on where it stopped. Losses do not compare across temperatures; probes do.
"""

import sys
from dataclasses import dataclass

import tyro

from selfray.cluster import runtime
from selfray.commands.script import one_line_errors
from selfray.commands.sweep_flags import SweepFlags, run_sweep


@dataclass(frozen=True)
class SweepTemperature(SweepFlags):
    """Sweep the softmax temperature."""

    temperatures: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    """Temperatures to try."""
    between: tuple[float, float] | None = None
    """Bounds between which a search draws them instead, evenly by their logarithm."""
    recipe: str = "simclr-digits"
    """Any recipe of SimCLR, MoCo (all versions), DINO or DINOv2."""


def main() -> int:
    flags = tyro.cli(SweepTemperature, description=__doc__)
    ray = runtime.Starting()  # Ray's processes come up while torch is imported
    from selfray.recipes import every
    from selfray.schedules import Constant
    from selfray.sweeps.question import Axis, Option, Range

    base = flags.base(every(), "simclr", "moco", "mocov3", "dino", "dinov2")
    of_teacher = base.method.name.startswith("dino")  # whose temperature is a schedule
    path = "method.teacher_temperature" if of_teacher else "method.temperature"
    if flags.between:
        axis = Range("temperature", path, *flags.between, scale="log", is_schedule=of_teacher)
    else:
        options = [
            Option(f"{t}", {path: Constant(t) if of_teacher else t}) for t in flags.temperatures
        ]
        axis = Axis("temperature", tuple(options))
    question = flags.question("sweep-temperature", axis)
    return run_sweep(flags, base, question, "Which temperature is best for these images?", ray)


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
