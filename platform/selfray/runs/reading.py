"""Reads the folder of a run in any state. No Ray, no MLflow; torch only if a folder does not say
which probe ranks its method."""

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
)
from selfray.runs.ranking import ComparedRun, Points, Scalar, Status, Tracked
from selfray.runs.spool import SpoolReader
from selfray.storage import Location, read_object

READERS = 16
"""Folders read at a time: object stores are slow per request, but serve many in parallel."""


@dataclass(frozen=True)
class Named:
    """A run to be read."""

    folder: str
    """Empty for a trial that never started."""
    label: str = ""
    seed: int | None = None
    failure: str = ""
    """The cause of failure recorded by its sweep."""
    parent: str = ""
    """The sweep's MLflow run."""
    known: Any = None
    """MLflow's own record of it."""

    def joined(self, other: "Named") -> "Named":
        """Merge two names of the same run; this one takes precedence."""
        mine = {name: value for name, value in vars(self).items() if value not in ("", None)}
        return Named(**{**vars(other), **mine})


@dataclass(frozen=True)
class Found:
    """The content of a folder: one run, one sweep, several runs or several sweeps."""

    runs: tuple[Location, ...] = ()
    sweeps: tuple[Location, ...] = ()


def find(folder: Location) -> Found:
    """The runs in a folder or, if there are none, the sweeps."""
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
    """The trials with an outcome in a sweep's folder; empty if the folder does not exist."""
    found = []
    for info in (sweep / TRIALS).list():
        outcome = read_object(sweep / TRIALS / info.base_name)
        run, seed = outcome.get("run"), outcome.get("seed")
        if "label" in outcome:
            found.append(
                Named(
                    _present_folder(run if isinstance(run, str) else "", sweep),
                    _text(outcome["label"]),
                    seed if isinstance(seed, int) else None,
                    _text(outcome.get("failure")),
                    parent,
                )
            )
    return found


def _present_folder(run: str, sweep: Location) -> str:
    """A trial's folder; if it is gone, the one beside the sweep's folder, in case both were
    moved."""
    if not run or Location.of(run).exists():
        return run
    output = posixpath.dirname(posixpath.dirname(sweep.uri.rstrip("/")))
    moved = posixpath.join(output, posixpath.basename(run.rstrip("/")))
    return moved if Location.of(moved).exists() else run


def read_run(folder: Location) -> ComparedRun:
    """Read a run's folder. Files that are damaged or not as selfray writes them count as absent and
    are mentioned in the note. Raises OSError if the folder cannot be read."""
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
        pictures=pictures_of(folder),
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
    """(content of run.json, faults of it)."""
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
    """A value from a file as text, with credentials hidden; the file may hold any type there."""
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
    """The experiment from a checkpoint, for a folder without run.json; empty without
    checkpoints."""
    for info in reversed((folder / CHECKPOINTS).list()):
        found = read_object(folder / CHECKPOINTS / info.base_name / "experiment.json")
        if found:
            return found
    return {}


def _curves(folder: Location) -> tuple[dict[str, Points], dict[str, str], int, list[float]]:
    """(curves by metric, protocols by probe, number of damaged lines, times of records in seconds).
    Of a step that was repeated after a restart, only the last point counts."""
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
    # At most the year 2984, so that datetime can represent it.
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


def pictures_of(folder: Location) -> dict[str, Location]:
    """Name -> file of each picture in a run's folder."""
    place = folder / ARTIFACTS / PICTURES
    return {
        posixpath.splitext(info.base_name)[0]: place / info.base_name
        for info in place.list()
        if info.is_file
        and info.base_name != "thumbnails.png"  # the sheet of live_map.py
        and info.base_name.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))
    }


def _method(kind: str) -> str:
    """ "selfray.methods.mae:MAEConfig" -> "mae", as MethodConfig.name."""
    return kind.partition(":")[0].rpartition(".")[2]


@cache
def judge_of(kind: str) -> str:
    """The probe that ranks a method, from its class; imports torch. kNN for an unknown method."""
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
