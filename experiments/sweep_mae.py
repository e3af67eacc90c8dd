"""Which mask ratio is best for these images? Each is pretrained with, probed and ranked.

    python experiments/sweep_mae.py                                  # the digits, 4 ratios
    python experiments/sweep_mae.py --seeds 3 --ratios 0.5 0.6 0.75 0.9
    python experiments/sweep_mae.py --search optuna --between 0.2 0.95 --samples 12
    python experiments/sweep_mae.py --recipe mae-cifar10 --data cifar10/ --epochs 100 --stop-worse

The same command goes on where it stopped. MAE is judged by the linear probe: nearest neighbours do
not suit it, and losses do not compare across mask ratios.
"""

import sys
from dataclasses import dataclass

import tyro

from selfray.cluster import runtime
from selfray.commands.script import one_line_errors
from selfray.commands.sweep_flags import SweepFlags, run_sweep


@dataclass(frozen=True)
class SweepMAE(SweepFlags):
    """Sweep MAE's mask ratio."""

    ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)
    """Mask ratios to try."""
    between: tuple[float, float] | None = None
    """Bounds between which a search draws them instead."""
    recipe: str = "mae-digits"
    """Any recipe of MAE."""


def main() -> int:
    flags = tyro.cli(SweepMAE, description=__doc__)
    ray = runtime.Starting()  # Ray's processes come up while torch is imported
    from selfray.recipes import every
    from selfray.sweeps.question import Axis, Range

    base = flags.base(every(), "mae")
    name, path = "mask ratio", "method.mask_ratio"
    ratio = (
        Range(name, path, *flags.between) if flags.between else Axis.over(name, path, flags.ratios)
    )
    question = flags.question("sweep-mask-ratio", ratio)
    return run_sweep(flags, base, question, "Which mask ratio is best for these images?", ray)


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
