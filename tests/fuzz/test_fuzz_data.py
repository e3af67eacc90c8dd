"""Seeded mutations of Parquet files, tars, manifests, records and checkpoints.

Whatever comes out is what was written, or a refusal with a reason: no traceback of another kind, no
crash. FUZZ_MUTATIONS says how many of each kind; the first mutations are always the same ones.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from test_data_layouts import images, picture

from selfray.data.data_sets import as_started, remember
from selfray.data.destination import open_destination, read_records, start
from selfray.data.listing import make_plan
from selfray.data.manifest import Manifest
from selfray.data.options import BuildOptions
from selfray.data.reader import read_chosen
from selfray.data.row_cache import RowGroupCache
from selfray.data.rows import Sample
from selfray.data.shard_set import open_shards
from selfray.data.tar import read_tar
from selfray.data.writer import write_arrays
from selfray.storage import Location

MUTATIONS = int(os.environ.get("FUZZ_MUTATIONS", "500"))
COUNT = 24


def mutated(content: bytes, kind: str) -> Iterator[bytes]:
    """Mutations of a file: bits flipped, bytes set, cut short, parts repeated, lost or zeroed."""
    for seed in range(MUTATIONS):
        rng = np.random.default_rng([seed, len(kind)])
        data = bytearray(content)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(len(data))) if data else 0
            end = min(len(data), at + int(rng.integers(1, 64)))
            match int(rng.integers(7)):
                case 0 | 1 if data:
                    data[at] ^= 1 << int(rng.integers(8))
                case 2 if data:
                    data[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
                case 3:
                    del data[at:]
                case 4:
                    data[at:at] = data[at:end]
                case 5:
                    del data[at:end]
                case _:
                    data[at:end] = bytes(end - at)
        yield bytes(data)


def test_parquet(tmp_path):
    written = [picture(i) for i in range(COUNT)]
    labels = [i % 4 for i in range(COUNT)]
    manifest = write_arrays(tmp_path / "sound", written, labels, label_names="abcd")
    content = (tmp_path / "sound" / manifest.shards[0].name).read_bytes()
    path = tmp_path / "x.parquet"
    reasons: list[str] = []
    damaged = 0
    for data in mutated(content, "parquet"):
        path.write_bytes(data)
        try:
            shards = open_shards([str(path)], str(path))
        except ValueError as error:
            reasons.append(str(error))
            continue
        rows = np.arange(min(COUNT, shards.rows))
        groups = np.searchsorted(np.cumsum(shards.group_rows), rows, side="right")
        first = np.concatenate([[0], np.cumsum(shards.group_rows)])[groups]
        chosen = read_chosen(shards, groups, rows - first, RowGroupCache(2**20))
        damaged += bool(chosen.unreadable)
        for row in set(rows.tolist()) - set(chosen.unreadable):
            # A footer has no checksum: one that is damaged may say anything of where things lie.
            assert chosen.images[row] in (written[row], b"") or shards.files[0].rows != COUNT
    assert all(str(path) in reason for reason in reasons)
    assert len(reasons) + damaged > MUTATIONS // 3


def test_tars(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for i in range(8):
            for suffix, data in (("png", picture(i)), ("cls", str(i % 3).encode())):
                info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    for data in mutated(file.getvalue(), "tar"):
        (tmp_path / "x.tar").write_bytes(data)
        for row in read_tar(Location.of(tmp_path), "x.tar"):
            row.name.encode() if isinstance(row, Sample) else f"{row.file} {row.message}".encode()


def refuses(action: Callable[[], object], *errors: type[Exception]) -> bool:
    said = None
    try:
        action()
    except errors as error:
        said = str(error)
    assert said is None or len(said.splitlines()) == 1
    return said is not None


def test_manifests(tmp_path):
    write_arrays(tmp_path, [picture(i) for i in range(4)], [0, 1, 0, 1])
    file = tmp_path / "manifest.json"
    content = file.read_bytes()
    refused = 0
    for data in mutated(content, "manifest"):
        file.write_bytes(data)
        refused += refuses(lambda: Manifest.load(tmp_path), ValueError)
    assert refused > MUTATIONS // 3


def test_records_of_a_build(tmp_path):
    source, out = Location.of(images(tmp_path / "source", "a", "b")), Location.of(tmp_path / "out")
    start(out, make_plan(source, BuildOptions()))
    plan = tmp_path / "out" / "_build" / "plan.json"
    content = plan.read_bytes()
    for data in mutated(content, "plan"):
        plan.write_bytes(data)
        state = open_destination(out)
        assert (state.plan is None) == bool(state.damage)
    record = tmp_path / "out" / "_build" / "shard-00000.parquet.json"
    value = {
        "number": 0, "name": "shard-00000.parquet", "rows": 2, "bytes": 9, "sha256": "ab",
        "row_groups": [2], "labels": {}, "widths": {"6": 2}, "heights": {"6": 2},
        "formats": {"PNG": 2}, "quarantined": [["a", "b", "c"]],
    }  # fmt: skip
    for data in mutated(json.dumps(value).encode(), "record"):
        record.write_bytes(data)
        for found in read_records(out).values():
            assert found.name == "shard-00000.parquet"


def test_records_of_a_start(tmp_path):
    write_arrays(tmp_path / "shards", [picture(i) for i in range(4)], [0, 1, 0, 1])
    path = tmp_path / "shards" / "shard-00000.parquet"
    shards = open_shards([str(path)], str(tmp_path / "shards"))
    run = Location.of(tmp_path)
    remember(shards, run)
    content = (tmp_path / "data.json").read_bytes()
    for data in mutated(content, "start"):
        (tmp_path / "data.json").write_bytes(data)
        said: list[str] = []
        refuses(lambda said=said: as_started(shards, run, said.append), ValueError)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    from helpers import MAE, experiment
    from helpers import start as started
    from selfray.runs import checkpoint

    wanted = experiment(MAE)
    state = started(wanted)
    for _ in range(2):
        checkpoint.save(state, wanted, Location.of(tmp_path), 1.0)
    return tmp_path


def test_checkpoints(run_folder):
    from selfray.runs import checkpoint

    files = [file for file in (run_folder / "checkpoints").rglob("*") if file.is_file()]
    assert files
    small = min(MUTATIONS, max(50, MUTATIONS // 10))
    for number, data_of in enumerate(files):
        content = data_of.read_bytes()
        for index, data in enumerate(mutated(content, data_of.name)):
            if index * len(files) >= small:
                break
            data_of.write_bytes(data)
            found = checkpoint.latest(Location.of(run_folder))
            # Whole, or not taken: what it holds is what was written.
            assert found is None or data == content or found.step == 0
        data_of.write_bytes(content)
        assert number < 20
    assert checkpoint.latest(Location.of(run_folder)) is not None
