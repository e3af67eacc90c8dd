"""The four sweeps that `selfray sweep` and the scripts of experiments/ offer.

Each declares the setting that it varies; the flags that all share are in sweep_flags.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from selfray.cluster import runtime
from selfray.commands import early
from selfray.commands.flags import read
from selfray.commands.script import one_line_errors
from selfray.commands.sweep_flags import SweepFlags, run_sweep

if TYPE_CHECKING:  # torch takes seconds to import
    from selfray.experiment import Experiment
    from selfray.sweeps.question import Axis, Range


@dataclass(frozen=True)
class SweepMAE(SweepFlags):
    """Sweep MAE's mask ratio."""

    title: ClassVar[str] = "sweep-mask-ratio"
    asks: ClassVar[str] = "Which mask ratio is best for these images?"
    methods: ClassVar[tuple[str, ...]] = ("mae",)

    ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)
    """Mask ratios to try."""
    between: tuple[float, float] | None = None
    """Lower and upper bound between which a search draws mask ratios."""
    recipe: str = "mae-digits"
    """Any recipe of MAE."""

    def axis(self, base: "Experiment") -> "Axis | Range":
        from selfray.sweeps.question import Axis, Range

        name, path = "mask ratio", "method.mask_ratio"
        if self.between:
            return Range(name, path, *self.between)
        return Axis.over(name, path, self.ratios)


@dataclass(frozen=True)
class SweepTemperature(SweepFlags):
    """Sweep the softmax temperature."""

    title: ClassVar[str] = "sweep-temperature"
    asks: ClassVar[str] = "Which temperature is best for these images?"
    methods: ClassVar[tuple[str, ...]] = ("simclr", "moco", "mocov3", "dino", "dinov2")

    temperatures: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    """Temperatures to try."""
    between: tuple[float, float] | None = None
    """Lower and upper bound between which a search draws temperatures, uniformly on a log scale."""
    recipe: str = "simclr-digits"
    """Any recipe of SimCLR, MoCo (all versions), DINO or DINOv2."""

    def axis(self, base: "Experiment") -> "Axis | Range":
        from selfray.schedules import Constant
        from selfray.sweeps.question import Axis, Option, Range

        of_teacher = base.method.name.startswith("dino")  # whose temperature is a schedule
        path = "method.teacher_temperature" if of_teacher else "method.temperature"
        if self.between:
            return Range("temperature", path, *self.between, scale="log", is_schedule=of_teacher)
        options = [
            Option(f"{t}", {path: Constant(t) if of_teacher else t}) for t in self.temperatures
        ]
        return Axis("temperature", tuple(options))


@dataclass(frozen=True)
class SweepMomentum(SweepFlags):
    """Sweep the schedule of the teacher's momentum."""

    title: ClassVar[str] = "sweep-momentum"
    asks: ClassVar[str] = "Which momentum is best for these images?"
    methods: ClassVar[tuple[str, ...]] = ("byol", "mocov3", "dino", "dinov2")

    starts: tuple[float, ...] = (0.9, 0.97)
    """Momentum at the first step."""
    shapes: tuple[Literal["constant", "linear", "cosine"], ...] = ("constant", "linear", "cosine")
    """Schedules of the momentum after the first step; linear and cosine rise to 1."""
    between: tuple[float, float] | None = None
    """Lower and upper bound between which a search draws constant momenta, uniformly in log(1 -
    momentum); a population varies them during training."""
    recipe: str = "byol-digits"
    """Any recipe of BYOL, MoCo v3, DINO or DINOv2."""

    def axis(self, base: "Experiment") -> "Axis | Range":
        from selfray.schedules import Constant, Cosine, Ramp
        from selfray.sweeps.question import Axis, Option, Range

        build = {
            "constant": Constant,
            "linear": lambda start: Ramp(start, 1.0),
            "cosine": lambda start: Cosine(start, 1.0),
        }
        name, path = "momentum", "method.momentum"
        if self.between:
            return Range(name, path, *self.between, scale="to_one", is_schedule=True)
        options = [
            Option(f"{shape} from {start}", {path: build[shape](start)})
            for start in self.starts
            for shape in self.shapes
        ]
        return Axis(name, tuple(options))


OFF = {
    "crop": {"crop_scale": (1.0, 1.0)},
    "colour jitter": {"color_jitter": None},
    "grayscale": {"grayscale": 0.0},
    "blur": {"blur": 0.0},
    "solarize": {"solarize": 0.0},
    "flip": {"flip": 0.0},
    "crop and colour jitter": {"crop_scale": (1.0, 1.0), "color_jitter": None},
}
"""Augmentation -> the fields of a View that switch it off, in every view of a method."""


@dataclass(frozen=True)
class SweepAugmentation(SweepFlags):
    """Leave out one augmentation at a time."""

    title: ClassVar[str] = "sweep-augmentation"
    asks: ClassVar[str] = "Which augmentations matter for these images?"
    methods: ClassVar[tuple[str, ...]] = ("simclr", "moco", "mocov3", "byol", "dino")

    recipe: str = "simclr-digits"
    """Any recipe of SimCLR, MoCo (all versions), BYOL or DINO."""

    def axis(self, base: "Experiment") -> "Axis | Range":
        from selfray.sweeps.question import Axis, Option
        from selfray.views import View

        values = {f.name: getattr(base.method, f.name) for f in fields(base.method)}
        views = {name: value for name, value in values.items() if isinstance(value, View)}
        options = [Option("all", {})]
        for name, off in OFF.items():
            without = {f"method.{n}": replace(view, **off) for n, view in views.items()}
            if without != {f"method.{n}": view for n, view in views.items()}:
                options.append(Option(f"all but {name}", without))
        return Axis("augmentation", tuple(options))


SWEEPS: dict[str, type[SweepFlags]] = {
    "mask-ratio": SweepMAE,
    "temperature": SweepTemperature,
    "momentum": SweepMomentum,
    "augmentation": SweepAugmentation,
}
"""The sweeps of `selfray sweep`, by name."""


def run(kind: type[SweepFlags], arguments: Sequence[str], description: str, prog: str) -> int:
    """Parse a sweep's command line and run it. Returns the exit code."""

    def main() -> int:
        flags = read(kind, arguments, prog, description=description)
        flags.check_early()
        early.refuse_mlflow_ids()
        ray = runtime.Starting()  # Ray's processes start while torch is imported
        try:
            return run_sweep(flags, ray)
        finally:
            ray.stop()

    return one_line_errors(main)
