"""The settings that all runs of a sweep share, and the tasks made from them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from selfray import config
from selfray.cluster.placement import place
from selfray.cluster.runtime import Resources
from selfray.cluster.sweep.trial import Outcome, Task
from selfray.cluster.sweep.tune import TRIAL_CPUS, TaskSource
from selfray.experiment import Experiment
from selfray.runs.folder import TRIALS
from selfray.storage import Location
from selfray.sweeps.question import Known, Question, Trial
from selfray.sweeps.searches import SEARCHES, Choice


@dataclass(frozen=True)
class SweepPlan:
    """The settings of a sweep, as plain values, so that Tune can copy them."""

    folder: str
    base: Experiment
    question: Question
    tracking: str
    parent_run_id: str | None

    @property
    def location(self) -> Location:
        return Location.of(self.folder)

    def task(self, number: int, trial: Trial) -> Task:
        """The task of a run. Raises ValueError if its options do not make a valid experiment."""
        halving = self.question.halving
        return self._task(
            number,
            trial.label,
            trial.seed,
            trial.experiment(self.base),
            f"trials/{number:04d}.json",
            {f"sweep.{name}": option.label for name, option in trial.choice.items()},
            report=halving.metric if halving else None,
        )

    def member_task(
        self, number: int, generation: int, label: str, experiment: Experiment, until_step: int
    ) -> Task:
        """The task of a population's member for one generation."""
        return self._task(
            number,
            label,
            experiment.seed,
            experiment,
            f"generations/{generation}/{number:04d}.json",
            {"sweep.member": f"{number}"},
            run_folder=(self.location / "members" / f"member-{number:02d}").uri,
            until_step=until_step,
        )

    def _task(
        self,
        number: int,
        label: str,
        seed: int,
        experiment: Experiment,
        outcome: str,
        params: Mapping[str, str],
        **more: Any,
    ) -> Task:
        folder = self.location
        return Task(
            number,
            label,
            seed,
            config.dumps(experiment),
            (folder / outcome).uri,
            (folder / "logs" / f"{number:04d}.log").uri,
            (folder / "stops" / f"{number:04d}.json").uri,
            os.getcwd(),
            self.tracking,
            self.parent_run_id,
            params,
            **more,
        )

    def tasks_of(self, combination: int, choice: Choice) -> list[Task]:
        """The tasks of a combination, one for each seed."""
        first = combination * self.question.seeds
        return [self.task(first + i, t) for i, t in enumerate(self.question.trials(choice))]

    def outcome(self, number: int) -> Outcome | None:
        return read_outcome(self.location / TRIALS / f"{number:04d}.json")


def read_outcome(file: Location) -> Outcome | None:
    """The outcome of a run; None if it has not ended."""
    try:
        return Outcome.from_json(file.read_json())
    except FileNotFoundError:
        return None


class Asking(TaskSource):
    """Tasks of a search that asks: each combination is chosen when a slot becomes free, from all
    results known by then. Chosen combinations are stored in the sweep's folder, so none is chosen
    twice."""

    def __init__(self, plan: SweepPlan) -> None:
        self._plan = plan
        super().__init__(
            task
            for combination, choice in enumerate(asked(plan))
            for task in plan.tasks_of(combination, choice)
            if plan.outcome(task.number) is None
        )

    def more(self) -> Sequence[Task]:
        ask = SEARCHES[self._plan.question.search].ask
        assert ask is not None
        choices = asked(self._plan)
        if len(choices) == self._plan.question.samples:
            return []
        known = [_known(self._plan, number, choice) for number, choice in enumerate(choices)]
        choices.append(ask(self._plan.question, known))
        (self._plan.location / "asked.json").write_json(choices)
        return self._plan.tasks_of(len(choices) - 1, choices[-1])


def asked(plan: SweepPlan) -> list[Choice]:
    """The combinations that a search has chosen so far."""
    try:
        return (plan.location / "asked.json").read_json()
    except FileNotFoundError:
        return []


def _known(plan: SweepPlan, combination: int, choice: Choice) -> Known:
    seeds, metric = plan.question.seeds, plan.question.metric
    assert metric is not None
    found = [plan.outcome(combination * seeds + seed) for seed in range(seeds)]
    ended = [outcome for outcome in found if outcome is not None]
    if len(ended) < len(found):
        return Known(choice, "running")
    values = [v for o in ended if o.failure is None and (v := o.final(metric)) is not None]
    if not values:
        return Known(choice, "failed")
    mean = sum(values) / len(values)
    if any(outcome.stopped for outcome in ended):
        return Known(choice, "stopped", mean, min(outcome.images_seen for outcome in ended))
    return Known(choice, "finished", mean)


def fitting(experiment: Experiment, cluster: Resources) -> int:
    """The number of runs that the cluster holds at a time."""
    if cluster.gpus >= 1 and experiment.gpus_per_worker != 0:
        gpus = experiment.max_workers * (experiment.gpus_per_worker or 1)
        return max(1, int(cluster.gpus // gpus))
    # Without GPUs: two cores per worker, one of them for its data.
    return max(1, int(cluster.cpus // (2 * experiment.max_workers)))


def placed(experiment: Experiment, cluster: Resources, at_once: int) -> Experiment:
    """The experiment with explicit resources, its share of the cluster, so that no run takes all.
    Raises ValueError that names the missing resources if not even one run fits."""
    share = replace(
        cluster,
        cpus=(cluster.cpus - TRIAL_CPUS * at_once) / at_once,
        gpus=cluster.gpus / at_once,
    )
    placement = place(experiment, share)
    return replace(
        experiment,
        cpus_per_worker=placement.cpus_per_worker,
        gpus_per_worker=placement.gpus_per_worker,
        data_cpus=int(placement.data_cpus * 100) / 100,
    )
