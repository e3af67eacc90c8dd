"""From what a person names to runs side by side: folders, sweeps, MLflow runs and experiments.

Reads files and asks MLflow; needs no Ray, and torch only for a folder that tells not which probe
judges its method.
"""

import hashlib
import logging
import math
import os
import posixpath
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from selfray import config
from selfray.check import require
from selfray.cluster.mlflow_store import asking_mlflow, tracking_uri
from selfray.runs.comparison import PAGE, ComparedRun, Points, Scalar, Status, Tracked
from selfray.runs.folder import ARTIFACTS, RUN_FILE, RUN_RECORD, SHIPPED, SPOOL, is_training
from selfray.runs.spool import SpoolReader
from selfray.storage import Location

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

MLRUNS = "mlruns:"
CHECKPOINTS = "checkpoints"
TRIALS = "trials"
OUTCOMES = "outcomes.json"
"""Stands in the folder of a sweep that has ended."""
PICTURES = "pictures"
READERS = 16
"""Folders read at a time: an object store answers late, but many at once."""
_MLFLOW_PAGE = 1000
_FROM_MLFLOW = (
    "loss", "probe/knn", "probe/linear", "probe/rankme", "throughput/images_per_second",
)  # fmt: skip
"""The curves of a run whose folder is out of reach: each is a request."""
_PARENT = "mlflow.parentRunId"
_COMPARED = "selfray.compared"
"""Tag of an MLflow run that only holds a page: which runs are on it."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Named:
    """A run that is to be read."""

    folder: str
    """Empty for a trial that never began."""
    label: str = ""
    seed: int | None = None
    failure: str = ""
    """The cause that its sweep knows."""
    parent: str = ""
    """The sweep's MLflow run."""
    known: "Run | None" = None
    """MLflow's own record of it."""

    def joined(self, other: "_Named") -> "_Named":
        """The same run, named twice: what either knows."""
        mine = {name: value for name, value in vars(self).items() if value not in ("", None)}
        return _Named(**{**vars(other), **mine})


def read_runs(
    references: Sequence[str], tracking: str | None = None, say: Say = log.info
) -> list[ComparedRun]:
    """All runs that the references name, each once, in their order.

    Args:
        references: run folders, a sweep's folder, an output folder, mlruns:/RUN_ID (of a run or of
            a sweep), or names of MLflow experiments.
        tracking: the MLflow store of the last two; None takes MLFLOW_TRACKING_URI, else a SQLite
            file in ./runs.
        say: is told what could not be looked up.

    Raises ValueError or OSError, in one line, for a reference that names no run. A run that cannot
    be read is among the result and says so.
    """
    named: dict[str, _Named] = {}
    for reference in references:
        for one in _resolve(reference, tracking, say):
            key = one.folder.rstrip("/") or f"{one.label} {one.seed}"
            named[key] = one if key not in named else named[key].joined(one)
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda one: _read(one, tracking), named.values()))


# What a reference names --------------------------------------------------------------------------


def _resolve(reference: str, tracking: str | None, say: Say) -> list[_Named]:
    require(reference.strip() != "", "a run cannot be named by an empty word")
    if reference.startswith(MLRUNS):
        return _of_mlflow_run(reference.removeprefix(MLRUNS).strip("/"), tracking)
    folder = Location.of(reference)
    is_there = folder.is_folder()
    found = _of_folder(folder, tracking, say) if is_there else []
    if found:
        return found
    # An experiment's name looks like a relative path.
    if "/" not in reference:
        of_experiment = _of_experiment(reference, tracking, is_there)
        if of_experiment:
            return of_experiment
    if is_there:
        raise ValueError(
            f"{folder} holds no run: give a run's folder, a sweep's folder, or the output folder "
            "that holds runs"
        )
    raise FileNotFoundError(f"{folder} does not exist")


