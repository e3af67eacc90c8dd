"""Resolves what a user names (folders, sweeps, MLflow runs, experiments) to runs for a comparison,
and logs the comparison's page to MLflow."""

import logging
import os
import posixpath
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from selfray.check import require
from selfray.cluster.mlflow_store import asking_mlflow, named_store, tracking_uri
from selfray.metrics import RATE, SUMMARY, evaluation, is_end
from selfray.report.page import PAGE
from selfray.runs import reading
from selfray.runs.folder import RUN_RECORD
from selfray.runs.ranking import ComparedRun, Points, Scalar, Status, Tracked
from selfray.runs.reading import READERS, Named, judge_of, protocols_in, read_run, trials
from selfray.storage import Location, one_line, read_object

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)


MLRUNS = "mlruns:"
_MLFLOW_PAGE = 1000
_PARENT = "mlflow.parentRunId"
Say = Callable[[str], None]


def read_runs(
    references: Sequence[str], tracking: str | None = None, say: Say = log.info
) -> list[ComparedRun]:
    """All runs that the references name, each once, in order.

    Args:
        references: run folders, a sweep's folder, an output folder, mlruns:/RUN_ID (of a run or of
            a sweep), or names of MLflow experiments.
        tracking: the MLflow store of the last two; None takes MLFLOW_TRACKING_URI, else a SQLite
            file in ./runs.
        say: called with a line about each lookup that failed.

    Raises ValueError or OSError, in one line, for a reference that names no run. A run that cannot
    be read is part of the result, with the reason in its note.
    """
    named: dict[str, Named] = {}
    for reference in references:
        for one in _resolve(reference, tracking, say):
            key = one.folder.rstrip("/") or f"{one.label} {one.seed}"
            named[key] = one if key not in named else named[key].joined(one)
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda one: _read(one, tracking), named.values()))


def _resolve(reference: str, tracking: str | None, say: Say) -> list[Named]:
    require(reference.strip() != "", "the name of a run is empty: give a folder or MLflow run")
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


def _of_folder(folder: Location, tracking: str | None, say: Say) -> list[Named]:
    found = reading.find(folder)
    runs = [Named(run.uri) for run in found.runs]
    return runs + [one for sweep in found.sweeps for one in _of_sweep(sweep, tracking, say)]


def _of_sweep(sweep: Location, tracking: str | None, say: Say) -> list[Named]:
    record = read_object(sweep / RUN_RECORD)
    parent = str(record.get("run_id") or "")
    found = trials(sweep, parent)
    if parent and not reading.has_ended(sweep):
        # A running trial has no outcome file yet, but its MLflow run exists from its start.
        try:
            uri = named_store(record, tracking)
            with asking_mlflow(uri) as (client, _):
                under_way = _children(client, client.get_run(parent))
        except (OSError, ValueError) as error:
            say(f"the sweep has not ended, and running trials are not shown: {error}")
        else:
            found += under_way
    if not found:
        raise ValueError(f"no trial of the sweep {sweep} has ended, and MLflow knows of none")
    return found


def _of_mlflow_run(run_id: str, tracking: str | None) -> list[Named]:
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
        # The sweep's folder, if it can be read, also lists trials that never started.
        return [*(trials(Location.of(folder), run_id) if folder else []), *children]
    if folder is None:
        raise ValueError(
            f"MLflow run {run_id} has no tag run.folder and no children, so it is not a run of "
            "selfray: give the run's folder"
        )
    return [_of_known(run)]


def _children(client: "MlflowClient", parent: "Run") -> list[Named]:
    query = f"tags.`{_PARENT}` = '{parent.info.run_id}'"
    return [_of_known(run) for run in _search(client, parent.info.experiment_id, query)]


def _of_known(run: "Run") -> Named:
    tags = run.data.tags
    words = {
        name.removeprefix("sweep."): value
        for name, value in run.data.params.items()
        if name.startswith("sweep.")
    }
    return Named(
        tags.get("run.folder", ""),
        ", ".join(f"{axis} {value}" for axis, value in words.items()),
        parent=tags.get(_PARENT, ""),
        known=run,
    )


def _of_experiment(name: str, tracking: str | None, folder_is_there: bool) -> list[Named]:
    """The runs of an MLflow experiment; empty if a folder of that name exists and MLflow has no
    such experiment or does not answer."""
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
        raise ConnectionError(
            f"{name} is not a folder here, and as an MLflow experiment: {error}"
        ) from None
    found = []
    for run in runs:
        folder = run.data.tags.get("run.folder")
        # The run of a sweep itself, or one that only holds a page, is not compared.
        if folder is not None and "sweep.question" not in run.data.tags:
            found.append(_of_known(run))
    if not found:
        raise ValueError(f"the MLflow experiment {name} in {where} holds no run of selfray")
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


