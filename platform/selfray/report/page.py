"""A comparison of runs as one HTML file that needs no network.

web/page.html is filled with a table, for readers without scripts, with the charts' data as JSON and
with the scripts of web/, as one. It contains no external address.
"""

import base64
import html
import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from PIL import Image

from selfray import __version__
from selfray.metrics import ACCURACIES, HIGH, LOW, METRICS, Metric, evaluation, probe_name
from selfray.report import live_map
from selfray.runs.ranking import (
    ComparedRun,
    Differences,
    Points,
    Scalar,
    best,
    cautions,
    differences,
    featured,
    number,
    ranked,
    shown,
)
from selfray.storage import Location, one_line

MOST_POINTS = 150_000
"""Largest number of points of all curves on a page together: about 3 MB."""
POINTS_OF_A_CURVE = (40, 600)
"""Fewest and most points of one curve."""
LARGEST_PICTURE_PIXELS = 50_000_000
LARGEST_PICTURE_BYTES = 300_000
"""Larger pictures are compressed again."""
MOST_COLUMNS = 24
"""Largest number of runs in the table of parameters that differ."""
PAGE = "comparison.html"
SCRIPTS = ("base", "charts", "tables", "start")
"""Scripts in web/, in this order: each uses functions of the earlier ones."""
MARK = "<!-- made by selfray compare -->"
"""Contained in every page: a file with this mark may be overwritten."""
KINDS = ("embedding", "neighbours", "attention", "reconstructions", "tokens", "views", "curves")
"""The order of kinds of pictures that equally many runs have; other kinds follow."""


def write_page(runs: Sequence[ComparedRun], title: str, most_pictures: int = 12) -> str:
    """The comparison as one HTML file that needs no network.

    Args:
        runs: in any order; the page ranks them.
        title: shown above everything.
        most_pictures: the number of best runs whose pictures are embedded.
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
        "maps": live_map.aligned(_maps(runs, with_pictures)),
        "metrics": {
            name: asdict(metric) for name, metric in (METRICS | _evaluations(runs)).items()
        },
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
    files = resources.files("selfray.report").joinpath("web")
    parts = [files.joinpath(f"{name}.js").read_text("utf-8") for name in SCRIPTS]
    values["SCRIPT"] = "\n".join(['"use strict";', "(() => {", *parts, "})();", ""])
    template = files.joinpath("page.html").read_text("utf-8")
    # In one pass, so that a run named {{DATA}} is not replaced.
    page = re.sub(r"\{\{([A-Z]+)\}\}", lambda match: values[match[1]], template)
    # A file's name may hold a lone surrogate, which UTF-8 cannot encode.
    return page.encode("utf-8", "backslashreplace").decode()


def as_script(value: Any) -> str:
    """JSON that is safe inside a <script> element: it cannot end the element or open a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _evaluations(runs: Sequence[ComparedRun]) -> dict[str, Metric]:
    """Name -> metric of the figures that `selfray evaluate` logged for any of the runs."""
    names = sorted({name for run in runs for name in run.curves})
    return {name: metric for name in names if (metric := evaluation(name)) is not None}


def _summary(runs: Sequence[ComparedRun]) -> str:
    counts = Counter(run.status for run in runs)
    states = ", ".join(f"{count:,} {status}" for status, count in counts.items())
    text = f"{len(runs):,} run{'s' if len(runs) != 1 else ''} ({states})."
    if len(runs) > 1:
        leaders = [
            f"{run.title}, {probe_name(run.judged_by)} {run.score:.1%}" for run in best(runs)
        ]
        text += f" Best: {'; '.join(leaders)}." if leaders else " None was probed."
    if len(runs) == 1:
        text += " There is nothing to compare it with."
    return text


def _maps(runs: Sequence[ComparedRun], chosen: Sequence[int]) -> dict[int, dict[str, Any]]:
    found = {}
    for index in chosen:
        pictures = runs[index].pictures.get("embedding")
        one = None if pictures is None else live_map.read(pictures.parent)
        if one is not None:
            found[index] = one
    return found


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
    """[x values, y values], which is shorter than a list of pairs; non-finite values become
    null."""
    return [[seen for seen, _ in points], [_finite(value) for _, value in points]]


