"""How should the teacher follow? Start values and shapes of its momentum, for BYOL, MoCo v3, DINO.

    python experiments/sweep_momentum.py                             # BYOL on digits
    python experiments/sweep_momentum.py --recipe dino-digits --starts 0.99 0.996 --seeds 3
    python experiments/sweep_momentum.py --search population --between 0.8 0.999 --samples 6

A constant stays at its start; the line and the cosine end at 1, where the teacher stands still. A
population finds a schedule of its own: what its survivor went through.
The same command goes on where it stopped.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import tyro

from selfray.cluster import runtime
from selfray.commands.script import one_line_errors
from selfray.commands.sweep_flags import SweepFlags, run_sweep


@dataclass(frozen=True)
class SweepMomentum(SweepFlags):
    """Sweep the schedule of the teacher's momentum."""

    starts: tuple[float, ...] = (0.9, 0.97)
    """Momentum at the first step."""
    shapes: tuple[Literal["constant", "linear", "cosine"], ...] = ("constant", "linear", "cosine")
    """How it goes on from there."""
    between: tuple[float, float] | None = None
    """Bounds between which a search draws constants instead, evenly by their distance to 1; a
    population varies them as it goes."""
    recipe: str = "byol-digits"
    """Any recipe of BYOL, MoCo v3, DINO or DINOv2."""


def main() -> int:
    flags = tyro.cli(SweepMomentum, description=__doc__)
    ray = runtime.Starting()  # Ray's processes come up while torch is imported
    from selfray.recipes import every
    from selfray.schedules import Constant, Cosine, Ramp
    from selfray.sweeps.question import Axis, Option, Range

    base = flags.base(every(), "byol", "mocov3", "dino", "dinov2")
    build = {
        "constant": Constant,
        "linear": lambda start: Ramp(start, 1.0),
        "cosine": lambda start: Cosine(start, 1.0),
    }
    name, path = "momentum", "method.momentum"
    if flags.between:
        axis = Range(name, path, *flags.between, scale="to_one", is_schedule=True)
    else:
        options = [
            Option(f"{shape} from {start}", {path: build[shape](start)})
            for start in flags.starts
            for shape in flags.shapes
        ]
        axis = Axis(name, tuple(options))
    question = flags.question("sweep-momentum", axis)
    return run_sweep(flags, base, question, "Which momentum is best for these images?", ray)


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
