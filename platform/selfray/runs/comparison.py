"""Runs side by side: which is best, in what they differ, and a page to look at. Pure; no Ray, no
MLflow, no torch.

The page is comparison.html, a file without any address in it, filled with a table for readers
without scripts and with the data of the charts as JSON.
"""

import base64
import html
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal, get_args

from PIL import Image

from selfray import __version__
from selfray.storage import Location

Scalar = str | int | float | bool
Points = Sequence[tuple[int, float]]
"""(images seen, value) pairs of one curve, in the order of images seen."""
Status = Literal["finished", "running", "interrupted", "failed", "unreadable"]

PROBES = {"knn": "kNN", "linear": "linear"}
PLACEMENT = (
    "workers", "gpus_per_worker", "cpus_per_worker", "data_cpus", "output", "max_failures",
    "log_every", "guard", "worker_resources", "compile", "shard",
)  # fmt: skip
"""Experiment.PLACEMENT, whose import would bring torch: where and how a run is carried out."""
_NOT_COMPARED = (*PLACEMENT, "name", "type", "checkpoint")
_OF_THE_LOSS = (
    "method", "data.path", "data.mean", "data.std", "batch_size", "encoder.image_size",
    "encoder.patch_size",
)  # fmt: skip
"""What decides which quantity a loss is. The batch is part of it: it holds the negatives."""
_OF_THE_PROBES = ("data.path", "data.test_path", "probe.train_limit", "probe.test_limit")

MOST_POINTS = 150_000
"""Of all curves of a page together: about 3 MB."""
POINTS_OF_A_CURVE = (40, 600)
"""Fewest and most."""
LARGEST_PICTURE_BYTES = 300_000
"""A larger one is packed anew."""
MOST_COLUMNS = 24
"""Runs in the table of all parameters that differ."""
PAGE = "comparison.html"
MARK = "<!-- made by selfray compare -->"
"""Stands in every page: such a file may be written over."""


@dataclass(frozen=True)
class Tracked:
    """The MLflow run of a run."""

    run_id: str
    store: str = ""
    """The tracking URI as it was recorded, without its password."""
    parent: str = ""
    """The run of the sweep that it is a trial of, where that is known."""


@dataclass(frozen=True)
class ComparedRun:
    """What is known of one run, whatever became of it."""

    name: str
    folder: str
    """Where it lies; empty where it was never begun."""
    status: Status
    method: str = ""
    judged_by: str = "knn"
    """The probe that judges its method: knn or linear."""
    recipe: str = ""
    label: str = ""
    """Its part of a sweep in the sweep's words; empty outside one."""
    note: str = ""
    """The cause of a failure, or what of it could not be read."""
    parameters: Mapping[str, Scalar] = field(default_factory=dict)
    """The experiment by dotted names, without those that are None."""
    curves: Mapping[str, Points] = field(default_factory=dict)
    """By the metric's name."""
    protocols: Mapping[str, str] = field(default_factory=dict)
    """The probes' protocols by the probe's name."""
    pictures: Mapping[str, Location] = field(default_factory=dict)
    """Files by their names without suffix, such as "reconstructions"."""
    images_per_second: float | None = None
    """The median over the run."""
    tracked: Tracked | None = None

    @property
    def title(self) -> str:
        """What a person calls it: a sweep's label says more than a folder's name."""
        if not self.label:
            return self.name
        seed = self.parameters.get("seed")
        return self.label if seed is None else f"{self.label}, seed {seed}"

    @property
    def score(self) -> float | None:
        """The last figure of the probe that judges its method."""
        return self.last(f"probe/{self.judged_by}")

    @property
    def images_seen(self) -> int | None:
        ends = [points[-1][0] for points in self.curves.values() if points]
        return max(ends, default=None)

    def last(self, metric: str) -> float | None:
        """The last value of a metric; that of an untrained encoder does not count."""
        points = [(seen, value) for seen, value in self.curves.get(metric, ()) if seen > 0]
        return points[-1][1] if points and math.isfinite(points[-1][1]) else None

    def untrained(self, metric: str) -> float | None:
        points = self.curves.get(metric, ())
        return points[0][1] if points and points[0][0] == 0 else None