def _of_folder(folder: Location, tracking: str | None, say: Say) -> list[_Named]:
    """The runs in a folder: it is one, or a sweep's, or one of runs, or one of sweeps."""
    listed_here = folder.list()
    inside = {info.base_name for info in listed_here}
    if TRIALS in inside:
        return _of_sweep(folder, OUTCOMES in inside, tracking, say)
    if _is_run(inside):
        return [_Named(folder.uri)]
    children = [folder / info.base_name for info in listed_here if not info.is_file]
    with ThreadPoolExecutor(READERS) as pool:
        listed = pool.map(lambda child: {info.base_name for info in child.list()}, children)
        inner = dict(zip((child.uri for child in children), listed, strict=True))
    runs = [_Named(child.uri) for child in children if _is_run(inner[child.uri])]
    if runs:
        return runs
    sweeps = [child for child in children if TRIALS in inner[child.uri]]
    return [
        one
        for sweep in sweeps
        for one in _of_sweep(sweep, OUTCOMES in inner[sweep.uri], tracking, say)
    ]


def _is_run(inside: set[str]) -> bool:
    return RUN_FILE in inside or (CHECKPOINTS in inside and TRIALS not in inside)


def _of_sweep(sweep: Location, ended: bool, tracking: str | None, say: Say) -> list[_Named]:
    record = _read_json(sweep / RUN_RECORD)
    parent = str(record.get("run_id") or "")
    found = _trials(sweep, parent)
    if not ended and parent:
        # A trial under way has no file yet; its MLflow run is known from its start.
        try:
            uri = _store(record, tracking)
            with asking_mlflow(uri) as (client, _):
                under_way = _children(client, client.get_run(parent))
        except OSError as error:
            say(f"the sweep has not ended, and what is under way is not shown: {error}")
        else:
            found += under_way
    if not found:
        raise ValueError(f"no trial of the sweep {sweep} has ended, and MLflow knows of none")
    return found


def _trials(sweep: Location, parent: str) -> list[_Named]:
    """The trials that have an outcome in a sweep's folder; none where that is out of sight."""
    found = []
    for info in (sweep / TRIALS).list():
        outcome = _read_json(sweep / TRIALS / info.base_name)
        if "label" in outcome:
            found.append(
                _Named(
                    _where_now(outcome.get("run") or "", sweep),
                    str(outcome["label"]),
                    outcome.get("seed"),
                    str(outcome.get("failure") or ""),
                    parent,
                )
            )
    return found


def _where_now(run: str, sweep: Location) -> str:
    """A trial's folder; where that is gone, beside the sweep's, as if all had been moved."""
    if not run or Location.of(run).exists():
        return run
    output = posixpath.dirname(posixpath.dirname(sweep.uri.rstrip("/")))
    moved = posixpath.join(output, posixpath.basename(run.rstrip("/")))
    return moved if Location.of(moved).exists() else run


def _of_mlflow_run(run_id: str, tracking: str | None) -> list[_Named]:
    require(run_id != "", f"{MLRUNS}/RUN_ID needs the id of a run, as MLflow's page shows it")
    uri = tracking_uri(Location.of("runs"), tracking)
    with asking_mlflow(uri) as (client, where):
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise ValueError(
                f"there is no MLflow run {run_id} in {where}: name the store that has it with "
                "--tracking or MLFLOW_TRACKING_URI"
            ) from None
        children = _children(client, run)
    folder = run.data.tags.get("run.folder")
    if children:
        # The sweep's folder, where it is seen from here, knows of trials that never began, too.
        return [*(_trials(Location.of(folder), run_id) if folder else []), *children]
    if folder is None:
        raise ValueError(
            f"MLflow run {run_id} has no tag run.folder and no children, so it is no run of "
            "selfray's: give the run's folder"
        )
    return [_of_known(run)]


def _children(client: "MlflowClient", parent: "Run") -> list[_Named]:
    query = f"tags.`{_PARENT}` = '{parent.info.run_id}'"
    return [_of_known(run) for run in _search(client, parent.info.experiment_id, query)]


