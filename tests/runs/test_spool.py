"""The spool loses nothing that a disk or a store took, and never troubles the caller."""

import json
import math
import resource
import threading
import time
from pathlib import Path

import pytest
from pyarrow import fs

from helpers import wait_for
from selfray.runs.spool import SpoolReader, SpoolWriter
from selfray.storage import Location


def store(folder: Path) -> Location:
    """A folder behaving like an object store's: whole files only, nothing is appended."""
    folder.mkdir(parents=True, exist_ok=True)
    return Location(
        fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem()), "spool", "test://spool"
    )


def losses(records: list[dict]) -> list[float]:
    return [record["values"]["loss"] for record in records if record["kind"] == "metrics"]


def test_what_is_written_is_read_once_and_in_order(tmp_path: Path) -> None:
    folder = Location.of(tmp_path / "spool")
    writer = SpoolWriter(folder, "train-0")
    reader = SpoolReader(folder)
    assert reader.read({}) == ([], {})
    before = int(time.time() * 1000)
    writer.metrics(64, {"loss": 2.5, "learning_rate": 0.1})
    writer.event("checkpoint", path="step_1", epoch=3)
    first, offsets = reader.read({})
    assert [record["kind"] for record in first] == ["metrics", "checkpoint"]
    assert first[0]["images_seen"] == 64
    assert first[0]["values"] == {"loss": 2.5, "learning_rate": 0.1}
    assert first[1]["path"] == "step_1"
    assert first[1]["epoch"] == 3
    assert all(isinstance(record["time"], int) for record in first)
    assert all(before <= record["time"] <= before + 60_000 for record in first)
    writer.metrics(128, {"loss": 2.0})
    second, offsets = reader.read(offsets)
    assert losses(second) == [2.0]
    assert reader.read(offsets) == ([], offsets)
    writer.close()


