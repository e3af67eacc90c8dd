"""Single images read from Parquet without their row group, where the file allows it."""

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import selfray.data.row_cache as shards_module
from selfray.data.parquet_pages import value_places
from selfray.data.reader import read_chosen
from selfray.data.row_cache import RowGroupCache
from selfray.data.shard_set import ShardSet, open_shards

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PLAIN: dict[str, Any] = {"compression": "none", "use_dictionary": False}
SMALL_PAGES: dict[str, Any] = {"data_page_size": 5_000, "write_batch_size": 2}


def blobs(count: int, size: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [rng.bytes(int(rng.integers(1, 2 * size))) for _ in range(count)]


def places(path: Path, column: str, group: int = 0) -> list[bytes] | None:
    data, footer = path.read_bytes(), pq.ParquetFile(path).metadata
    found = value_places(lambda at, n: data[at : at + n], footer, group, column)
    return None if found is None else [data[at : at + n] for at, n in found.tolist()]


@pytest.mark.parametrize("count", [1, 5, 8, 40, 300])
@pytest.mark.parametrize("size", [10, 2_000, 50_000])
@pytest.mark.parametrize("options", [{}, {"write_statistics": False}, SMALL_PAGES])
def test_every_value_of_a_plain_column_is_found(tmp_path, count, size, options):
    images = blobs(count, size)
    rows = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    table = pa.table({"label": list(range(count)), "image": pa.array(rows, IMAGE)})
    pq.write_table(table, tmp_path / "a", row_group_size=64, **PLAIN, **options)
    for group in range(-(-count // 64)):
        assert places(tmp_path / "a", "image.bytes", group) == images[64 * group : 64 * (group + 1)]


def test_a_column_without_nulls_by_its_type_has_no_levels_to_skip(tmp_path):
    schema = pa.schema([pa.field("image", pa.binary(), nullable=False)])
    images = blobs(20, 100)
    pq.write_table(pa.table({"image": images}, schema), tmp_path / "a", **PLAIN)
    assert places(tmp_path / "a", "image") == images


@pytest.mark.parametrize(
    ("options", "images"),
    [
        ({"compression": "snappy", "use_dictionary": False}, blobs(20, 100)),
        ({"compression": "none", "use_dictionary": True}, blobs(20, 100)),
        ({**PLAIN, "data_page_version": "2.0"}, blobs(20, 100)),
        ({**PLAIN, "column_encoding": {"image": "DELTA_LENGTH_BYTE_ARRAY"}}, blobs(20, 100)),
        (PLAIN, [*blobs(20, 100), None]),
        (PLAIN, [None, *blobs(3, 100)]),
        (PLAIN | SMALL_PAGES, [*blobs(9, 50_000), None, *blobs(9, 50_000)]),
    ],
)
def test_values_without_places_of_their_own_are_left_to_pyarrow(tmp_path, options, images):
    pq.write_table(pa.table({"image": images}), tmp_path / "a", **options)
    assert places(tmp_path / "a", "image") is None


def test_values_of_lists_have_no_places(tmp_path):
    pq.write_table(pa.table({"image": [blobs(3, 100), blobs(2, 100)]}), tmp_path / "a", **PLAIN)
    assert places(tmp_path / "a", "image.list.element") is None


def test_reading_places_never_leaves_the_column_whatever_its_headers_say(tmp_path):
    table = pa.table({"image": blobs(20, 100), "other": blobs(20, 100)})
    pq.write_table(table, tmp_path / "a", **PLAIN)
    data, footer = (tmp_path / "a").read_bytes(), pq.ParquetFile(tmp_path / "a").metadata
    chunk = footer.row_group(0).column(0)
    end = chunk.data_page_offset + chunk.total_compressed_size
    whole = pa.BufferReader(data)
    deep = bytearray(data)
    deep[4:1500] = b"\x1c" * 1496  # a structure in a structure in ...
    damaged = [deep]
    for bit in range(8 * 48):
        flipped = bytearray(data)
        flipped[4 + bit // 8] ^= 1 << bit % 8
        damaged.append(flipped)
    without = 0
    for content in damaged:
        file = pa.BufferReader(bytes(content))

        def read(at, length, file=file):
            assert chunk.data_page_offset <= at <= at + length <= end
            return file.read_at(length, at)

        found = value_places(read, footer, 0, "image")
        if found is None:
            without += 1
        else:
            assert len(found) == 20
            assert (found[:, 0] >= chunk.data_page_offset).all()
            assert (found[:, 0] + found[:, 1] <= end).all()
    assert without > 50
    assert value_places(lambda at, n: whole.read_at(n, at), footer, 0, "image") is not None


# The cache beyond its limit


def data_set(folder: Path, **options: Any) -> tuple[ShardSet, list[bytes]]:
    """120 images of 1 kB in 12 row groups of two files."""
    images = blobs(120, 1_000)
    for part in range(2):
        part_images = images[60 * part : 60 * part + 60]
        labels = [i % 7 for i in range(60 * part, 60 * part + 60)]
        table = pa.table({"image": part_images, "label": labels})
        pq.write_table(table, folder / f"{part}.parquet", 10, **(PLAIN | options))
    return open_shards([str(folder / f"{i}.parquet") for i in range(2)], str(folder)), images


def all_rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(120)
    return order // 10, order % 10


@pytest.mark.parametrize("options", [{}, {"use_dictionary": True}, {"compression": "zstd"}])
def test_a_data_set_larger_than_the_cache_is_read_right(tmp_path, options):
    shards, images = data_set(tmp_path, **options)
    cache = RowGroupCache(25_000)
    for seed in range(3):
        groups, rows = all_rows(seed)
        chosen = read_chosen(shards, groups, rows, cache)
        numbers = (groups * 10 + rows).tolist()
        assert chosen.images == [images[i] for i in numbers]
        assert chosen.labels.tolist() == [i % 7 for i in numbers]


def test_beyond_the_cache_row_groups_are_not_read_whole_again(tmp_path, monkeypatch):
    shards, _ = data_set(tmp_path)
    cache = RowGroupCache(25_000)
    read_chosen(shards, *all_rows(0), cache)
    monkeypatch.setattr(cache, "_read", lambda *_: pytest.fail("a row group was read whole"))
    read_chosen(shards, *all_rows(1), cache)


def test_a_file_that_is_cut_short_while_it_is_open_costs_its_own_rows(tmp_path):
    shards, images = data_set(tmp_path)
    cache = RowGroupCache(25_000)
    read_chosen(shards, *all_rows(0), cache)
    with (tmp_path / "1.parquet").open("r+b") as file:
        file.truncate(100)
    groups, rows = all_rows(1)
    chosen = read_chosen(shards, groups, rows, cache)
    lost = set(chosen.unreadable)
    assert lost
    assert {int(groups[i]) // 6 for i in lost} == {1}
    assert {error.name for error in chosen.unreadable.values()} == {f"{tmp_path}/1.parquet"}
    for i, image in enumerate(chosen.images):
        assert image == (b"" if i in lost else images[int(groups[i]) * 10 + int(rows[i])])


def test_a_file_that_was_replaced_by_another_is_not_read_by_the_old_places(tmp_path):
    shards, old = data_set(tmp_path)
    cache = RowGroupCache(1)
    read_chosen(shards, *all_rows(0), cache)
    new = blobs(60, 3_000, seed=1)
    table = pa.table({"image": new, "label": [6] * 60})
    pq.write_table(table, tmp_path / "1.parquet", 10, **PLAIN)
    groups, rows = all_rows(1)
    chosen = read_chosen(shards, groups, rows, cache)
    expected = old[:60] + new
    numbers = groups * 10 + rows
    assert chosen.unreadable == {}
    assert chosen.images == [expected[i] for i in numbers.tolist()]
    assert (chosen.labels[numbers >= 60] == 6).all()

    pq.write_table(table, tmp_path / "1.parquet", 20, **PLAIN)
    chosen = read_chosen(shards, groups, rows, cache)
    assert len(chosen.unreadable) == 60
    assert all("have changed since the start" in str(error) for error in chosen.unreadable.values())


def test_damage_inside_one_row_group_costs_its_rows_and_no_others(tmp_path):
    shards, images = data_set(tmp_path)
    footer = pq.ParquetFile(tmp_path / "1.parquet").metadata
    content = (tmp_path / "1.parquet").read_bytes()
    for column in (0, 1):
        chunk = footer.row_group(3).column(column)
        damaged = bytearray(content)
        at = chunk.data_page_offset
        damaged[at : at + 30] = b"\xff" * 30
        (tmp_path / "1.parquet").write_bytes(damaged)
        groups, rows = all_rows(2)
        chosen = read_chosen(shards, groups, rows, RowGroupCache(25_000))
        assert {int(groups[i]) for i in chosen.unreadable} == {9}
        assert {e.name for e in chosen.unreadable.values()} == {f"{tmp_path}/1.parquet row group 3"}
        for i, image in enumerate(chosen.images):
            number = int(groups[i]) * 10 + int(rows[i])
            assert image == (b"" if groups[i] == 9 else images[number])


def test_the_bytes_of_whole_row_groups_are_counted_once_for_threads_that_share_a_cache(tmp_path):
    shards, images = data_set(tmp_path)
    cache = RowGroupCache(60_000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda s: read_chosen(shards, *all_rows(s % 2), cache), range(24)))
    for seed, chosen in enumerate(found):
        groups, rows = all_rows(seed % 2)
        assert chosen.images == [images[i] for i in (groups * 10 + rows).tolist()]
    assert cache._bytes == sum(held.table.nbytes for held in cache._tables.values())
    assert cache._placed == sum(len(p.labels) for p in cache._places.values())


def test_too_many_open_files_are_no_fault_of_a_shard(tmp_path, monkeypatch):
    shards, images = data_set(tmp_path)
    cache = RowGroupCache(1)
    really, failed = shards_module._opened, []

    def opened(location):
        if cache._files and len(failed) < 3:
            failed.append(location)
            raise OSError(errno.EMFILE, "Too many open files")
        return really(location)

    monkeypatch.setattr(shards_module, "_opened", opened)
    groups, rows = all_rows(0)
    chosen = read_chosen(shards, groups, rows, cache)
    assert failed
    assert chosen.images == [images[i] for i in (groups * 10 + rows).tolist()]


def test_no_rows_are_no_images(tmp_path):
    shards, _ = data_set(tmp_path)
    nothing = np.array([], np.int64)
    assert read_chosen(shards, nothing, nothing).images == []
