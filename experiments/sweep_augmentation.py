"""Which augmentations matter for these images? Each one is left out in turn.

    python experiments/sweep_augmentation.py                         # SimCLR on digits
    python experiments/sweep_augmentation.py --recipe simclr-cifar10 --data cifar10/ --epochs 100

What the recipe does not use is not tried. The literature says that crops together with colour
jitter are what matters (SimCLR, arXiv:2002.05709, section 3): the last line leaves both out. The
same command goes on where it stopped.
"""

import sys
from dataclasses import dataclass, fields, replace

import tyro

from selfray.cluster import runtime
from selfray.commands.script import one_line_errors
from selfray.commands.sweep_flags import SweepFlags, run_sweep


@dataclass(frozen=True)
class SweepAugmentation(SweepFlags):
    """Leave out one augmentation at a time."""

    recipe: str = "simclr-digits"
    """Any recipe of SimCLR, MoCo (all versions), BYOL or DINO."""


OFF = {
    "crop": {"crop_scale": (1.0, 1.0)},
    "colour jitter": {"color_jitter": None},
    "grayscale": {"grayscale": 0.0},
    "blur": {"blur": 0.0},
    "solarize": {"solarize": 0.0},
    "flip": {"flip": 0.0},
    "crop and colour jitter": {"crop_scale": (1.0, 1.0), "color_jitter": None},
}
"""What leaving out means, for every view of a method."""


def main() -> int:
    flags = tyro.cli(SweepAugmentation, description=__doc__)
    ray = runtime.Starting()  # Ray's processes come up while torch is imported
    from selfray.recipes import every
    from selfray.sweeps.question import Axis, Option
    from selfray.views import View

    base = flags.base(every(), "simclr", "moco", "mocov3", "byol", "dino")
    values = {f.name: getattr(base.method, f.name) for f in fields(base.method)}
    views = {name: value for name, value in values.items() if isinstance(value, View)}
    options = [Option("all", {})]
    for name, off in OFF.items():
        without = {f"method.{n}": replace(view, **off) for n, view in views.items()}
        if without != {f"method.{n}": view for n, view in views.items()}:
            options.append(Option(f"all but {name}", without))
    question = flags.question("sweep-augmentation", Axis("augmentation", tuple(options)))
    return run_sweep(flags, base, question, "Which augmentations matter for these images?", ray)


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
