"""Single images read from Parquet without their row group, where the file allows it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfray.pages import value_places
from selfray.shards import RowGroupCache, ShardSet, open_shards, read_chosen

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PLAIN: dict[str, Any] = {"compression": "none", "use_dictionary": False}


def blobs(count: int, size: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [rng.bytes(int(rng.integers(1, 2 * size))) for _ in range(count)]


def places(path: Path, column: str, group: int = 0) -> list[bytes] | None:
    data, footer = path.read_bytes(), pq.ParquetFile(path).metadata
    found = value_places(lambda at, n: data[at : at + n], footer, group, column)
    return None if found is None else [data[at : at + n] for at, n in found.tolist()]


@pytest.mark.parametrize("count", [1, 5, 8, 40, 300])
@pytest.mark.parametrize("size", [10, 2_000, 50_000])
@pytest.mark.parametrize("options", [{}, {"write_statistics": False}, {"data_page_size": 5_000}])
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
    ],
)
def test_values_without_places_of_their_own_are_left_to_pyarrow(tmp_path, options, images):
    pq.write_table(pa.table({"image": images}), tmp_path / "a", **options)
    assert places(tmp_path / "a", "image") is None


def test_damaged_pages_have_no_places(tmp_path):
    pq.write_table(pa.table({"image": blobs(20, 100)}), tmp_path / "a", **PLAIN)
    data, footer = (tmp_path / "a").read_bytes(), pq.ParquetFile(tmp_path / "a").metadata
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        at = int(rng.integers(4, 60))
        damaged[at : at + 4] = rng.bytes(4)
        found = value_places(lambda at, n, d=bytes(damaged): d[at : at + n], footer, 0, "image")
        if found is not None:
            assert len(found) == 20
            assert (found[:, 0] + found[:, 1] <= len(data)).all()


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
    assert "cut short" in str(next(iter(chosen.unreadable.values())))
    for i, image in enumerate(chosen.images):
        assert image == (b"" if i in lost else images[int(groups[i]) * 10 + int(rows[i])])


def test_a_file_that_was_replaced_by_another_is_not_read_by_the_old_places(tmp_path):
    shards, _ = data_set(tmp_path)
    cache = RowGroupCache(25_000)
    read_chosen(shards, *all_rows(0), cache)
    cache._files.clear()  # as when many other files were opened since
    pq.write_table(pa.table({"image": blobs(60, 10), "label": [0] * 60}), tmp_path / "1.parquet")
    groups, rows = np.arange(6, 12), np.zeros(6, np.int64)
    places_read = [g for g in groups if any(key[1] == g - 6 for key in cache._places)]
    chosen = read_chosen(shards, groups, rows, cache)
    assert places_read
    assert all("not those of the start" in str(error) for error in chosen.unreadable.values())
    assert len(chosen.unreadable) > 0
