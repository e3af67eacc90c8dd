"""Reports the result of a sweep, as a table, a sentence and figures, on the console, in its folder
and in MLflow."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from selfray.cluster.mlflow_runs import read_runs
from selfray.cluster.sweep.plan import SweepPlan
from selfray.cluster.sweep.trial import Outcome
from selfray.cluster.tracking import Tracker
from selfray.console import Console
from selfray.metrics import PROBES
from selfray.report import sweep_charts
from selfray.report.page import write_page
from selfray.runs.folder import OUTCOMES
from selfray.runs.reading import trials
from selfray.storage import Location
from selfray.sweeps.question import (
    Score,
    answer,
    rank_correlation,
    ranked,
)
from selfray.sweeps.searches import SEARCHES


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep."""

    folder: str
    outcomes: list[Outcome]
    scores: list[Score]
    """Sorted, best first."""
    answer: str


def result_of(plan: SweepPlan, words: str, outcomes: Sequence[Outcome]) -> SweepResult:
    metric = plan.question.metric
    assert metric is not None
    scores = []
    for label in dict.fromkeys(outcome.label for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.label == label]
        whole = [o.final(metric) for o in mine if not o.failure and not o.stopped]
        stopped = [o.final(metric) for o in mine if o.stopped]
        scores.append(
            Score(
                label,
                tuple(v for v in whole if v is not None),
                tuple(o.failure for o in mine if o.failure),
                tuple(v for v in stopped if v is not None),
            )
        )
    scores = ranked(scores, metric)
    told = answer(words, scores, metric)
    if SEARCHES[plan.question.search].is_population:
        told = _population_answer(words, scores, metric)
    return SweepResult(plan.folder, list(outcomes), scores, told)


def _population_answer(words: str, scores: Sequence[Score], metric: str) -> str:
    measured = [score for score in scores if score.values]
    if not measured:
        return f"{words} No member finished, so there is no answer."
    best = measured[0]
    parts = f"in {best.label.count(',') + 1} equal parts of the run"
    told = (
        f"{words} The best of {len(scores)} members reached {PROBES[metric].name} "
        f"{PROBES[metric].shown(best.mean)} with {best.label}, {parts}"
    )
    if len(measured) > 1:
        margin = PROBES[metric].shown_difference(abs(best.mean - measured[1].mean))
        told += f", {margin} ahead of the next"
    return f"{told}. Members copy one another: only runs from new seeds show the noise."


def table(scores: Sequence[Score], metric: str) -> str:
    """The ranking as a markdown table."""
    lines = [f"| | {PROBES[metric].name} | spread over seeds | runs |", "|---|---|---|---|"]
    for score in scores:
        mean = PROBES[metric].shown(score.mean) if score.values else "-"
        spread = "-" if score.spread is None else PROBES[metric].shown_difference(score.spread)
        runs = f"{len(score.values)}"
        if score.stopped:
            at = PROBES[metric].shown(statistics.mean(score.stopped))
            runs += f", {len(score.stopped)} stopped at {at}"
        if score.failures:
            runs += f", {len(score.failures)} failed"
        lines.append(f"| {score.label} | {mean} | {spread} | {runs} |")
    return "\n".join(lines)


def agreement(outcomes: Sequence[Outcome], metric: str = "knn") -> str:
    """One line with the rank correlation of label-free figures with a probe, over finished runs;
    empty for few runs."""
    parts = []
    for name, probe in PROBES.items():
        if probe.is_accuracy:
            continue
        pairs = [(o.final(metric), o.final(name)) for o in outcomes if not o.stopped]
        known = [(k, probe.sign * v) for k, v in pairs if k is not None and v is not None]
        found = rank_correlation(*zip(*known, strict=True)) if known else None
        if found is not None:
            parts.append(f"{probe.name} {found:+.2f}")
    if not parts:
        return ""
    return f"rank correlation of label-free figures with {PROBES[metric].name}: {', '.join(parts)}"


def overhead(outcomes: Sequence[Outcome]) -> str:
    """One line with the time of a run and of its training; empty if none trained."""
    trained = [outcome for outcome in outcomes if outcome.training_seconds]
    if not trained:
        return ""
    whole = statistics.median(outcome.seconds for outcome in trained)
    training = statistics.median(outcome.training_seconds for outcome in trained)
    return f"a run took {whole:.0f} s, {training:.0f} s of it from first step to last (medians)"


def report(result: SweepResult, plan: SweepPlan, tracker: Tracker, console: Console) -> None:
    """Show the result of a sweep and store it."""
    question, base = plan.question, plan.base
    metric = question.metric
    assert metric is not None
    text = f"{table(result.scores, metric)}\n\n{result.answer}\n"
    for line in (agreement(result.outcomes), overhead(result.outcomes)):
        text += f"\n{line}\n" if line else ""
    console.say()
    console.say(text)
    folder = Location.of(result.folder)
    (folder / "table.md").write_bytes(text.encode())
    (folder / OUTCOMES).write_json({"outcomes": [asdict(o) for o in result.outcomes]})
    tracker.set_tags({"sweep.answer": result.answer})
    if folder.is_local:
        tracker.log_artifact(Path(folder.path) / "table.md")
    title = f"{question.name} of {base.name}"
    by_label = {score.label: score.values for score in result.scores if score.values}
    if by_label:
        # In the order of the tried values, which is best for an axis.
        asked_order = dict.fromkeys(outcome.label for outcome in result.outcomes)
        untrained = [o.untrained(metric) for o in result.outcomes]
        known = [value for value in untrained if value is not None]
        figure = sweep_charts.sweep(
            {label: by_label[label] for label in asked_order if label in by_label},
            PROBES[metric].name,
            sum(known) / len(known) if known else None,
            title,
            result.answer,
            PROBES[metric].is_accuracy,
        )
        tracker.log_picture(figure, "sweep.png")
        console.say(f"figure    {result.folder}/artifacts/sweep.png")
    curves = {(o.label, o.seed): _points(o, metric) for o in result.outcomes}
    curves = {name: points for name, points in curves.items() if points}
    if curves:
        judge = PROBES[metric]
        figure = sweep_charts.sweep_curves(curves, judge.name, title, judge.is_accuracy)
        tracker.log_picture(figure, "curves.png")
        console.say(f"curves    {result.folder}/artifacts/curves.png")
    # If the processes of all runs died, there is nothing to compare.
    if folder.is_local and trials(folder, ""):
        page = Path(folder.path) / "comparison.html"
        page.write_text(write_page(read_runs([result.folder], say=console.say), title))
        tracker.log_artifact(page)
        console.say(f"compare   {page}")
    console.say(tracker.describe())


def _points(outcome: Outcome, metric: str) -> list[tuple[float, float]]:
    return [(p["images_seen"], p[metric]) for p in outcome.probes if p[metric] is not None]