def _read(named: Named, tracking: str | None) -> ComparedRun:
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
    except Exception as error:
        # One damaged run must not hide the others, and foreign files may hold anything.
        log.exception("%s cannot be read", folder)
        note = f"not readable: {one_line(error)}"
        run = ComparedRun(folder.name, folder.uri, "unreadable", note=note)
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


def _without_folder(named: Named, tracking: str | None) -> ComparedRun:
    """What MLflow knows of a run whose folder cannot be read from here."""
    name = posixpath.basename(named.folder.rstrip("/"))
    if named.known is None:
        note = "its folder does not exist" + (f"; {named.failure}" if named.failure else "")
        return ComparedRun(name, named.folder, "unreadable", label=named.label, note=note)
    run = named.known
    tags, parameters = run.data.tags, run.data.params
    statuses: dict[str, Status] = {"FINISHED": "finished", "FAILED": "failed", "RUNNING": "running"}
    method = tags.get("method", "")
    curves: dict[str, Points] = {}
    with asking_mlflow(tracking_uri(Location.of("runs"), tracking)) as (client, _):
        for metric in run.data.metrics:
            if metric in SUMMARY or evaluation(metric) is not None or is_end(metric):
                history = client.get_metric_history(run.info.run_id, metric)
                curves[metric] = sorted({point.step: point.value for point in history}.items())
    rates = [value for _, value in curves.get(RATE, ())]
    notes = [tags.get("failure", ""), "its folder is not visible here: only MLflow's figures"]
    return ComparedRun(
        name=name,
        folder=named.folder,
        status=statuses.get(run.info.status, "interrupted"),
        method=method,
        judged_by=judge_of(f"selfray.methods.{method}:{parameters.get('method.type', '')}"),
        recipe=tags.get("recipe", ""),
        label=named.label,
        note="; ".join(note for note in notes if note),
        parameters={
            name: _parsed(value)
            for name, value in parameters.items()
            if not name.startswith("sweep.")
        },
        curves=curves,
        protocols=protocols_in(tags),
        images_per_second=statistics.median(rates) if rates else None,
        tracked=Tracked(run.info.run_id, parent=named.parent),
    )


def _parsed(text: str) -> Scalar:
    """A parameter with its type before MLflow converted it to text."""
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


def log_page(page: str, runs: Sequence[ComparedRun], tracking: str | None) -> str:
    """Log a page as an artifact, and return one line about the result.

    The page of one sweep's trials is logged to the sweep's run, that of a single run to this run.
    For any other selection there is no matching MLflow run, so the page remains only a file.
    """
    known = [run.tracked for run in runs if run.tracked is not None]
    if not known:
        return "not logged: no MLflow run belongs to these runs"
    try:
        (uri,) = {named_store({"tracking_uri": one.store}, tracking) for one in known}
        with asking_mlflow(uri) as (client, where):
            target = _target(client, known)
            if target is None:
                return "not logged: these runs do not form one sweep, so the page is only a file"
            client.log_text(target.info.run_id, page, PAGE)
    except Exception as error:  # each artifact store's client raises its own
        log.exception("the page was not logged")
        return f"not logged: {one_line(error)}"
    kind = "run" if len(known) == 1 else "sweep"
    return f"logged to MLflow ({where}) as {PAGE} of the {kind} {target.info.run_name}"


def _target(client: "MlflowClient", known: Sequence[Tracked]) -> "Run | None":
    """The MLflow run to which the page is logged; None if there is none."""
    if len(known) == 1:
        return client.get_run(known[0].run_id)
    parents = set()
    for tracked in known:
        tags = {} if tracked.parent else client.get_run(tracked.run_id).data.tags
        parents.add(tracked.parent or tags.get(_PARENT, ""))
        if len(parents) > 1 or "" in parents:
            return None
    return client.get_run(parents.pop())


def default_page(references: Sequence[str]) -> Location:
    """The page's path: in the compared folder if there is exactly one, else in the current
    folder."""
    if len(references) == 1 and not references[0].startswith(MLRUNS):
        folder = Location.of(references[0])
        if folder.is_folder():
            return folder / PAGE
    return Location.of(os.path.abspath(PAGE))
