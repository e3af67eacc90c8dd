"""A run's folder, whatever became of the run -> what can be told of it. No Ray, no MLflow; torch
only where a folder does not tell which probe judges its method."""

import math
import posixpath
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

from selfray import config
from selfray.masking import masked
from selfray.metrics import ACCURACIES, RATE
from selfray.runs.folder import (
    ARTIFACTS,
    CHECKPOINTS,
    OUTCOMES,
    PICTURES,
    RUN_FILE,
    RUN_RECORD,
    SHIPPED,
    SPOOL,
    TRIALS,
    is_training,
    read_object,
)
from selfray.runs.ranking import ComparedRun, Points, Scalar, Status, Tracked
from selfray.runs.spool import SpoolReader
from selfray.storage import Location

READERS = 16
"""Folders read at a time: an object store answers late, but many at once."""


@dataclass(frozen=True)
class Named:
    """A run that is to be read."""

    folder: str
    """Empty for a trial that never began."""
    label: str = ""
    seed: int | None = None
    failure: str = ""
    """The cause that its sweep knows."""
    parent: str = ""
    """The sweep's MLflow run."""
    known: Any = None
    """MLflow's own record of it."""

    def joined(self, other: "Named") -> "Named":
        """The same run, named twice: what either knows."""
        mine = {name: value for name, value in vars(self).items() if value not in ("", None)}
        return Named(**{**vars(other), **mine})


@dataclass(frozen=True)
class Found:
    """What a folder holds: it is a run's, or a sweep's, or one of runs, or one of sweeps."""

    runs: tuple[Location, ...] = ()
    sweeps: tuple[Location, ...] = ()


def find(folder: Location) -> Found:
    """The runs in a folder, or, where there are none, the sweeps."""
    listed_here = folder.list()
    inside = {info.base_name for info in listed_here}
    if TRIALS in inside:
        return Found(sweeps=(folder,))
    if _is_run(inside):
        return Found(runs=(folder,))
    children = [folder / info.base_name for info in listed_here if not info.is_file]
    with ThreadPoolExecutor(READERS) as pool:
        listed = pool.map(lambda child: {info.base_name for info in child.list()}, children)
        inner = dict(zip((child.uri for child in children), listed, strict=True))
    runs = tuple(child for child in children if _is_run(inner[child.uri]))
    sweeps = tuple(child for child in children if TRIALS in inner[child.uri])
    return Found(runs, () if runs else sweeps)


def _is_run(inside: set[str]) -> bool:
    return RUN_FILE in inside or (CHECKPOINTS in inside and TRIALS not in inside)


def has_ended(sweep: Location) -> bool:
    return (sweep / OUTCOMES).exists()


