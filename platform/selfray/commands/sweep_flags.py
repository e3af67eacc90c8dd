"""The flags that all sweeps share, and how a sweep is run from them."""

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
from selfray.imports import uncollected
from selfray.metrics import ProbeName
from selfray.recipes import NAMES
from selfray.sweeps.searches import SEARCHES, SearchName

if TYPE_CHECKING:  # torch takes seconds to import
    from selfray.experiment import Experiment
    from selfray.sweeps.question import Axis, Question, Range


SHORT_EPOCHS = 20
"""Default epochs of each run of a sweep over the embedded digits; the sweep then takes minutes."""


_SEARCHES = "; ".join(f"{name}: {search.summary}" for name, search in SEARCHES.items())


@dataclass(frozen=True)
class SweepFlags:
    """Flags of every sweep; each subclass adds the setting that it varies."""

    recipe: str = ""
    """The recipe to vary."""
    data: str | None = None
    """Images, as in --data.path of `selfray pretrain`; None takes the recipe's."""
    test_data: str | None = None
    """Labelled test images for the probes, if `data` has no test split."""
    epochs: int | None = None
    """Epochs of each run; None takes 20 for the embedded digits, else the recipe's."""
    batch_size: int | None = None
    """Batch size of each run; None takes the recipe's."""
    workers: int | str | None = None
    """Train workers of each run, such as 2 or 1:4; None takes the recipe's."""
    seeds: int = 1
    """Runs of each value, with seeds 0, 1, ...; several seeds show whether a difference exceeds
    chance."""
    probes: int = 4
    """Checkpoints of each run; each of them is probed while the run trains."""
    search: Annotated[SearchName, flag(f"How values are chosen. {_SEARCHES}.")] = "grid"
    samples: int = 8
    """Number of values that a search draws, or of members of a population."""
    rank_by: ProbeName | None = None
    """Probe that ranks the runs; None takes the one that suits the method, or RankMe if the images
    have no labels (but not for MAE and BEiT, for which RankMe is unreliable)."""
    stop_worse: bool = False
    """Stop runs that are not among the best at a rung (ASHA), judged at their checkpoints."""
    stop_by: ProbeName | None = None
    """Probe by which runs are stopped; None takes the one that ranks them."""
    first_rung: float = 0.25
    """Share of the images that every run sees before it may be stopped."""
    rung_factor: float = 2.0
    """One run in this many continues after each rung."""
    at_once: int | None = None
    """Concurrent runs; None takes as many as the cluster has room for."""
    output: str = "runs"
    """Folder of all output; local, s3:// or gs://. A job's relative folder is placed in ~/selfray
    on the machine that runs the job."""

    title: ClassVar[str]
    """Name of the sweep's folders and runs."""
    asks: ClassVar[str]
    """The question that the report answers, as a sentence."""
    methods: ClassVar[tuple[str, ...]]
    """Methods whose recipes this sweep accepts."""

    def axis(self, base: "Experiment") -> "Axis | Range":
        """The setting to vary and its values. ValueError if the flags do not fit the recipe."""
        raise NotImplementedError

    def check_early(self) -> None:
        """ValueError or FileNotFoundError for an unknown recipe or a missing path; needs no
        torch."""
        require(
            self.recipe in NAMES,
            f"--recipe {self.recipe} does not exist{nearest(self.recipe, NAMES)}",
        )
        for name in ("data", "test_data"):
            path = getattr(self, name)
            if path is not None:
                check_path(path, "--" + name.replace("_", "-"))

    def base(self) -> "Experiment":
        """The recipe with these flags applied. ValueError if this sweep does not accept its
        method."""
        from selfray.recipes import every

        recipes = every()
        fitting = [name for name, r in recipes.items() if r.method.name in self.methods]
        if self.recipe not in fitting:
            raise ValueError(
                f"--recipe {self.recipe} does not fit this sweep: give one of {', '.join(fitting)}"
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
        """The sweep's question for a recipe. ValueError if the flags contradict one another."""
        from selfray.sweeps.question import Halving, Question

        halving = Halving(self.stop_by, self.first_rung, self.rung_factor)
        if not self.stop_worse and self.stop_by is not None:
            raise ValueError(f"--stop-by {self.stop_by} has no effect without --stop-worse")
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
    """Run the sweep that `flags` describe. Returns the exit code, 1 if any run failed."""
    from selfray.sweeps.possible import refuse_impossible

    with uncollected():
        base = flags.base()
    question = flags.question(base)
    refuse_impossible(base, question)  # before Ray is up

    def body(console: Console) -> int:
        with uncollected():
            from selfray.cluster.sweep.run import sweep

        with ray.session(console.say):
            result = sweep(base, question, flags.asks, console, at_once=flags.at_once)
        return 1 if any(outcome.failure for outcome in result.outcomes) else 0

    return with_console(log_folder(base.output), body)
