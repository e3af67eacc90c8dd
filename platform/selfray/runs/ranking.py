"""Compares runs: which is best, and how they differ. Pure; no Ray, no MLflow, no torch."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from selfray.config import PLACEMENT
from selfray.console import printable
from selfray.masking import HIDDEN
from selfray.metrics import ACCURACIES, probe_name
from selfray.storage import Location

Scalar = str | int | float | bool
Points = Sequence[tuple[int, float]]
"""(images seen, value) pairs of one curve, in the order of images seen."""
Status = Literal["finished", "running", "interrupted", "failed", "unreadable"]
_NOT_COMPARED = (*PLACEMENT, "name", "type", "checkpoint")
_OF_THE_LOSS = (
    "method", "data.path", "data.mean", "data.std", "batch_size", "encoder.image_size",
    "encoder.patch_size",
)  # fmt: skip
"""Parameters that define a loss: losses compare only if these are equal. The batch size is one of
them, because the batch holds the negatives."""
_OF_THE_PROBES = ("data.path", "data.test_path", "probe.train_limit", "probe.test_limit")
MOST_LINES = 40


def run_page(server: str, experiment_id: str, run_id: str) -> str:
    """The address of a run's page. Without workflowType, MLflow shows it as a language-model
    run."""
    page = f"#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
    return f"{server.rstrip('/')}/{page}"


@dataclass(frozen=True)
class Tracked:
    """The MLflow run that belongs to a run."""

    run_id: str
    store: str = ""
    """The recorded tracking URI, without password."""
    parent: str = ""
    """The MLflow run of its sweep, if it is a trial and the sweep is known."""
    experiment_id: str = ""

    @property
    def page(self) -> str | None:
        """The address of the run's page; None without a tracking server."""
        if not re.fullmatch(r"https?://[^\s\"'<>]+", self.store) or not self.experiment_id:
            return None
        server = self.store.replace(f"{HIDDEN}@", "").rstrip("/")
        return run_page(server, self.experiment_id, self.run_id)


@dataclass(frozen=True)
class ComparedRun:
    """Everything known about one run, also if it failed or is damaged."""

    name: str
    folder: str
    """Its folder; empty for a run that never started."""
    status: Status
    method: str = ""
    judged_by: str = "knn"
    """The probe by which its method is ranked: knn or linear."""
    recipe: str = ""
    label: str = ""
    """The values that its sweep tried in it; empty outside of sweeps."""
    note: str = ""
    """The cause of a failure, or what could not be read."""
    parameters: Mapping[str, Scalar] = field(default_factory=dict)
    """The experiment by dotted names, without fields that are None."""
    curves: Mapping[str, Points] = field(default_factory=dict)
    """Curves by metric name."""
    protocols: Mapping[str, str] = field(default_factory=dict)
    """Protocols by probe name."""
    pictures: Mapping[str, Location] = field(default_factory=dict)
    """Files by name without suffix, such as "reconstructions"."""
    images_per_second: float | None = None
    """The median over the run."""
    given: frozenset[str] = frozenset()
    """The parameters set by flag or file, which differ from the recipe's."""
    started: float | None = None
    """Time of its first record, in seconds since the epoch."""
    seconds: float | None = None
    """The recorded duration, or the time from its first record to its last."""
    tracked: Tracked | None = None

    @property
    def title(self) -> str:
        """The name shown to a person: a sweep's label says more than a folder's name."""
        if not self.label:
            return self.name
        seed = self.parameters.get("seed")
        return self.label if seed is None else f"{self.label}, seed {seed}"

    @property
    def score(self) -> float | None:
        """The last value of the probe by which its method is ranked."""
        return self.last(f"probe/{self.judged_by}")

    @property
    def images_seen(self) -> int | None:
        ends = [points[-1][0] for points in self.curves.values() if points]
        return max(ends, default=None)

    def last(self, metric: str) -> float | None:
        """The last finite value of a metric; the untrained encoder's does not count."""
        points = [(seen, value) for seen, value in self.curves.get(metric, ()) if seen > 0]
        return points[-1][1] if points and math.isfinite(points[-1][1]) else None

    def untrained(self, metric: str) -> float | None:
        points = self.curves.get(metric, ())
        return points[0][1] if points and points[0][0] == 0 else None