def _of_known(run: "Run") -> _Named:
    tags = run.data.tags
    words = {
        name.removeprefix("sweep."): value
        for name, value in run.data.params.items()
        if name.startswith("sweep.")
    }
    return _Named(
        tags.get("run.folder", ""),
        ", ".join(f"{axis} {value}" for axis, value in words.items()),
        parent=tags.get(_PARENT, ""),
        known=run,
    )


def _of_experiment(name: str, tracking: str | None, folder_is_there: bool) -> list[_Named]:
    """The runs of an MLflow experiment; none where a folder of that name is there and MLflow is
    not."""
    uri = tracking_uri(Location.of("runs"), tracking)
    try:
        with asking_mlflow(uri) as (client, where):
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                if folder_is_there:
                    return []
                raise ValueError(
                    f"{name} is neither a folder here nor an MLflow experiment in {where}: give "
                    "run folders, a sweep's folder, an output folder, mlruns:/RUN_ID, or name the "
                    "store with --tracking"
                )
            runs = list(_search(client, experiment.experiment_id, ""))
    except OSError as error:
        if folder_is_there:
            return []
        raise ConnectionError(f"{name} is no folder here, and as an experiment: {error}") from None
    found = []
    for run in runs:
        folder = run.data.tags.get("run.folder")
        # A sweep's own run is no run to compare, nor is one that only holds a page.
        if folder is not None and "sweep.question" not in run.data.tags:
            found.append(_of_known(run))
    if not found:
        raise ValueError(f"the MLflow experiment {name} in {where} holds no run of selfray's")
    return found


def _search(client: "MlflowClient", experiment_id: str, query: str) -> "Iterator[Run]":
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], query, max_results=_MLFLOW_PAGE, page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


# Reading a run -----------------------------------------------------------------------------------


def _read(named: _Named, tracking: str | None) -> ComparedRun:
    if not named.folder:
        name = named.label or "a run without a folder"
        if named.seed is not None:
            name += f", seed {named.seed}"
        return ComparedRun(name, "", "failed", note=named.failure)
    folder = Location.of(named.folder)
    try:
        if not folder.exists():
            return _without_folder(named, tracking)
        run = read_run(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # One damaged run must not hide the others. A file from elsewhere may hold anything.
        log.exception("%s cannot be read", folder)
        reason = " ".join(str(error).split()) or type(error).__name__
        run = ComparedRun(folder.name, folder.uri, "unreadable", note=f"not readable: {reason}")
    if named.failure and not run.note:
        run = replace(run, note=named.failure)
        if run.status != "finished":
            run = replace(run, status="failed")
    run = replace(run, label=named.label)
    if run.tracked is None and named.known is not None:
        run = replace(run, tracked=Tracked(named.known.info.run_id, parent=named.parent))
    elif run.tracked is not None and named.parent:
        run = replace(run, tracked=replace(run.tracked, parent=named.parent))
    return run


def read_run(folder: Location) -> ComparedRun:
    """What a run's folder tells. OSError or ValueError where it cannot be read."""
    record = _read_json(folder / RUN_FILE)
    experiment = record.get("experiment") or _experiment_of_checkpoint(folder)
    curves, protocols = _curves(folder)
    rates = [
        value for _, value in curves.get("throughput/images_per_second", ()) if math.isfinite(value)
    ]
    tracked = _read_json(folder / RUN_RECORD)
    kind = str(experiment.get("method", {}).get(config.TYPE_KEY, ""))
    return ComparedRun(
        name=record.get("name") or folder.name,
        folder=folder.uri,
        status=_status(folder, record),
        method=_method(kind),
        judged_by=record.get("judged_by") or _judge(kind),
        recipe=str(experiment.get("name", "")),
        note=str(record.get("failure") or ""),
        parameters={
            name: _scalar(value)
            for name, value in config.flatten(experiment).items()
            if value is not None
        },
        curves=curves,
        protocols=protocols,
        pictures=_pictures(folder),
        images_per_second=statistics.median(rates) if rates else None,
        tracked=Tracked(tracked["run_id"], tracked.get("tracking_uri", ""))
        if tracked.get("run_id")
        else None,
    )


def _status(folder: Location, record: dict[str, Any]) -> Status:
    if is_training(folder):
        killed = _read_json(folder / SHIPPED).get("status") == "KILLED"
        return "interrupted" if killed and not folder.is_local else "running"
    match record.get("status"):
        case "finished":
            return "finished"
        case "failed":
            return "failed"
        case _:
            return "interrupted"


def _experiment_of_checkpoint(folder: Location) -> dict[str, Any]:
    """The experiment of a folder that has no record; empty where it has no checkpoint either."""
    for info in reversed((folder / CHECKPOINTS).list()):
        found = _read_json(folder / CHECKPOINTS / info.base_name / "experiment.json")
        if found:
            return found
    return {}


def _curves(folder: Location) -> tuple[dict[str, Points], dict[str, str]]:
    """(metrics by name, probes' protocols by probe). A step that was repeated after a restart is
    one point: the last."""
    records, _ = SpoolReader(folder / SPOOL).read({})
    points: dict[str, dict[int, float]] = {}
    protocols: dict[str, str] = {}
    for record in records:
        match record:
            case {"kind": "metrics", "images_seen": int(seen), "values": dict(values)}:
                for name, value in values.items():
                    if isinstance(value, int | float):
                        points.setdefault(name, {})[seen] = float(value)
            case {"kind": "tags", "values": dict(values)}:
                protocols |= _protocols(values)
    return {name: sorted(found.items()) for name, found in points.items()}, protocols


def _protocols(tags: dict[str, str]) -> dict[str, str]:
    """{"probe.knn.protocol": "knn-v1 ..."} -> {"knn": "knn-v1 ..."}"""
    before, after = "probe.", ".protocol"
    return {
        name.removeprefix(before).removesuffix(after): str(text)
        for name, text in tags.items()
        if name.startswith(before) and name.endswith(after)
    }


def _pictures(folder: Location) -> dict[str, Location]:
    place = folder / ARTIFACTS / PICTURES
    return {
        posixpath.splitext(info.base_name)[0]: place / info.base_name
        for info in place.list()
        if info.is_file and info.base_name.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))
    }


