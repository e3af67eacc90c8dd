"""The folder that shards are written to: its state before a build, and the end of a build."""

import json
import os
import posixpath
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from selfray.check import require
from selfray.data.listing import Plan
from selfray.data.manifest import (
    BUILD_FOLDER,
    MANIFEST,
    PLAN,
    SHARD_NAME,
    Manifest,
    Shard,
    ShardRecord,
    manifest_of,
)
from selfray.storage import Location, one_line

QUARANTINE = "quarantine.jsonl"
DUPLICATES, PAIRS = "duplicates.jsonl", "duplicates.html"
"""Files in which `selfray shards dedup` names the images that it removed, and shows some."""

_OF_A_BUILD = re.compile(
    rf"(manifest\.json|quarantine\.jsonl|duplicates\.(jsonl|html)|{SHARD_NAME})(\.\d+\.tmp)?"
    rf"|{BUILD_FOLDER}"
)


@dataclass(frozen=True)
class State:
    """The content of a destination before a build: nothing, an unfinished or a complete build."""

    plan: dict[str, Any] | None = None
    manifest: Manifest | None = None
    damage: str = ""
    """Why the plan of an unfinished build cannot be used; its shards are then built again."""


def refuse_overlap(source: Location, destination: Location) -> None:
    if source.is_local and destination.is_local:
        outer, inner = os.path.realpath(source.path), os.path.realpath(destination.path)
    elif source.filesystem == destination.filesystem:
        outer, inner = source.path.rstrip("/"), destination.path.rstrip("/")
    else:
        return
    require(
        inner != outer and not inner.startswith(outer.rstrip("/") + "/"),
        f"the destination {destination} lies inside the source {source}: give one outside",
    )


def open_destination(destination: Location) -> State:
    """Read the state of a destination. Raises ValueError if it holds files of other origin."""
    try:
        names = [posixpath.basename(info.path) for info in destination.list()]
    except OSError as error:
        raise ValueError(
            f"the destination {destination} cannot be listed: {one_line(error)}; give a folder"
        ) from None
    if MANIFEST in names:
        manifest = Manifest.load(destination)
        return State(
            {"source": manifest.source, "options": manifest.options, **manifest.plan}, manifest
        )
    plan, damage = None, ""
    plan_file = destination / BUILD_FOLDER / PLAN
    if BUILD_FOLDER in names and plan_file.exists():
        try:
            plan = _plan_in(plan_file)
        except ValueError as error:
            damage = f"{plan_file} is not a plan ({one_line(error)}): building from the start"
    known = _OF_A_BUILD if plan or damage else re.compile(BUILD_FOLDER)
    foreign = [name for name in names if not known.fullmatch(name)]
    require(
        not foreign,
        f"the destination {destination} holds other files ({', '.join(foreign[:3])}"
        f"{', ...' if len(foreign) > 3 else ''}): give an empty or a new folder",
    )
    return State(plan, damage=damage)


def _plan_in(file: Location) -> dict[str, Any]:
    """The plan written by an unfinished build. Raises ValueError if the file is not a plan."""
    plan = file.read_strict_json()
    kinds = {"source": str, "options": dict, "files": int, "bytes": int, "fingerprint": str}
    found = plan if isinstance(plan, dict) else {}
    wrong = [name for name, kind in kinds.items() if not isinstance(found.get(name), kind)]
    require(not wrong, f"it lacks {', '.join(wrong)}")
    return found


def refuse_other_plan(destination: Location, state: State, plan: Plan) -> None:
    then, now = state.plan or {}, plan.identity()
    old, new = then["options"], now["options"]
    changes = [
        f"{name} was {old.get(name)}, now {new.get(name)}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if then["source"] != now["source"]:
        changes.insert(0, f"source was {then['source']}, now {now['source']}")
    elif not changes and then["fingerprint"] != now["fingerprint"]:
        changes.append(
            f"the source had {then['files']} files of {then['bytes']:,} bytes, "
            f"now {now['files']} of {now['bytes']:,}"
        )
        if (then["files"], then["bytes"]) == (now["files"], now["bytes"]):
            changes = ["files of the source have changed"]
    elif not changes and then.get("understood") != now.get("understood"):
        changes.append("its folders were understood differently: as classes, splits or neither")
    elif state.manifest is None and then.get("class_order") != now.get("class_order"):
        changes.append("classes that are numbers were in another order")
    what = "a complete" if state.manifest else "an unfinished"
    require(
        not changes,
        f"{destination} holds {what} build of something else ({'; '.join(changes)}): "
        f"give another destination, or delete {destination}",
    )


def start(destination: Location, plan: Plan) -> None:
    try:
        (destination / BUILD_FOLDER).make_folder()
        (destination / BUILD_FOLDER / PLAN).write_json(plan.identity())
    except OSError as error:
        raise ValueError(
            f"the destination {destination} cannot be written: {one_line(error)}; "
            "give a folder that you may write to"
        ) from None


def read_records(destination: Location) -> dict[int, ShardRecord]:
    names = [info.path for info in (destination / BUILD_FOLDER).list()]
    files = [
        destination / BUILD_FOLDER / posixpath.basename(name)
        for name in names
        if name.endswith(".parquet.json")
    ]
    with ThreadPoolExecutor(16) as pool:
        records = pool.map(_record_in, files)
        return {record.number: record for record in records if record is not None}


def _record_in(file: Location) -> ShardRecord | None:
    """A shard's record; None if it is damaged, so that the shard is built again."""
    try:
        record = ShardRecord.from_json(file.read_strict_json())
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return record if file.name == f"{record.name}.json" else None


_Stored = TypeVar("_Stored", Shard, ShardRecord)


def intact(destination: Location, shards: dict[int, _Stored]) -> dict[int, _Stored]:
    """The shards whose file exists in full size; `selfray shards check` verifies contents."""
    sizes = {posixpath.basename(info.path): info.size for info in destination.list()}
    return {
        number: shard
        for number, shard in shards.items()
        if shard.rows == 0 or sizes.get(shard.name) == shard.bytes
    }


def finish(
    destination: Location,
    plan: Plan,
    records: Sequence[ShardRecord],
    window: tuple[float, float] | None = None,
    amended: Callable[[Manifest], Manifest] = lambda manifest: manifest,
) -> Manifest:
    """Write the manifest, changed by `amended`, which ends the build."""
    quarantined = [*plan.quarantined, *(entry for r in records for entry in r.quarantined)]
    if not any(record.rows for record in records):
        (destination / BUILD_FOLDER).delete_folder()
        examples = "; ".join(f"{q.file}: {q.message}" for q in quarantined[:3])
        raise ValueError(
            f"{plan.source_uri} holds no readable image: all {len(quarantined)} files were refused "
            f"({examples}); give a folder that holds images"
        )
    manifest = amended(manifest_of(plan, records, quarantined, window))
    lines = "".join(json.dumps(entry._asdict()) + "\n" for entry in quarantined)
    (destination / QUARANTINE).write_bytes(lines.encode())
    delete_temporary_files(destination)
    (destination / MANIFEST).write_json(manifest.to_json())
    (destination / BUILD_FOLDER).delete_folder()
    return manifest


def delete_temporary_files(destination: Location) -> None:
    """Delete files left behind by killed tasks."""
    for info in destination.list():
        if info.path.endswith(".tmp"):
            destination.filesystem.delete_file(info.path)