def _finite(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def _thinned(runs: Sequence[ComparedRun]) -> list[dict[str, Points]]:
    """The curves, thinned so that a browser can open a page of many runs."""
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
    for place in range(stretches):
        start, end = (len(inner) * n // stretches for n in (place, place + 1))
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
    return _cell(number(value, form), value, kind)


def _with_interval(run: ComparedRun, name: str) -> str:
    """A cell with a share, and with its 95 % interval in points, as `selfray evaluate` prints
    them."""
    value, low, high = (run.last(name + end) for end in ("", LOW, HIGH))
    if value is None or low is None or high is None:
        return _figure(value, ".1%")
    interval = f"<small>[{100 * low:.1f}, {100 * high:.1f}]</small>"
    return f'<td data-sort="{value}" class=number>{number(value, ".1%")}{interval}</td>'


def _parameter(value: Scalar | None, is_number: bool) -> str:
    return _cell(shown(value), value, "number" if is_number else "")


def _is_numeric(values: Sequence[Scalar | None]) -> bool:
    kinds = {type(value) for value in values if value is not None}
    return bool(kinds) and kinds <= {int, float}


_FACTS = (
    ("encoder", "", "encoder.name"),
    ("epochs", "", "epochs"),
    ("duration", "h:mm:ss", ""),
    ("started", "UTC", ""),
    ("MLflow", "the run's page on its tracking server", ""),
)
"""(head, hint, parameter) of the general columns of a run."""


def _fact(run: ComparedRun, name: str, parameter: str) -> str:
    if parameter:
        value = run.parameters.get(parameter)
        return _parameter(value, isinstance(value, int | float))
    if name == "duration":
        return _cell("-" if run.seconds is None else _clock(run.seconds), run.seconds, "number")
    if name == "started":
        if run.started is None:
            return _cell("-")
        moment = datetime.fromtimestamp(run.started, UTC)
        return _cell(f"{moment:%Y-%m-%d %H:%M}", f"{moment:%Y-%m-%dT%H:%M:%S}")
    address = run.tracked and run.tracked.page
    if not address:
        return _cell("-" if run.tracked is None else run.tracked.run_id[:12])
    link = html.escape(address, quote=True)
    return f'<td><a href="{link}" rel="noreferrer noopener" target=_blank>open</a></td>'


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _html_table(runs: Sequence[ComparedRun], found: Differences) -> str:
    mixed = len({run.recipe for run in runs}) > 1
    heads = [("#", ""), ("run", "")]
    heads += [("recipe", "")] if mixed else []
    heads += [("status", "")]
    for name in map(probe_name, ACCURACIES):
        heads.append((name, f"accuracy of the {name} probe at the end, in %"))
    evaluated = _evaluations(runs)
    heads += [(metric.name, f"{metric.title}, in %") for metric in evaluated.values()]
    heads += [
        ("gain", "points of the judging probe above the untrained encoder"),
        ("RankMe", "effective rank of the features, label-free"),
        ("images", "images seen"),
        ("images/s", "images trained in a second, median"),
    ]
    varied = list(found.varied.items())
    # Varied parameters have their own columns.
    facts = [fact for fact in _FACTS if fact[2] not in found.varied]
    heads += [(name, "") for name in found.varied]
    heads += [(name, hint) for name, hint, _ in facts]
    head = "".join(
        f'<th scope=col aria-sort=none><button type=button title="{html.escape(hint, quote=True)}">'
        f"{html.escape(name)}</button></th>"
        for name, hint in heads
    )
    rows = []
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
        for probe in ACCURACIES:
            judges = " judges" if probe == run.judged_by and run.score is not None else ""
            cells.append(_figure(run.last(f"probe/{probe}"), ".1%", f"number{judges}"))
        cells += [_with_interval(run, name) for name in evaluated]
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
        cells += [_fact(run, name, parameter) for name, _, parameter in facts]
        rows.append(f"<tr data-run={index}>{''.join(cells)}</tr>")
    return f"<table id=ranking><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _html_parameters(runs: Sequence[ComparedRun], found: Differences) -> str:
    """A table with one row for each parameter that differs and one column for each of the best
    runs."""
    everything = {**found.varied, **found.of_recipes}
    columns = sorted(featured(runs)[:MOST_COLUMNS])
    if not everything:
        told = (
            "The runs have the same settings, except for where and how they were carried out "
            "(workers, output and the like)."
        )
        return f"<p>{told}</p>" if len(runs) > 1 else ""
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
        f"<p class=hint>Of the best {len(columns)} runs; the table of runs shows varied parameters "
        "of all.</p>"
        if len(columns) < len(runs)
        else ""
    )
    return (
        f"{limit}<div class=scroll tabindex=0 role=region aria-label='parameters that differ'>"
        "<table id=parameters><thead><tr><th scope=col>parameter</th>"
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _html_pictures(runs: Sequence[ComparedRun], chosen: Sequence[int]) -> str:
    if not chosen:
        return "<p>None of these runs has pictures: they are made at the end of a run.</p>"
    having = sum(bool(run.pictures) for run in runs)
    counts = Counter(kind for index in chosen for kind in runs[index].pictures)

    def place(kind: str) -> tuple[int, int, str]:
        # Kinds that most runs have come first.
        return -counts[kind], KINDS.index(kind) if kind in KINDS else len(KINDS), kind

    ordered = sorted(counts, key=place)
    options = "".join(
        f'<option value="{html.escape(kind, quote=True)}">{html.escape(kind)}</option>'
        for kind in ordered
    )
    limit = (
        f" Shown for the best {len(chosen)} of {having} runs with pictures; --pictures changes it."
        if having > len(chosen)
        else ""
    )
    figures = []
    for index in chosen:
        run = runs[index]
        for kind in ordered:
            caption = f"{index + 1}. {run.title}"
            if run.score is not None:
                caption += f": {probe_name(run.judged_by)} {run.score:.1%}"
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
    """An <img> element with the image's bytes inside; for an unreadable file, a sentence
    instead."""
    try:
        kind, data = _packed(file.read_bytes())
    except Exception as error:  # Pillow's readers raise many types for bad files
        told = f"{file} cannot be read: {one_line(error)}"
        return f"<p class=missing>{html.escape(told)}</p>"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img src="{source}" alt="{html.escape(alternative, quote=True)}">'


def _packed(data: bytes) -> tuple[str, bytes]:
    """(format, bytes) of a picture in any format that Pillow reads; large ones are compressed.
    Raises OSError for other files and ValueError for too many pixels."""
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > LARGEST_PICTURE_PIXELS:
            raise ValueError(f"it has {image.width:,} x {image.height:,} pixels")
        kind = (image.format or "").lower()
        if kind in ("png", "jpeg", "webp") and len(data) <= LARGEST_PICTURE_BYTES:
            image.verify()
            return kind, data
        smaller = io.BytesIO()
        image.convert("RGB").save(smaller, "WEBP", quality=85)
        return "webp", smaller.getvalue()