def trials(sweep: Location, parent: str) -> list[Named]:
    """The trials that have an outcome in a sweep's folder; none where that is out of sight."""
    found = []
    for info in (sweep / TRIALS).list():
        outcome = read_object(sweep / TRIALS / info.base_name)
        run, seed = outcome.get("run"), outcome.get("seed")
        if "label" in outcome:
            found.append(
                Named(
                    _where_now(run if isinstance(run, str) else "", sweep),
                    _text(outcome["label"]),
                    seed if isinstance(seed, int) else None,
                    _text(outcome.get("failure")),
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


def read_run(folder: Location) -> ComparedRun:
    """What a run's folder tells. OSError where it cannot be read. What is damaged in it, or has
    another shape than selfray writes, counts as absent and is said in the note."""
    record, damaged = _record_of(folder)
    experiment = _object(record.get("experiment")) or _experiment_of_checkpoint(folder)
    curves, protocols, corrupt, times = _curves(folder)
    damaged += [f"{corrupt:,} damaged lines of its {SPOOL} are left out"] if corrupt else []
    rates = [value for _, value in curves.get(RATE, ()) if math.isfinite(value)]
    tracked = read_object(folder / RUN_RECORD)
    kind = str(_object(experiment.get("method")).get(config.TYPE_KEY, ""))
    judge = record.get("judged_by")
    run_id = tracked.get("run_id")
    notes = [_text(record.get("failure")), *damaged]
    return ComparedRun(
        name=_text(record.get("name")) or folder.name,
        folder=str(folder),
        status=_status(folder, record),
        method=_method(kind),
        judged_by=judge if judge in ACCURACIES else judge_of(kind),
        recipe=_text(experiment.get("name")),
        note="; ".join(note for note in notes if note),
        parameters={
            name: _scalar(value)
            for name, value in config.flatten(experiment).items()
            if value is not None
        },
        curves=curves,
        protocols=protocols,
        pictures=_pictures(folder),
        images_per_second=statistics.median(rates) if rates else None,
        given=frozenset(name for name in _list(record.get("given")) if isinstance(name, str)),
        started=times[0] if times else None,
        seconds=_seconds(record, times),
        tracked=Tracked(
            run_id,
            _text(tracked.get("tracking_uri")),
            experiment_id=_text(tracked.get("experiment_id")),
        )
        if isinstance(run_id, str) and run_id
        else None,
    )


def _record_of(folder: Location) -> tuple[dict[str, Any], list[str]]:
    """(run.json, what is wrong with it)."""
    record = read_object(folder / RUN_FILE)
    if not record and (folder / RUN_FILE).exists():
        return {}, [f"its {RUN_FILE} is damaged"]
    if not isinstance(record.get("experiment", {}), dict):
        return record, [f"its {RUN_FILE} holds no experiment"]
    return record, []


def _seconds(record: dict[str, Any], times: Sequence[float]) -> float | None:
    told = _object(record.get("result")).get("seconds")
    if isinstance(told, int | float) and math.isfinite(told) and told >= 0:
        return float(told)
    return times[-1] - times[0] if len(times) > 1 else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    """A text of a file that may hold anything there."""
    return "" if value is None else masked(str(value))


def _status(folder: Location, record: dict[str, Any]) -> Status:
    if is_training(folder):
        killed = read_object(folder / SHIPPED).get("status") == "KILLED"
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
        found = read_object(folder / CHECKPOINTS / info.base_name / "experiment.json")
        if found:
            return found
    return {}


def _curves(folder: Location) -> tuple[dict[str, Points], dict[str, str], int, list[float]]:
    """(metrics by name, probes' protocols by probe, damaged lines, the records' times in s). A
    step that was repeated after a restart is one point: the last."""
    reader = SpoolReader(folder / SPOOL)
    records, _ = reader.read({})
    points: dict[str, dict[int, float]] = {}
    protocols: dict[str, str] = {}
    for record in records:
        match record:
            case {"kind": "metrics", "images_seen": int(seen), "values": dict(values)}:
                for name, value in values.items():
                    if isinstance(value, int | float):
                        points.setdefault(name, {})[seen] = float(value)
            case {"kind": "tags", "values": dict(values)}:
                protocols |= protocols_in(values)
    curves: dict[str, Points] = {name: sorted(found.items()) for name, found in points.items()}
    # A thousand years: what a date can be made of.
    times = [record["time"] / 1000 for record in records if 0 <= record["time"] < 32e12]
    return curves, protocols, reader.corrupt, times


def protocols_in(tags: dict[str, str]) -> dict[str, str]:
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
        if info.is_file
        and info.base_name != "thumbnails.png"  # the sheet that live_map.py cuts
        and info.base_name.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))
    }


def _method(kind: str) -> str:
    """ "selfray.methods.mae:MAEConfig" -> "mae", as MethodConfig.name."""
    return kind.partition(":")[0].rpartition(".")[2]


@cache
def judge_of(kind: str) -> str:
    """The probe that judges a method, from its class: this imports torch. kNN where there is no
    such method here."""
    if not kind:
        return "knn"
    try:
        return getattr(config.config_type(kind), "judged_by", "knn")
    except ValueError:
        return "knn"


def _scalar(value: Any) -> Scalar:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    return _text(value)