def _method(kind: str) -> str:
    """ "selfray.methods.mae:MAEConfig" -> "mae", as MethodConfig.name."""
    return kind.partition(":")[0].rpartition(".")[2]


@cache
def _judge(kind: str) -> str:
    """The probe that judges a method, from its class: this imports torch. kNN where there is no
    such method here."""
    if not kind:
        return "knn"
    try:
        return getattr(config.config_type(kind), "judged_by", "knn")
    except ValueError:
        return "knn"


def _scalar(value: Any) -> Scalar:
    return value if isinstance(value, str | int | float | bool) else str(value)


def _read_json(file: Location) -> dict[str, Any]:
    """The object in a file; empty where there is none, or it is damaged."""
    try:
        value = file.read_json()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# A run that only MLflow knows --------------------------------------------------------------------


def _without_folder(named: _Named, tracking: str | None) -> ComparedRun:
    """What MLflow knows of a run whose folder is not seen from here."""
    name = posixpath.basename(named.folder.rstrip("/"))
    if named.known is None:
        note = "its folder is not there" + (f"; {named.failure}" if named.failure else "")
        return ComparedRun(name, named.folder, "unreadable", label=named.label, note=note)
    run = named.known
    tags, parameters = run.data.tags, run.data.params
    statuses: dict[str, Status] = {"FINISHED": "finished", "FAILED": "failed", "RUNNING": "running"}
    method = tags.get("method", "")
    curves: dict[str, Points] = {}
    with asking_mlflow(tracking_uri(Location.of("runs"), tracking)) as (client, _):
        for metric in _FROM_MLFLOW:
            if metric in run.data.metrics:
                history = client.get_metric_history(run.info.run_id, metric)
                curves[metric] = sorted({point.step: point.value for point in history}.items())
    rates = [value for _, value in curves.get("throughput/images_per_second", ())]
    notes = [tags.get("failure", ""), "its folder is not seen from here: MLflow's figures alone"]
    return ComparedRun(
        name=name,
        folder=named.folder,
        status=statuses.get(run.info.status, "interrupted"),
        method=method,
        judged_by=_judge(f"selfray.methods.{method}:{parameters.get('method.type', '')}"),
        recipe=tags.get("recipe", ""),
        label=named.label,
        note="; ".join(note for note in notes if note),
        parameters={
            name: _parsed(value)
            for name, value in parameters.items()
            if not name.startswith("sweep.")
        },
        curves=curves,
        protocols=_protocols(tags),
        images_per_second=statistics.median(rates) if rates else None,
        tracked=Tracked(run.info.run_id, parent=named.parent),
    )


