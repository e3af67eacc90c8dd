"""A run goes on by the files and row groups that it started with."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfray.data.data_sets import as_started, remember
from selfray.data.files import parquet_files
from selfray.data.shard_set import ShardSet, open_shards
from selfray.storage import Location


def shard(path: Path, rows: int = 8, rows_per_group: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [b"x"] * rows}), path, row_group_size=rows_per_group)


def opened(folder: Path) -> ShardSet:
    return open_shards(parquet_files(str(folder)), str(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abc":
        shard(tmp_path / "data" / f"{name}.parquet")
    (tmp_path / "run").mkdir()
    remember(opened(tmp_path / "data"), Location.of(tmp_path / "run"))
    return tmp_path / "data"


def started(folder: Path, said: list[str]) -> list[tuple[str, tuple[int, ...]]]:
    run = Location.of(folder.parent / "run")
    shards = as_started(opened(folder), run, said.append)
    return [
        (Path(file.uri).relative_to(folder).as_posix(), file.group_rows) for file in shards.files
    ]


ALL = [(f"{name}.parquet", (4, 4)) for name in "abc"]


def test_nothing_is_said_where_nothing_changed(folder):
    said: list[str] = []
    assert started(folder, said) == ALL
    assert said == []


def test_a_lost_file_keeps_its_place_and_a_new_one_waits(folder):
    said: list[str] = []
    (folder / "b.parquet").unlink()
    shard(folder / "aa.parquet")
    assert started(folder, said) == ALL
    assert said == [
        "1 of the 3 shards at the start is gone, the first is b.parquet: "
        "their 8 images count as broken",
        "1 shard was added after this run started, the first is aa.parquet: the run continues"
        " without",
    ]


def test_another_file_under_the_same_name_is_refused_with_the_way_out(folder):
    shard(folder / "c.parquet", rows_per_group=8)
    with pytest.raises(
        ValueError, match=r"c\.parquet is not the file that .*put it back, or start"
    ):
        started(folder, [])


def test_a_data_set_may_be_moved_as_a_whole(folder):
    shutil.move(folder, folder.parent / "elsewhere")
    said: list[str] = []
    assert started(folder.parent / "elsewhere", said) == ALL
    assert said == []


def test_a_file_that_is_there_is_not_called_gone(folder):
    # As where `train-0.parquet` came, beside which the others are no train files.
    shards = opened(folder)
    only_last = open_shards([shards.files[2].uri], str(folder))
    said: list[str] = []
    found = as_started(only_last, Location.of(folder.parent / "run"), said.append)
    assert [file.uri for file in found.files] == [file.uri for file in shards.files]
    assert said == []


def test_a_run_of_before_there_was_a_record_takes_what_it_finds(folder):
    shards = opened(folder)
    assert as_started(shards, Location.of(folder.parent / "none"), print) is shards
