"""The flags that all sweep scripts share, and the life of such a script."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from selfray import config
from selfray.check import require
from selfray.cluster import runtime
from selfray.commands.early import check_path
from selfray.commands.flags import flag
from selfray.commands.script import log_folder, with_console
from selfray.commands.words import nearest
from selfray.console import Console
from selfray.metrics import ProbeName
from selfray.recipes import NAMES
from selfray.sweeps.searches import SEARCHES, SearchName

if TYPE_CHECKING:  # torch takes seconds to import
    from selfray.experiment import Experiment
    from selfray.sweeps.question import Axis, Question, Range


SHORT_EPOCHS = 20
"""Epochs of each run of a sweep over the embedded digits, where none are given: minutes in all."""


_SEARCHES = "; ".join(f"{name}: {search.told}" for name, search in SEARCHES.items())


@dataclass(frozen=True)
class SweepFlags:
    """What all sweeps have in common; each script adds what it varies."""

    recipe: str = ""
    """The recipe that is varied."""
    data: str | None = None
    """Images: as --data.path of pretrain.py; None takes the recipe's."""
    test_data: str | None = None
    """Labelled images for the probes' test, where `data` holds none of its own."""
    epochs: int | None = None
    """Epochs of each run; None takes 20 for the embedded digits, else the recipe's."""
    batch_size: int | None = None
    """None takes the recipe's."""
    workers: int | str | None = None
    """Train workers of each run, such as 2 or 1:4; None takes the recipe's."""
    seeds: int = 1
    """Runs of each value, with seeds 0, 1, ...: what tells a difference from chance."""
    probes: int = 4
    """Checkpoints of each run, every one of them probed beside the training."""
    search: Annotated[SearchName, flag(f"Which values are tried. {_SEARCHES}.")] = "grid"
    samples: int = 8
    """Values that a search draws, or members of a population."""
    rank_by: ProbeName | None = None
    """What ranks the runs; None takes the probe that judges the method, and RankMe where the
    images have no labels (not for MAE and BEiT, which it misleads about)."""
    stop_worse: bool = False
    """Stop runs that are not among the best at a rung (ASHA), judged at their checkpoints."""
    stop_by: ProbeName | None = None
    """What runs are stopped by; None takes what ranks."""
    first_rung: float = 0.25
    """Share of the images that every run sees before it may be stopped."""
    rung_factor: float = 2.0
    """One run in this many goes on from each rung."""
    at_once: int | None = None
    """Runs at a time; None takes as many as the cluster holds."""
    output: str = "runs"
    """Folder of everything that is written; local, s3:// or gs://. A job's relative one is kept
    under ~/selfray of the machine that runs the job."""

    title: ClassVar[str]
    """What the sweep's folders and runs are called."""
    asks: ClassVar[str]
    """The question, as the report words it."""
    methods: ClassVar[tuple[str, ...]]
    """Methods whose recipes may be varied."""

    def axis(self, base: "Experiment") -> "Axis | Range":
        """What is varied of a recipe. ValueError where the flags make no sense for it."""
        raise NotImplementedError

    def check_early(self) -> None:
        """ValueError for what is wrong without a look at any recipe's fields."""
        require(
            self.recipe in NAMES,
            f"--recipe {self.recipe} does not exist{nearest(self.recipe, NAMES)}",
        )
        for name in ("data", "test_data"):
            path = getattr(self, name)
            if path is not None:
                check_path(path, "--" + name.replace("_", "-"))

    def base(self) -> "Experiment":
        """The recipe with these flags. ValueError where it is of no method that fits."""
        from selfray.recipes import every

        recipes = every()
        fitting = [name for name, r in recipes.items() if r.method.name in self.methods]
        if self.recipe not in fitting:
            raise ValueError(
                f"--recipe {self.recipe} cannot be swept here: give one of {', '.join(fitting)}"
            )
        recipe = recipes[self.recipe]
        given = {
            "data.path": self.data,
            "data.test_path": self.test_data,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "workers": self.workers,
            "probe.times": self.probes,
            "output": runtime.lasting(self.output),
        }
        changes = {path: value for path, value in given.items() if value is not None}
        base = config.override(recipe, **changes)
        if self.epochs is None and base.data.path.startswith("embedded:"):
            base = replace(base, epochs=min(SHORT_EPOCHS, base.epochs))
        return base

    def question(self, base: "Experiment") -> "Question":
        """What these flags ask of a recipe. ValueError where it makes no sense."""
        from selfray.sweeps.question import Halving, Question

        halving = Halving(self.stop_by, self.first_rung, self.rung_factor)
        if not self.stop_worse and self.stop_by is not None:
            raise ValueError(f"--stop-by {self.stop_by} stops nothing without --stop-worse")
        return Question(
            self.title,
            (self.axis(base),),
            self.rank_by,
            self.seeds,
            self.search,
            self.samples,
            self.probes if SEARCHES[self.search].is_population else 4,
            halving if self.stop_worse else None,
        )


def run_sweep(flags: SweepFlags, ray: runtime.Starting) -> int:
    """Carry out the sweep that flags ask for. Returns the exit code."""
    base = flags.base()
    question = flags.question(base)

    def body(console: Console) -> int:
        from selfray.cluster.sweep.run import sweep

        with ray.session(console.say):
            result = sweep(base, question, flags.asks, console, at_once=flags.at_once)
        return 1 if any(outcome.failure for outcome in result.outcomes) else 0

    return with_console(log_folder(base.output), body)