def test_nan_and_infinities_come_back(tmp_path: Path) -> None:
    folder = Location.of(tmp_path)
    SpoolWriter(folder, "w").metrics(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    values = SpoolReader(folder).read({})[0][0]["values"]
    assert math.isnan(values["a"])
    assert (values["b"], values["c"]) == (math.inf, -math.inf)


def test_several_writers_are_merged_by_time(tmp_path: Path) -> None:
    folder = Location.of(tmp_path)
    one, two = SpoolWriter(folder, "b"), SpoolWriter(folder, "a")
    for step in range(6):
        (one, two)[step % 2].metrics(step, {"loss": step})
        time.sleep(0.002)
    records, offsets = SpoolReader(folder).read({})
    assert losses(records) == [0, 1, 2, 3, 4, 5]
    assert set(offsets) == {"a.jsonl", "b.jsonl"}


def test_a_half_written_line_is_left_for_the_next_time(tmp_path: Path) -> None:
    folder = Location.of(tmp_path)
    writer = SpoolWriter(folder, "w")
    writer.metrics(1, {"loss": 1.0})
    writer.close()
    whole = (tmp_path / "w.jsonl").read_bytes()
    with (tmp_path / "w.jsonl").open("ab") as file:
        file.write(whole[:20])
    reader = SpoolReader(folder)
    records, offsets = reader.read({})
    assert losses(records) == [1.0]
    assert offsets == {"w.jsonl": len(whole)}
    with (tmp_path / "w.jsonl").open("ab") as file:
        file.write(whole[20:])
    assert losses(reader.read(offsets)[0]) == [1.0]
    assert reader.corrupt == 0


def test_a_line_that_a_killed_writer_left_costs_only_itself(tmp_path: Path) -> None:
    folder = Location.of(tmp_path)
    (tmp_path / "w.jsonl").write_bytes(b'{"time":1,"kind":"metrics","val')
    SpoolWriter(folder, "w").metrics(1, {"loss": 1.0})
    reader = SpoolReader(folder)
    assert losses(reader.read({})[0]) == [1.0]
    assert reader.corrupt == 1


def test_corrupt_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    good = json.dumps({"time": 5, "kind": "started"}).encode()
    bad = [b"\x00\x00\x00", b"{", b"[1, 2]", b'{"kind": "no time"}', b"\xff\xfe"]
    (tmp_path / "w.jsonl").write_bytes(b"\n".join([bad[0], good, *bad[1:], good]) + b"\n")
    (tmp_path / "notes.txt").write_text("not a spool file")
    reader = SpoolReader(Location.of(tmp_path))
    records, _ = reader.read({})
    assert records == [{"time": 5, "kind": "started"}] * 2
    assert reader.corrupt == len(bad)


@pytest.mark.parametrize("limit", [1, 100, 70_000])
def test_reading_in_pieces_gives_the_same_records(tmp_path: Path, limit: int) -> None:
    remote = store(tmp_path)
    for location in (Location.of(tmp_path / "spool"), remote):
        writer = SpoolWriter(location, f"w{int(location.is_local)}", flush_seconds=0.01)
        for step in range(300):
            writer.metrics(step, {"loss": step, "x" * 500: 1.0})
            if step % 100 == 99:
                writer.close()
    (tmp_path / "spool" / "torn.jsonl").write_bytes(b'{"half a line')
    reader = SpoolReader(remote)
    found, offsets, before = [], {}, None
    while offsets != before:
        before = offsets
        records, offsets = reader.read(offsets, limit_bytes=limit)
        found += records
    assert sorted(losses(found)) == sorted([*range(300), *range(300)])


def test_a_full_disk_never_raises_and_nothing_is_lost(tmp_path: Path, caplog) -> None:
    folder = Location.of(tmp_path)
    full = tmp_path / "w.jsonl"
    full.symlink_to("/dev/full")  # every write fails with ENOSPC
    writer = SpoolWriter(folder, "w", flush_seconds=0.01)
    for step in range(50):
        writer.metrics(step, {"loss": step})
        time.sleep(0.001)
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    full.unlink()  # there is room again
    time.sleep(0.02)
    writer.metrics(50, {"loss": 50})
    assert losses(SpoolReader(folder).read({})[0]) == list(range(51))
    assert len(caplog.records) == 1


def test_a_disk_that_fills_up_within_a_line_costs_no_record(tmp_path: Path) -> None:
    folder = Location.of(tmp_path)
    writer = SpoolWriter(folder, "w", flush_seconds=0.01)
    writer.metrics(0, {"loss": 0})
    size = (tmp_path / "w.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
        writer.metrics(1, {"loss": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "w.jsonl").stat().st_size == size + 20
    time.sleep(0.02)
    writer.metrics(2, {"loss": 2})
    assert losses(SpoolReader(folder).read({})[0]) == [0, 1, 2]


def test_memory_is_bounded_and_the_oldest_are_dropped_and_counted(tmp_path: Path) -> None:
    folder = Location.of(tmp_path)
    full = tmp_path / "w.jsonl"
    full.symlink_to("/dev/full")
    writer = SpoolWriter(folder, "w", flush_seconds=0.01, max_pending=10)
    for step in range(25):
        writer.metrics(step, {"loss": step})
    full.unlink()
    writer.close()
    records, _ = SpoolReader(folder).read({})
    assert losses(records) == list(range(15, 25))
    assert [r["count"] for r in records if r["kind"] == "dropped"] == [15]


def test_an_object_store_gets_numbered_segments_and_offsets_stay_few(tmp_path: Path) -> None:
    folder = store(tmp_path)
    reader = SpoolReader(folder)
    found, offsets = [], {}
    for attempt in range(3):  # restarts under the same name go on with the next number
        writer = SpoolWriter(folder, "train", flush_seconds=60)
        for step in range(attempt * 10, attempt * 10 + 10):
            writer.metrics(step, {"loss": step})
        writer.close()
        records, offsets = reader.read(offsets)
        found += records
        assert list(offsets) == [f"train.{attempt:06d}.jsonl"]
    assert losses(found) == list(range(30))
    assert losses(reader.read({})[0]) == list(range(30))


def test_an_object_store_is_written_without_further_calls(tmp_path: Path) -> None:
    folder = store(tmp_path)
    writer = SpoolWriter(folder, "train", flush_seconds=0.05)
    writer.event("checkpoint", step=1)
    wait_for("a record", lambda: SpoolReader(folder).read({})[0])
    writer.close()


def test_a_failing_store_neither_raises_nor_blocks_and_nothing_is_lost(
    tmp_path: Path, caplog
) -> None:
    folder = store(tmp_path)
    (tmp_path / "spool").write_text("in the way")  # where the folder should be: every write fails
    writer = SpoolWriter(folder, "train", flush_seconds=0.02)
    for step in range(100):
        writer.metrics(step, {"loss": step})
    wait_for("a warning", lambda: len(caplog.records) == 1)
    time.sleep(0.1)
    (tmp_path / "spool").unlink()
    wait_for("all", lambda: losses(SpoolReader(folder).read({})[0]) == list(range(100)))
    writer.close()
    assert len(caplog.records) == 1


def test_threads_may_share_a_writer(tmp_path: Path) -> None:
    for folder in (Location.of(tmp_path / "local"), store(tmp_path)):
        writer = SpoolWriter(folder, "w", flush_seconds=0.01)

        def write(first: int, writer: SpoolWriter = writer) -> None:
            for step in range(first, first + 200):
                writer.metrics(step, {"loss": step})

        threads = [threading.Thread(target=write, args=(200 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.close()
        assert sorted(losses(SpoolReader(folder).read({})[0])) == list(range(800))


def test_a_record_costs_training_microseconds(tmp_path: Path) -> None:
    writer = SpoolWriter(Location.of(tmp_path), "w")
    values = {f"metric_{i}": 0.1 * i for i in range(10)}
    start = time.thread_time()  # of the processor, whatever else runs on it
    for step in range(1000):
        writer.metrics(step, values)
    assert (time.thread_time() - start) / 1000 < 1e-3  # 20 microseconds


@pytest.mark.parametrize("writer_id", ["", "a/b", "a.b", "../x"])
def test_a_writer_id_that_is_no_file_name_is_refused(tmp_path: Path, writer_id: str) -> None:
    with pytest.raises(ValueError, match="writer_id"):
        SpoolWriter(Location.of(tmp_path), writer_id)


@pytest.mark.parametrize("path", ["../../outside.txt", "/etc/hostname", "a/../../b", "..", "a\0b"])
def test_an_artifact_outside_its_folder_is_no_record(tmp_path: Path, path: str) -> None:
    record = {"time": 1, "kind": "artifact", "path": path}
    (tmp_path / "w.jsonl").write_text(json.dumps(record) + "\n")
    reader = SpoolReader(Location.of(tmp_path))
    assert reader.read({})[0] == []
    assert reader.corrupt == 1
