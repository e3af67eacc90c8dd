"""Hyper-parameters that change during a run: pure functions of progress.

A schedule has no state, so nothing has to be restored when a run resumes. It depends on images
seen, so a change of world size does not affect it.
"""

import math
from dataclasses import dataclass

from selfray.check import require


@dataclass(frozen=True)
class Progress:
    """How far a run is. One step is one optimizer step over the global batch."""

    images_seen: int
    total_images: int
    step: int

    @property
    def fraction(self) -> float:
        return self.images_seen / self.total_images

    @property
    def finished(self) -> bool:
        return self.images_seen >= self.total_images

    def advance(self, images: int) -> "Progress":
        return Progress(self.images_seen + images, self.total_images, self.step + 1)


@dataclass(frozen=True)
class Constant:
    value: float
    """The value at every step."""

    def __call__(self, progress: Progress) -> float:
        return self.value


@dataclass(frozen=True)
class Cosine:
    """From start to end along half a cosine over the whole run."""

    start: float
    """The value at the first step."""
    end: float
    """The value at the last step."""

    def __call__(self, progress: Progress) -> float:
        remaining = 0.5 * (1 + math.cos(math.pi * min(1.0, progress.fraction)))
        return self.end + (self.start - self.end) * remaining


@dataclass(frozen=True)
class Ramp:
    """In a straight line from start to end over the first `fraction` of the run, then constant."""

    start: float
    """The value at the first step."""
    end: float
    """The value after the ramp."""
    fraction: float = 1.0
    """Share of the run that the ramp takes."""

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, f"Ramp.fraction must lie in (0, 1], got {self.fraction}")

    def __call__(self, progress: Progress) -> float:
        return self.start + (self.end - self.start) * min(1.0, progress.fraction / self.fraction)


@dataclass(frozen=True)
class Piecewise:
    """A constant for each of several equal parts of the run, such as the values that the winner of
    population-based training had."""

    values: tuple[float, ...]
    """The value in each part, in order."""

    def __post_init__(self) -> None:
        require(len(self.values) > 0, "Piecewise.values must name at least one value")

    def __call__(self, progress: Progress) -> float:
        # Integer arithmetic: the bound of a part, as a fraction, may be rounded.
        part = progress.images_seen * len(self.values) // progress.total_images
        return self.values[min(part, len(self.values) - 1)]


Schedule = Constant | Cosine | Ramp | Piecewise


@dataclass(frozen=True)
class Steps:
    """A learning rate that falls in steps, as a factor (MoCo v1)."""

    at: tuple[float, ...] = (0.6, 0.8)
    """Shares of the run after which the factor falls."""
    factor: float = 0.1
    """Each fall multiplies the factor by this."""

    def __post_init__(self) -> None:
        require(
            all(0 < share < 1 for share in self.at) and list(self.at) == sorted(self.at),
            f"Steps.at must be growing shares of the run in (0, 1), got {self.at}",
        )
        require(0 < self.factor < 1, f"Steps.factor must lie in (0, 1), got {self.factor}")

    def __call__(self, progress: Progress) -> float:
        return self.factor ** sum(progress.fraction >= share for share in self.at)


@dataclass(frozen=True)
class WarmupCosine:
    """A factor on the learning rate: linear warm-up from 0 to 1, then a cosine down to `final`."""

    warmup_fraction: float = 0.1
    """Share of the run in which the factor rises from 0 to 1."""
    final: float = 0.0
    """The factor at the run's end."""

    def __post_init__(self) -> None:
        require(
            0 <= self.warmup_fraction < 1,
            f"warmup_fraction must lie in [0, 1), got {self.warmup_fraction}",
        )
        require(0 <= self.final <= 1, f"the final factor must lie in [0, 1], got {self.final}")

    def __call__(self, progress: Progress) -> float:
        fraction = min(1.0, progress.fraction)
        if fraction < self.warmup_fraction:
            return fraction / self.warmup_fraction
        cosine_fraction = (fraction - self.warmup_fraction) / (1 - self.warmup_fraction)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * cosine_fraction))