@dataclass(frozen=True)
class Differences:
    """In what runs differ. Each parameter's values stand in the runs' order, None where it is
    absent."""

    varied: dict[str, list[Scalar | None]]
    """What was chosen: differs between runs of one recipe."""
    of_recipes: dict[str, list[Scalar | None]]
    """Differs only because the recipes do."""


def ranked(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The best first, by the probe that judges each one's method; those without a probe last.

    An accuracy by kNN says nothing beside one by the linear probe, so where both judge, the runs of
    each stand together, those of the more frequent one first.
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
    """The indices of ranked runs, the best of each judging probe in turn: the order in which
    pictures and colours are given out."""
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault("" if run.score is None else run.judged_by, []).append(index)
    unprobed = groups.pop("", [])
    turns = itertools.zip_longest(*groups.values())
    return [index for turn in turns for index in turn if index is not None] + unprobed


def best(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The best by each probe that judges some."""
    first: dict[str, ComparedRun] = {}
    for run in ranked(runs):
        if run.score is not None:
            first.setdefault(run.judged_by, run)
    return list(first.values())


def differences(runs: Sequence[ComparedRun]) -> Differences:
    """The parameters that are not the same in all runs, but for placement."""
    known = [run for run in runs if run.parameters]  # a trial that never began differs in nothing
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
        target = varied if chosen else of_recipes
        target[name] = [run.parameters.get(name) for run in runs]
    return Differences(varied, of_recipes)


def cautions(runs: Sequence[ComparedRun]) -> dict[str, str]:
    """What must not be compared, in a sentence each: under `loss` and under `probes`."""
    told = {}
    different = _differing(runs, _OF_THE_LOSS)
    if different:
        told["loss"] = (
            f"The losses of these runs do not compare, since {_listed(different)} differ"
            f"{'s' if len(different) == 1 else ''}: a lower one is not a better one."
        )
    different = _differing(runs, _OF_THE_PROBES)
    for probe, name in PROBES.items():
        if len({run.protocols[probe] for run in runs if probe in run.protocols}) > 1:
            different.append(f"the protocol of the {name} probe")
    if different:
        told["probes"] = (
            f"The probes of these runs do not compare, since {_listed(different)} differ"
            f"{'s' if len(different) == 1 else ''}: the order of the table is no verdict. "
            "`selfray probe RUN --data PATH` judges them on the same images."
        )
    judges: dict[str, set[str]] = {}
    for run in runs:
        if run.score is not None:
            judges.setdefault(run.judged_by, set()).add(run.method)
    if len(judges) > 1:
        told["judges"] = (
            "Ranked apart: "
            + "; ".join(
                f"{PROBES.get(probe, probe)} judges {_listed(sorted(methods))}"
                for probe, methods in sorted(judges.items())
            )
            + ". A figure of the one probe says nothing beside a figure of the other."
        )
    return told


def _differing(runs: Sequence[ComparedRun], prefixes: tuple[str, ...]) -> list[str]:
    """Which of these parameters differ; the method alone where that does."""
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
    """A value as MLflow keeps it, so that a run's file and MLflow's copy of it are equal."""
    return "" if value is None else str(value)


# The table ---------------------------------------------------------------------------------------

MOST_LINES = 40


def table(runs: Sequence[ComparedRun]) -> list[str]:
    """The ranking for a terminal; `runs` in their order."""
    varied = differences(runs).varied
    mixed = len({run.recipe for run in runs}) > 1
    columns: list[tuple[str, str, list[str]]] = [
        ("", ">", [str(number) for number, _ in enumerate(runs, 1)]),
        ("run", "<", [run.title for run in runs]),
    ]
    if mixed:
        columns.append(("recipe", "<", [run.recipe or "-" for run in runs]))
    columns.append(("status", "<", [run.status for run in runs]))
    for probe, name in PROBES.items():
        cells = []
        for run in runs:
            mark = "*" if run.judged_by == probe and run.score is not None else " "
            cells.append(f"{_percent(run.last(f'probe/{probe}'))}{mark}")
        columns.append((f"{name} ", ">", cells))
    columns += [
        ("RankMe", ">", [_number(run.last("probe/rankme"), ".1f") for run in runs]),
        ("images", ">", [_number(run.images_seen, ",") for run in runs]),
        ("images/s", ">", [_number(run.images_per_second, ",.0f") for run in runs]),
    ]
    for name, values in varied.items():
        if name == "seed" and all(run.label for run in runs):
            continue  # the title has it
        columns.append((name, ">", [shown(value) for value in values]))
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
    """A parameter's value for a person."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def as_json(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """The table for another program: accuracies in 0..1, the best run first."""
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


# The page ----------------------------------------------------------------------------------------


def write_page(runs: Sequence[ComparedRun], title: str, most_pictures: int = 12) -> str:
    """The comparison as one HTML file that needs no network.

    Args:
        runs: in any order; the page ranks them.
        title: shown above everything.
        most_pictures: pictures are embedded of that many of the best runs.
    """
    runs = ranked(runs)
    order = featured(runs)
    with_pictures = sorted([index for index in order if runs[index].pictures][:most_pictures])
    found = differences(runs)
    told = cautions(runs)
    data = {
        "runs": [
            _chart_data(run, points) for run, points in zip(runs, _thinned(runs), strict=True)
        ],
        "featured": order,
        "varied": found.varied,
        "loss": told.get("loss", ""),
    }
    values = {
        "MARK": MARK,
        "TITLE": html.escape(title),
        "SUMMARY": html.escape(_summary(runs)),
        "CAUTIONS": "".join(
            f"<p class=caution>{html.escape(told[name])}</p>"
            for name in ("probes", "judges")
            if name in told
        ),
        "TABLE": _html_table(runs, found),
        "PARAMETERS": _html_parameters(runs, found),
        "PICTURES": _html_pictures(runs, with_pictures),
        "DATA": as_script(data),
        "VERSION": html.escape(__version__),
    }
    template = resources.files("selfray.report").joinpath("page.html").read_text("utf-8")
    # In one pass: a run that is called {{DATA}} stays what it is.
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: values[match[1]], template)


def as_script(value: Any) -> str:
    """JSON that may stand inside a <script>: nothing in it ends the element or opens a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _summary(runs: Sequence[ComparedRun]) -> str:
    counts = Counter(run.status for run in runs)
    states = ", ".join(f"{count:,} {status}" for status, count in counts.items())
    text = f"{len(runs):,} run{'s' if len(runs) != 1 else ''} ({states})."
    if len(runs) > 1:
        leaders = [
            f"{run.title}, {PROBES.get(run.judged_by, run.judged_by)} {run.score:.1%}"
            for run in best(runs)
        ]
        text += f" Best: {'; '.join(leaders)}." if leaders else " None was probed."
    if len(runs) == 1:
        text += " There is nothing to compare it with."
    return text


def _chart_data(run: ComparedRun, curves: Mapping[str, Points]) -> dict[str, Any]:
    return {
        "title": run.title,
        "name": run.name,
        "status": run.status,
        "score": _finite(run.score),
        "judge": run.judged_by,
        "curves": {name: _pairs(points) for name, points in curves.items()},
        "parameters": {name: run.parameters[name] for name in sorted(run.parameters)},
    }


def _pairs(points: Points) -> list[list[float | None]]:
    """Two lists, which are shorter than many pairs; what is not finite is a gap."""
    return [[seen for seen, _ in points], [_finite(value) for _, value in points]]


def _finite(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def _thinned(runs: Sequence[ComparedRun]) -> list[dict[str, Points]]:
    """The curves with so few points that a page of many runs can be opened."""
    curves = sum(len(run.curves) for run in runs)
    fewest, most = POINTS_OF_A_CURVE
    limit = max(fewest, min(most, MOST_POINTS // max(1, curves)))
    return [{name: thinned(points, limit) for name, points in run.curves.items()} for run in runs]


def thinned(points: Points, limit: int) -> Points:
    """At most `limit` points of a curve that keep its outline: the lowest and the highest of each
    stretch, and both ends."""
    if len(points) <= limit:
        return points
    inner = points[1:-1]
    stretches = max(1, (limit - 2) // 2)
    kept = [points[0]]
    for number in range(stretches):
        start, end = (len(inner) * n // stretches for n in (number, number + 1))
        stretch = inner[start:end]
        ends = {
            min(stretch, key=lambda point: _order(point[1])),
            max(stretch, key=lambda point: _order(point[1])),
        }
        kept += sorted(ends)
    return [*kept, points[-1]]


def _order(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _cell(text: str, value: float | str | None = None, kind: str = "") -> str:
    sort = "" if value is None else f' data-sort="{html.escape(str(value), quote=True)}"'
    css = f' class="{kind}"' if kind else ""
    return f"<td{css}{sort}>{html.escape(text)}</td>"


def _figure(value: float | None, form: str, kind: str = "number") -> str:
    return _cell(_number(value, form), value, kind)


def _parameter(value: Scalar | None, is_number: bool) -> str:
    return _cell(shown(value), value, "number" if is_number else "")


def _is_numeric(values: Sequence[Scalar | None]) -> bool:
    kinds = {type(value) for value in values if value is not None}
    return bool(kinds) and kinds <= {int, float}


def _html_table(runs: Sequence[ComparedRun], found: Differences) -> str:
    mixed = len({run.recipe for run in runs}) > 1
    heads = [("#", ""), ("run", "")]
    heads += [("recipe", "")] if mixed else []
    heads += [("status", "")]
    for name in PROBES.values():
        heads.append((name, f"accuracy of the {name} probe at the end, in %"))
    heads += [
        ("gain", "points of the judging probe above the untrained encoder"),
        ("RankMe", "effective rank of the features, label-free"),
        ("images", "images seen"),
        ("images/s", "images trained in a second, median"),
    ]
    heads += [(name, "") for name in found.varied]
    head = "".join(
        f'<th scope=col aria-sort=none><button type=button title="{html.escape(hint, quote=True)}">'
        f"{html.escape(name)}</button></th>"
        for name, hint in heads
    )
    rows = []
    varied = list(found.varied.items())
    numeric = {name for name, values in varied if _is_numeric(values)}
    for index, run in enumerate(runs):
        cells = [_cell(str(index + 1), index + 1, "number")]
        detail = f"{run.name}\n{run.folder}" + (f"\n{run.note}" if run.note else "")
        cells.append(
            f"<th scope=row><button type=button class=pick data-run={index} aria-pressed=false "
            f'title="{html.escape(detail, quote=True)}"><i class=swatch></i>'
            f"{html.escape(run.title)}</button></th>"
        )
        cells += [_cell(run.recipe or "-")] if mixed else []
        note = f"<small>{html.escape(run.note)}</small>" if run.note else ""
        cells.append(f'<td class="status {run.status}">{html.escape(run.status)}{note}</td>')
        for probe in PROBES:
            judges = " judges" if probe == run.judged_by and run.score is not None else ""
            cells.append(_figure(run.last(f"probe/{probe}"), ".1%", f"number{judges}"))
        judged = f"probe/{run.judged_by}"
        now, before = run.score, run.untrained(judged)
        gain = None if now is None or before is None else 100 * (now - before)
        cells += [
            _figure(gain, "+.1f"),
            _figure(run.last("probe/rankme"), ".1f"),
            _figure(run.images_seen, ","),
            _figure(run.images_per_second, ",.0f"),
        ]
        cells += [_parameter(values[index], name in numeric) for name, values in varied]
        rows.append(f"<tr data-run={index}>{''.join(cells)}</tr>")
    return f"<table id=ranking><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _html_parameters(runs: Sequence[ComparedRun], found: Differences) -> str:
    """Every parameter that differs, a line each; a column for each of the best runs."""
    everything = {**found.varied, **found.of_recipes}
    columns = sorted(featured(runs)[:MOST_COLUMNS])
    if not everything:
        return "<p>The runs differ in no parameter.</p>" if len(runs) > 1 else ""
    head = "".join(
        f'<th scope=col data-run={index} title="{html.escape(run.title, quote=True)}">'
        f"{html.escape(str(index + 1))}</th>"
        for index, run in ((index, runs[index]) for index in columns)
    )
    rows = []
    for name, values in everything.items():
        kind = "" if name in found.varied else " class=of-recipe"
        cells = "".join(
            f"<td data-run={index}>{html.escape(shown(values[index]))}</td>" for index in columns
        )
        rows.append(f"<tr{kind}><th scope=row>{html.escape(name)}</th>{cells}</tr>")
    limit = (
        f"<p class=hint>Of the best {len(columns)} runs; the table of the runs has what was varied "
        "for all.</p>"
        if len(columns) < len(runs)
        else ""
    )
    return (
        f"{limit}<div class=scroll tabindex=0 role=region aria-label='parameters that differ'>"
        "<table id=parameters><thead><tr><th scope=col>parameter</th>"
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


KINDS = ("embedding", "neighbours", "attention", "reconstructions", "tokens", "views", "curves")
"""The order in which kinds of pictures are offered where as many runs have them; others follow."""


def _html_pictures(runs: Sequence[ComparedRun], chosen: Sequence[int]) -> str:
    if not chosen:
        return "<p>None of these runs has pictures: they are made at the end of a run.</p>"
    having = sum(bool(run.pictures) for run in runs)
    counts = Counter(kind for index in chosen for kind in runs[index].pictures)

    def place(kind: str) -> tuple[int, int, str]:
        # What most runs have is shown first.
        return -counts[kind], KINDS.index(kind) if kind in KINDS else len(KINDS), kind

    ordered = sorted(counts, key=place)
    options = "".join(
        f'<option value="{html.escape(kind, quote=True)}">{html.escape(kind)}</option>'
        for kind in ordered
    )
    limit = (
        f" Shown of the best {len(chosen)} of {having} runs that have some; --pictures changes it."
        if having > len(chosen)
        else ""
    )
    figures = []
    for index in chosen:
        run = runs[index]
        for kind in ordered:
            caption = f"{index + 1}. {run.title}"
            if run.score is not None:
                caption += f": {PROBES.get(run.judged_by, run.judged_by)} {run.score:.1%}"
            body = f"<p class=missing>this run has no picture {html.escape(kind)}</p>"
            if kind in run.pictures:
                body = _picture(run.pictures[kind], f"{kind} of {run.title}")
            figures.append(
                f'<figure data-kind="{html.escape(kind, quote=True)}" data-run={index}>'
                f"<figcaption>{html.escape(caption)}</figcaption>{body}</figure>"
            )
    return (
        f"<p><label>picture <select id=kind>{options}</select></label>{html.escape(limit)}</p>"
        f"<div class=pictures>{''.join(figures)}</div>"
    )


def _picture(file: Location, alternative: str) -> str:
    """An image with its bytes in it. One that cannot be read is said, not raised."""
    try:
        kind, data = _packed(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        return f"<p class=missing>{html.escape(f'{file} cannot be read: {reason}')}</p>"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img src="{source}" alt="{html.escape(alternative, quote=True)}">'


def _packed(data: bytes) -> tuple[str, bytes]:
    """(format, bytes) of a picture of any format that Pillow reads, made small where it is large.
    OSError where it is no picture."""
    with Image.open(io.BytesIO(data)) as image:
        kind = (image.format or "").lower()
        if kind in ("png", "jpeg", "webp") and len(data) <= LARGEST_PICTURE_BYTES:
            image.verify()
            return kind, data
        smaller = io.BytesIO()
        image.convert("RGB").save(smaller, "WEBP", quality=85)
        return "webp", smaller.getvalue()
