"""The steps at which a run writes checkpoints and probes its encoder.

A recipe gives their number for a run of its own length. With few images the same recipe has few
steps: 100 checkpoints in 96 steps, or probes that slow down training, make no sense.
"""

from collections.abc import Collection
from dataclasses import dataclass

from selfray.data.plan import even_steps
from selfray.experiment import Experiment

CHECKPOINT_APART = 10
PROBE_APART = 20
"""Least number of steps between two, unless the user gave their number."""


@dataclass(frozen=True)
class Milestones:
    """The steps of a run's events; the last step is among them."""

    checkpoints: frozenset[int]
    """Steps of checkpoints, those for probes included."""
    probes: frozenset[int]
    note: str = ""
    """What was changed from the recipe, in one line; empty if nothing."""


def milestones(
    experiment: Experiment, total_steps: int, chosen: Collection[str] | None = None
) -> Milestones:
    """The milestones of a run.

    Args:
        experiment: the run.
        total_steps: the number of its steps.
        chosen: dotted names of the fields that the user set. If `checkpoint.times` or `probe.times`
            is not among them, it is a recipe's default and is lowered for short runs. None changes
            nothing.
    """
    wanted = {
        "checkpoint.times": (experiment.checkpoint.times, CHECKPOINT_APART),
        "probe.times": (experiment.probe.times, PROBE_APART),
    }
    times = {
        name: count
        if chosen is None or name in chosen
        else min(count, max(1, total_steps // apart))
        for name, (count, apart) in wanted.items()
    }
    lowered = [name for name, (count, _) in wanted.items() if times[name] < count]
    note = ""
    if lowered:
        kinds = {"checkpoint.times": "checkpoint", "probe.times": "probe"}
        counts = " and ".join(_counted(times[name], kinds[name]) for name in lowered)
        recipes = " and ".join(str(wanted[name][0]) for name in lowered)
        flags = " and ".join(f"--{name}" for name in lowered)
        note = (
            f"{counts} in {_counted(total_steps, 'step')}, instead of the recipe's {recipes} for "
            f"longer runs ({flags} change{'s' if len(lowered) == 1 else ''} this)"
        )
    probes = even_steps(total_steps, times["probe.times"])
    checkpoints = even_steps(total_steps, times["checkpoint.times"]) | probes
    return Milestones(frozenset(checkpoints), frozenset(probes), note)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
