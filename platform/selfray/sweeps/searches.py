"""The searches of a sweep, as a table: how each chooses the combinations to try.

A new search needs its own file and one row here.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from selfray.sweeps.question import Known, Question

Choice = Mapping[str, float | str]
"""Axis name -> an option's label, or a position in [0, 1] within a range."""


@dataclass(frozen=True)
class Search:
    """One row of the table."""

    summary: str
    """The combinations that it tries, for the help of --search."""
    draw: "Callable[[Question], list[Choice]] | None" = None
    """All combinations at once: a pure function of the question."""
    ask: "Callable[[Question, Sequence[Known]], Choice] | None" = None
    """The next combination: a pure function of the question and of the known combinations."""
    is_population: bool = False
    """Whether runs copy one another (population.py) instead of trying combinations."""
    needs_lists: bool = False
    """Whether it needs lists of values and cannot draw between two bounds."""


def _grid(question: "Question") -> list[Choice]:
    labels = [axis.labels or () for axis in question.axes]
    names = [axis.name for axis in question.axes]
    return [dict(zip(names, found, strict=True)) for found in itertools.product(*labels)]


def _at_random(question: "Question") -> list[Choice]:
    """A random subset of all combinations; if an axis is a range, `samples` random draws."""
    import numpy as np

    rng = np.random.default_rng(question.first_seed)
    grid = _grid(question)
    if grid:
        samples = min(question.samples, len(grid))
        drawn = sorted(rng.choice(len(grid), samples, replace=False).tolist())
        return [grid[index] for index in drawn]

    def draw(labels: Sequence[str] | None) -> float | str:
        return float(rng.random()) if labels is None else labels[int(rng.integers(len(labels)))]

    return [
        {axis.name: draw(axis.labels) for axis in question.axes} for _ in range(question.samples)
    ]


def _by_tpe(question: "Question", known: "Sequence[Known]") -> Choice:
    from selfray.sweeps.tpe import next_choice  # Optuna takes a second to import

    return next_choice(question, known)


SEARCHES = {
    "grid": Search("all given values", draw=_grid, needs_lists=True),
    "random": Search("random draws from the given values or between two bounds", draw=_at_random),
    "optuna": Search("draws near values that did well so far (Optuna's TPE)", ask=_by_tpe),
    "population": Search(
        "concurrent runs, of which the worse copy the better and vary the value (population-based "
        "training, for schedules)",
        is_population=True,
    ),
}

if TYPE_CHECKING:
    SearchName = str
else:  # the command line reads a flag's choices from its annotation
    SearchName = Literal[tuple(SEARCHES)]


def names_of(fitting: Callable[[Search], Any]) -> str:
    """The names of the searches for which `fitting` is true, such as `random or optuna`."""
    *most, last = [name for name, search in SEARCHES.items() if fitting(search)]
    return f"{', '.join(most)} or {last}" if most else last
