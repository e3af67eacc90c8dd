"""At which steps a run writes checkpoints and probes its encoder.

A recipe says how often, for a run of its own length. On few images the same recipe has few steps:
100 checkpoints in 96 steps, and probes that take the processor from training, are nobody's wish.
"""

from collections.abc import Collection
from dataclasses import dataclass

from selfray.data.plan import even_steps
from selfray.experiment import Experiment

CHECKPOINT_APART = 10
PROBE_APART = 20
"""Steps from one to the next, at least, where the user did not say how many."""


@dataclass(frozen=True)
class Milestones:
    """The steps of a run's events; the last step is among them."""

    checkpoints: frozenset[int]
    """Those before probes included."""
    probes: frozenset[int]
    note: str = ""
    """What was changed of the recipe's wish, in one line; empty where nothing was."""


def milestones(
    experiment: Experiment, total_steps: int, chosen: Collection[str] | None = None
) -> Milestones:
    """The milestones of a run.

    Args:
        chosen: dotted names of the fields that the user set. `checkpoint.times` and `probe.times`
            outside of it are a recipe's defaults, and are lowered where steps are few. None takes
            the experiment at its word.
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
            f"{counts} in {_counted(total_steps, 'step')}, where the recipe has {recipes} for "
            f"longer runs ({flags} choose{'s' if len(lowered) == 1 else ''} otherwise)"
        )
    probes = even_steps(total_steps, times["probe.times"])
    checkpoints = even_steps(total_steps, times["checkpoint.times"]) | probes
    return Milestones(frozenset(checkpoints), frozenset(probes), note)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
