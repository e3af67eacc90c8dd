"""Runs a population's generations one after the other on Tune."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from selfray.cluster.sweep.plan import SweepPlan, read_outcome
from selfray.cluster.sweep.trial import Outcome, failed
from selfray.cluster.sweep.tune import TaskSource, run_tasks
from selfray.data.plan import even_steps
from selfray.metrics import PROBES
from selfray.runs import checkpoint
from selfray.runs.folder import TRIALS
from selfray.storage import Location
from selfray.sweeps.population import Member, first_generation, next_generation

log = logging.getLogger(__name__)


def evolve(plan: SweepPlan, total_steps: int, at_once: int, say: Any) -> None:
    """Run a population to its end, or resume it where it stopped. Outcomes are written to the
    sweep's trials/, as for any other sweep."""
    question, folder = plan.question, plan.location
    ends = sorted(even_steps(total_steps, question.generations))
    if len(ends) < question.generations:
        raise ValueError(
            f"{question.generations} generations do not fit into {total_steps} steps: give more "
            "--epochs or fewer --generations"
        )
    members, generation, copied = _read(folder) or (first_generation(question), 0, [])
    while True:
        found = _run(plan, members, generation, ends[generation], at_once)
        scores = [_score(plan, outcome) for outcome in found]
        if generation == len(ends) - 1:
            break
        members = next_generation(question, members, scores)
        for number, member in enumerate(members):
            if member.copies is not None:
                copied.append([generation, number, member.copies])
                _copy_state(folder, member.copies, number, ends[generation])
                say(
                    f"after generation {generation + 1}, member {number} continues from member "
                    f"{member.copies}: {member.label(question)}"
                )
        generation += 1
        # Written last: after an interruption before this line, the same steps are repeated.
        (folder / "population.json").write_json(
            {
                "generation": generation,
                "members": [asdict(member) for member in members],
                "copied": copied,
            }
        )
    for number, outcome in enumerate(found):
        (folder / TRIALS / f"{number:04d}.json").write_json(asdict(outcome))


def _run(
    plan: SweepPlan, members: Sequence[Member], generation: int, until_step: int, at_once: int
) -> list[Outcome]:
    """Run one generation of all members, except those that already have an outcome."""
    files = [
        plan.location / "generations" / f"{generation}" / f"{number:04d}.json"
        for number in range(len(members))
    ]
    files[0].parent.make_folder()
    tasks = [
        plan.member_task(
            number,
            generation,
            member.label(plan.question),
            member.experiment(plan.base, plan.question),
            until_step,
        )
        for number, member in enumerate(members)
        if read_outcome(files[number]) is None
    ]
    if tasks:
        run_tasks(TaskSource(tasks), None, plan.location, at_once)
    return [
        read_outcome(file) or failed(member.label(plan.question), 0, "its process died")
        for file, member in zip(files, members, strict=True)
    ]


def _score(plan: SweepPlan, outcome: Outcome) -> float | None:
    """The score of an outcome, higher is better; None for a failed one."""
    metric = plan.question.metric
    assert metric is not None
    value = None if outcome.failure else outcome.final(metric)
    return None if value is None else PROBES[metric].sign * value


def _copy_state(folder: Location, source: int, target: int, step: int) -> None:
    """Replace a member's checkpoint of this step by another member's."""
    theirs, ours = (folder / "members" / f"member-{n:02d}" for n in (source, target))
    found = next(c for c in reversed(checkpoint.all_of(theirs)) if c.step == step)
    checkpoint.copy(found, ours)


def _read(folder: Location) -> tuple[list[Member], int, list[list[int]]] | None:
    """(members, current generation, [generation, target, source] of all copies so far); None before
    the first generation has ended."""
    try:
        record = (folder / "population.json").read_json()
    except FileNotFoundError:
        return None
    members = [Member(tuple(m["places"]), m["copies"]) for m in record["members"]]
    return members, record["generation"], record["copied"]
