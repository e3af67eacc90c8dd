"""The verdict: whether training made the encoder better than the weights it started from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from selfray.probes.features import ProbeResult
from selfray.probes.intervals import Interval, difference


@dataclass(frozen=True)
class Verdict:
    """The best probe of a run compared with that of its start, on the same test images."""

    by: Literal["knn", "linear"]
    start: float
    """Accuracy of the weights that the run started from, 0..1."""
    best: float
    """Accuracy of the best probe, 0..1."""
    step: int
    """The step of the best probe."""
    probes: int
    """Number of probes after the start."""
    test_images: int
    gain: Interval
    """best - start, with its 95 % interval by the paired bootstrap over the test images."""

    @property
    def described(self) -> str:
        name = {"knn": "kNN", "linear": "linear"}[self.by]
        figures = (
            f"{name} {self.best:.1%} at step {self.step:,}, {self.start:.1%} at the start; 95 % "
            f"bootstrap over {self.test_images:,} test images, the best of "
            f"{self.probes} probe{'s' if self.probes > 1 else ''}"
        )
        sure = max(self.gain.high - self.gain.value, self.gain.value - self.gain.low)
        amount = f"{100 * abs(self.gain.value):.1f} ± {100 * sure:.1f} points"
        if not self.gain.excludes_zero:
            return (
                f"no better than the weights it started from: a difference of "
                f"{100 * self.gain.value:+.1f} ± {100 * sure:.1f} points may be chance ({figures})"
            )
        if self.gain.value > 0:
            return f"better than the weights it started from by {amount} ({figures})"
        return f"worse than the weights it started from by {amount} ({figures}): keep those"


def verdict(probes: Mapping[int, ProbeResult], by: Literal["knn", "linear"]) -> Verdict | None:
    """The verdict on a run's probes by step, where step 0 is the start. None without labels,
    without a probe of the start or without one after it."""
    start = probes.get(0)
    later = {step: p for step, p in probes.items() if step > 0 and getattr(p, by) is not None}
    if start is None or not later:
        return None
    step = max(later, key=lambda step: (getattr(later[step], by), step))
    gain = gain_over(start, later[step], by)
    if gain is None:
        return None
    first, best = getattr(start, by), getattr(later[step], by)
    return Verdict(by, first, best, step, len(later), later[step].test_images, gain)


def gain_over(start: ProbeResult, other: ProbeResult, by: str) -> Interval | None:
    """Accuracy of `other` minus that of `start` on the same test images, with its interval; None if
    the correctly classified images were not recorded."""
    ours, theirs = other.correct(by), start.correct(by)
    if ours is None or theirs is None or len(ours) != len(theirs):
        return None
    return difference(ours, theirs)


def surely_worse(probes: Mapping[int, ProbeResult], by: str, patience: int) -> bool:
    """Whether the last `patience` probes are all significantly worse than that of the start; False
    for a patience of 0, with fewer probes, and without a probe of the start."""
    later = sorted(step for step in probes if step > 0)[-patience:]
    if not patience or 0 not in probes or len(later) < patience:
        return False
    gains = [gain_over(probes[0], probes[step], by) for step in later]
    return all(gain is not None and gain.high < 0 for gain in gains)


def without_labels(probes: Mapping[int, ProbeResult]) -> str | None:
    """A sentence for runs without labels; None if there is no probe to compare."""
    later = [step for step in probes if step > 0]
    if 0 not in probes or not later:
        return None
    start, last = probes[0], probes[max(later)]
    moved = ", ".join(
        f"{shown} {getattr(start, name):.3g} -> {getattr(last, name):.3g}"
        for name, shown in (("rankme", "RankMe"), ("alignment", "alignment"))
        if getattr(start, name) is not None and getattr(last, name) is not None
    )
    return (
        f"without labels selfray cannot say whether it is better than the weights it started from; "
        f"measured without labels: {moved}; give labelled images with --data.test-path to know"
    )