@dataclass(frozen=True)
class Differences:
    """The parameters that differ between runs, each with its values in the order of the runs; None
    if a run lacks it."""

    varied: dict[str, list[Scalar | None]]
    """Parameters that were set by a flag or differ between runs of one recipe."""
    of_recipes: dict[str, list[Scalar | None]]
    """Parameters that differ only because the recipes differ."""


def ranked(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """Sort runs, best first, by the probe that ranks each method; runs without a probe come last.

    kNN and linear accuracies are not comparable. If both rank some runs, those of the more frequent
    probe come first, then those of the other.
    """
    statuses = get_args(Status)
    counts = Counter(run.judged_by for run in runs if run.score is not None)

    def place(run: ComparedRun) -> tuple[bool, int, str, float, int, str]:
        if run.score is None:
            return True, 0, "", 0.0, statuses.index(run.status), run.title
        judge = run.judged_by
        return False, -counts[judge], judge, -run.score, statuses.index(run.status), run.title

    return sorted(runs, key=place)


def featured(runs: Sequence[ComparedRun]) -> list[int]:
    """The indices of ranked runs, alternating between the best of each judging probe: the order in
    which pictures and colours are assigned."""
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault("" if run.score is None else run.judged_by, []).append(index)
    unprobed = groups.pop("", [])
    turns = itertools.zip_longest(*groups.values())
    return [index for turn in turns for index in turn if index is not None] + unprobed


def best(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The best run of each judging probe."""
    first: dict[str, ComparedRun] = {}
    for run in ranked(runs):
        if run.score is not None:
            first.setdefault(run.judged_by, run)
    return list(first.values())


def differences(runs: Sequence[ComparedRun]) -> Differences:
    """The parameters that differ between runs, except for placement."""
    known = [run for run in runs if run.parameters]  # a trial that never started has none
    names = sorted({name for run in known for name in run.parameters})
    varied, of_recipes = {}, {}
    for name in names:
        if _starts(name, _NOT_COMPARED):
            continue
        if len({_text(run.parameters.get(name)) for run in known}) < 2:
            continue
        by_recipe: dict[str, set[str]] = {}
        for run in known:
            by_recipe.setdefault(run.recipe, set()).add(_text(run.parameters.get(name)))
        chosen = any(len(values) > 1 for values in by_recipe.values())
        chosen |= any(name in run.given for run in known)
        target = varied if chosen else of_recipes
        target[name] = [run.parameters.get(name) for run in runs]
    return Differences(varied, of_recipes)


def cautions(runs: Sequence[ComparedRun]) -> dict[str, str]:
    """Warnings about values that are not comparable, by the keys `loss`, `probes` and `judges`."""
    told = {}
    different = _differing(runs, _OF_THE_LOSS)
    if different:
        told["loss"] = (
            f"The losses of these runs are not comparable, since {_listed(different)} differ"
            f"{'s' if len(different) == 1 else ''}: a lower loss is not a better one."
        )
    different = _differing(runs, _OF_THE_PROBES)
    for probe in ACCURACIES:
        if len({run.protocols[probe] for run in runs if probe in run.protocols}) > 1:
            different.append(f"the protocol of the {probe_name(probe)} probe")
    if different:
        told["probes"] = (
            f"The probes of these runs are not comparable, since {_listed(different)} differ"
            f"{'s' if len(different) == 1 else ''}: the order of the table is not a ranking. "
            "`selfray probe RUN --data PATH` judges them on the same images."
        )
    judges: dict[str, set[str]] = {}
    for run in runs:
        if run.score is not None:
            judges.setdefault(run.judged_by, set()).add(run.method)
    if len(judges) > 1:
        told["judges"] = (
            "Ranked separately: "
            + "; ".join(
                f"{probe_name(probe)} ranks {_listed(sorted(methods))}"
                for probe, methods in sorted(judges.items())
            )
            + ". Figures of different probes are not comparable."
        )
    return told


def _differing(runs: Sequence[ComparedRun], prefixes: tuple[str, ...]) -> list[str]:
    """The names of these parameters that differ; only "the method" if the methods differ."""
    known = [run for run in runs if run.parameters]
    if len({run.method for run in known}) > 1 and "method" in prefixes:
        return ["the method"]
    return [
        name
        for name in sorted({name for run in known for name in run.parameters})
        if _starts(name, prefixes) and len({_text(run.parameters.get(name)) for run in known}) > 1
    ]


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = list(names[:most])
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _starts(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _text(value: Scalar | None) -> str:
    """A value as MLflow stores it, so that a run's file and MLflow's copy compare as equal."""
    return "" if value is None else str(value)


def table(runs: Sequence[ComparedRun]) -> list[str]:
    """The lines of a table for a terminal; `runs` in the given order."""
    varied = differences(runs).varied
    mixed = len({run.recipe for run in runs}) > 1
    # Cells are escaped before their widths are taken.
    columns: list[tuple[str, str, list[str]]] = [
        ("", ">", [str(number) for number, _ in enumerate(runs, 1)]),
        ("run", "<", [run.title for run in runs]),
    ]
    if mixed:
        columns.append(("recipe", "<", [run.recipe or "-" for run in runs]))
    columns.append(("status", "<", [run.status for run in runs]))
    for probe in ACCURACIES:
        cells = []
        for run in runs:
            mark = "*" if run.judged_by == probe and run.score is not None else " "
            cells.append(f"{_percent(run.last(f'probe/{probe}'))}{mark}")
        columns.append((f"{probe_name(probe)} ", ">", cells))
    columns += [
        ("RankMe", ">", [number(run.last("probe/rankme"), ".1f") for run in runs]),
        ("images", ">", [number(run.images_seen, ",") for run in runs]),
        ("images/s", ">", [number(run.images_per_second, ",.0f") for run in runs]),
    ]
    for name, values in varied.items():
        if name == "seed" and all(run.label for run in runs):
            continue  # the title has it
        columns.append((name, ">", [shown(value) for value in values]))
    columns = [
        (printable(head, ""), side, [printable(cell, "") for cell in cells])
        for head, side, cells in columns
    ]
    widths = [max(len(head), *map(len, cells)) for head, _, cells in columns]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            f"{cell:{side}{width}}"
            for cell, (_, side, _), width in zip(cells, columns, widths, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    lines = [line([head for head, _, _ in columns])]
    lines += [line(cells) for cells in zip(*(cells for _, _, cells in columns), strict=True)]
    if len(runs) > MOST_LINES:
        lines[MOST_LINES + 1 :] = [f"... and {len(runs) - MOST_LINES} more"]
    return lines


def shown(value: Scalar | None) -> str:
    """A parameter's value as text for a person."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def as_json(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """The table as JSON for other programs: accuracies in 0..1, runs in the given order."""
    found = differences(runs)
    return {
        "cautions": cautions(runs),
        "varied": list(found.varied),
        "of_recipes": list(found.of_recipes),
        "runs": [
            {
                "name": run.name,
                "title": run.title,
                "folder": run.folder,
                "status": run.status,
                "note": run.note,
                "method": run.method,
                "recipe": run.recipe,
                "judged_by": run.judged_by,
                "score": run.score,
                "images_seen": run.images_seen,
                "images_per_second": run.images_per_second,
                "mlflow_run": run.tracked and run.tracked.run_id,
                "metrics": {name: run.last(name) for name in sorted(run.curves)},
                "parameters": dict(run.parameters),
            }
            for run in runs
        ],
    }