def _parsed(text: str) -> Scalar:
    """A parameter as it was before MLflow made text of it."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if str(value) == text:
            return value
    return text


# The page in MLflow ------------------------------------------------------------------------------


def log_page(page: str, runs: Sequence[ComparedRun], tracking: str | None) -> str:
    """Log a page as an artifact, and say in one line what became of that.

    The trials of one sweep have it at the sweep's run, a single run at its own. Any other choice of
    runs gets an MLflow run of its own, named comparison, in their experiment; comparing the same
    runs again replaces the page there.
    """
    known = [run.tracked for run in runs if run.tracked is not None]
    if not known:
        return "not logged: no MLflow run belongs to these runs"
    # A password is not recorded; then the environment must name the store.
    recorded = {"tracking_uri": known[0].store}
    try:
        with asking_mlflow(_store(recorded, tracking)) as (client, where):
            target, what = _target(client, known)
            client.log_text(target, page, PAGE)
    except Exception as error:  # each artifact store's client raises its own
        log.exception("the page was not logged")
        return f"not logged: {' '.join(str(error).split()) or type(error).__name__}"
    return f"logged to MLflow ({where}) as {PAGE} of {what}"


def _store(record: dict[str, Any], tracking: str | None) -> str:
    """The store that a run's folder names, unless a person names one."""
    recorded = str(record.get("tracking_uri") or "")
    known = None if "***" in recorded else recorded or None
    return tracking_uri(Location.of("runs"), tracking or known)


def _target(client: "MlflowClient", known: Sequence[Tracked]) -> tuple[str, str]:
    """(id, description) of the MLflow run that is to have the page."""
    if len(known) == 1:
        run = client.get_run(known[0].run_id)
        return run.info.run_id, f"the run {run.info.run_name}"
    parents = set()
    for tracked in known:
        tags = {} if tracked.parent else client.get_run(tracked.run_id).data.tags
        parents.add(tracked.parent or tags.get(_PARENT, ""))
        if len(parents) > 1 or "" in parents:
            break
    if len(parents) == 1 and "" not in parents:
        run = client.get_run(parents.pop())
        return run.info.run_id, f"the sweep {run.info.run_name}"
    ids = sorted({tracked.run_id for tracked in known})
    key = hashlib.sha256(" ".join(ids).encode()).hexdigest()[:16]
    experiment = client.get_run(known[0].run_id).info.experiment_id
    found = client.search_runs([experiment], f"tags.`{_COMPARED}` = '{key}'", max_results=1)
    if found:
        return found[0].info.run_id, f"the run {found[0].info.run_name}"
    made = client.create_run(experiment, tags={_COMPARED: key}, run_name="comparison")
    client.set_terminated(made.info.run_id)
    return made.info.run_id, f"a run of its own, comparison of {len(ids):,} runs"


def default_page(references: Sequence[str]) -> Location:
    """Where the page goes: into the folder that is compared where it is one, else here."""
    if len(references) == 1 and not references[0].startswith(MLRUNS):
        folder = Location.of(references[0])
        if folder.is_folder():
            return folder / PAGE
    return Location.of(os.path.abspath(PAGE))
