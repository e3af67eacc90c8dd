import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfray.data.files import parquet_files, split_files
from selfray.data.reader import read_rows, sample_rows
from selfray.data.row_cache import RowGroupCache
from selfray.data.shard_set import ShardSet, only, open_shards
from selfray.storage import Location

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def structs(images: list[bytes | None]) -> pa.Array:
    return pa.array([{"bytes": image, "path": "x.png"} for image in images], IMAGE)


def write(path: Path, columns: dict[str, Any], rows_per_group: int = 4, metadata=None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=rows_per_group)
    return str(path)


def name(i: int) -> bytes:
    return f"image {i}".encode()


def shard(path: Path, first: int, count: int, rows_per_group: int = 4) -> str:
    """Images `first`.. in Hugging Face's layout; the label of image i is i % 3."""
    images = structs([name(i) for i in range(first, first + count)])
    labels = pa.array([i % 3 for i in range(first, first + count)], pa.int64())
    return write(path, {"image": images, "label": labels}, rows_per_group)


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """22 rows in 6 row groups of two files."""
    uris = [shard(tmp_path / "a.parquet", 0, 10), shard(tmp_path / "b.parquet", 10, 12)]
    return open_shards(uris, str(tmp_path))


def everything(
    shards: ShardSet, cache: RowGroupCache | None = None
) -> tuple[list[bytes], list[int]]:
    groups = np.repeat(np.arange(len(shards.group_rows)), shards.group_rows)
    rows = np.concatenate([np.arange(n) for n in shards.group_rows])
    images, labels = read_rows(shards, groups, rows, cache or RowGroupCache(2**20))
    return images, labels.tolist()


# The rows


def test_row_groups_are_counted_over_all_files(shards):
    assert shards.group_rows == (4, 4, 2, 4, 4, 4)
    assert shards.rows == 22
    assert [file.rows for file in shards.files] == [10, 12]


def test_chosen_rows_come_in_the_order_in_which_they_were_asked_for(shards):
    groups, rows = np.array([5, 0, 2, 5, 0]), np.array([3, 1, 0, 0, 1])
    images, labels = read_rows(shards, groups, rows, RowGroupCache(2**20))
    expected = [21, 1, 8, 18, 1]
    assert images == [name(i) for i in expected]
    assert labels.tolist() == [i % 3 for i in expected]
    assert labels.dtype == np.int64


def test_all_rows_of_a_data_set_are_read(shards):
    images, labels = everything(shards)
    assert images == [name(i) for i in range(22)]
    assert labels == [i % 3 for i in range(22)]


def test_plain_binary_columns_are_images_too(tmp_path):
    uri = write(tmp_path / "x.parquet", {"img": pa.array([b"1", b"2"], pa.binary())})
    shards = open_shards([uri], uri)
    assert shards.image_column == "img"
    assert everything(shards) == ([b"1", b"2"], [-1, -1])


def test_files_that_the_datasets_library_wrote_open_with_their_label_names(tmp_path):
    info = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    uri = write(
        tmp_path / "x.parquet",
        {"image": structs([b"1"]), "label": pa.array([1])},
        metadata={"huggingface": json.dumps(info)},
    )
    shards = open_shards([uri], uri)
    assert shards.label_names == ("cat", "dog")
    assert shards.has_labels


@pytest.mark.parametrize(
    "features",
    [{}, {"label": {"dtype": "int64", "_type": "Value"}}, {"label": [{"dtype": "int64"}]}],
)
def test_labels_without_names_have_none(tmp_path, features):
    uri = write(
        tmp_path / "x.parquet",
        {"image": structs([b"1"]), "label": pa.array([1])},
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    shards = open_shards([uri], uri)
    # The one class there is is called by its value.
    assert shards.label_names == ("1",)
    assert everything(shards)[1] == [0]


@pytest.mark.parametrize("column", ["label", "labels", "fine_label", "class", "target"])
def test_the_usual_names_of_a_label_column_are_found(tmp_path, column):
    uri = write(tmp_path / "x.parquet", {"image": structs([b"1"]), column: pa.array([7])})
    shards = open_shards([uri], uri)
    assert shards.label_column == column
    assert (shards.label_names, everything(shards)[1]) == (("7",), [0])


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.int8(), pa.uint8(), pa.uint64()])
def test_labels_of_any_integer_type_are_read_and_missing_ones_are_minus_one(tmp_path, kind):
    labels = pa.array([1, None, 0], kind)
    uri = write(tmp_path / "x.parquet", {"image": structs([b"1", b"2", b"3"]), "label": labels})
    assert everything(open_shards([uri], uri))[1] == [1, -1, 0]


def test_an_image_without_bytes_is_read_as_empty_bytes(tmp_path):
    images = pa.array([{"bytes": b"1", "path": "a"}, {"bytes": None, "path": "b"}, None], IMAGE)
    uri = write(tmp_path / "x.parquet", {"image": images})
    assert everything(open_shards([uri], uri))[0] == [b"1", b"", b""]
    uri = write(tmp_path / "y.parquet", {"image": pa.array([None, b"2"], pa.binary())})
    assert everything(open_shards([uri], uri))[0] == [b"", b"2"]


def test_the_image_column_is_preferred_by_name_and_can_be_chosen(tmp_path):
    columns = {"thumbnail": structs([b"small"]), "image": structs([b"large"])}
    uri = write(tmp_path / "x.parquet", columns)
    assert everything(open_shards([uri], uri))[0] == [b"large"]
    assert everything(open_shards([uri], uri, "thumbnail"))[0] == [b"small"]


def test_two_columns_of_one_file_can_be_read_in_one_process(tmp_path):
    uri = write(tmp_path / "x.parquet", {"a": structs([b"1"]), "b": structs([b"2"])})
    cache = RowGroupCache(2**20)
    assert everything(open_shards([uri], uri, "a"), cache)[0] == [b"1"]
    assert everything(open_shards([uri], uri, "b"), cache)[0] == [b"2"]


def test_one_file_can_be_cut_out_of_a_data_set(shards):
    images, _ = everything(only(shards, shards.files[1]))
    assert images == [name(i) for i in range(10, 22)]


# Samples


def test_a_sample_is_spread_over_the_data_set_without_repeats(shards):
    groups, rows = sample_rows(shards, 15, seed=3)
    chosen = set(zip(groups.tolist(), rows.tolist(), strict=True))
    assert len(chosen) == 15
    assert all(row < shards.group_rows[group] for group, row in chosen)
    assert len(set(groups.tolist())) > 3


def test_a_sample_is_the_same_for_the_same_seed_and_another_for_another(shards):
    first, again, other = (sample_rows(shards, 15, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_a_sample_larger_than_the_data_set_is_all_of_it(shards):
    groups, rows = sample_rows(shards, 1000)
    images, _ = read_rows(shards, groups, rows, RowGroupCache(2**20))
    assert sorted(images) == sorted(name(i) for i in range(22))


# The files


def test_a_folder_is_searched_whole_and_hidden_files_are_passed_over(tmp_path):
    for inner in (
        "b.parquet",
        "a/x.parquet",
        ".hidden.parquet",
        "_temporary/y.parquet",
        "a/.git/z.parquet",
        "a/_half.parquet",
    ):
        shard(tmp_path / inner, 0, 1)
    (tmp_path / "notes.txt").write_text("no data")
    found = parquet_files(tmp_path)
    assert found == [str(tmp_path / "a/x.parquet"), str(tmp_path / "b.parquet")]


def test_a_hidden_folder_above_the_data_does_not_matter(tmp_path):
    uri = shard(tmp_path / ".cache/_data/x.parquet", 0, 1)
    assert parquet_files(tmp_path / ".cache/_data") == [uri]


def test_a_single_file_is_a_data_set(tmp_path):
    uri = shard(tmp_path / "x.parquet", 0, 1)
    assert parquet_files(uri) == [uri]
    (tmp_path / "x.csv").write_text("a,b")
    assert parquet_files(tmp_path / "x.csv") == []


def test_a_pattern_chooses_files_by_name(tmp_path):
    for inner in ("train-0.parquet", "train-1.parquet", "test-0.parquet"):
        shard(tmp_path / inner, 0, 1)
    found = parquet_files(f"{tmp_path}/train-*.parquet")
    assert [Path(uri).name for uri in found] == ["train-0.parquet", "train-1.parquet"]
    assert parquet_files(f"{tmp_path}/valid-*.parquet") == []


def test_a_pattern_alone_looks_into_the_working_folder(tmp_path, monkeypatch):
    uri = shard(tmp_path / "x.parquet", 0, 1)
    monkeypatch.chdir(tmp_path)
    assert parquet_files("*.parquet") == [uri]


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert parquet_files(tmp_path / "gone") == []
    assert parquet_files(tmp_path) == []


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["train-00000-of-00002.parquet", "test-00000-of-00001.parquet"], [0], [1]),
        (["train/0.parquet", "validation/0.parquet", "test/0.parquet"], [0], [1, 2]),
        (["train_0.parquet", "val.parquet", "valid_0.parquet"], [0], [1, 2]),
        (["Train-0.parquet", "TEST/0.parquet"], [0], [1]),
        (["data/train-0.parquet", "data/test-0.parquet"], [0], [1]),
        (["a.parquet", "b.parquet"], [0, 1], []),
        (["a.parquet", "test.parquet"], [0], [1]),
        (["train.parquet", "extra.parquet"], [0], []),
        (["test-0.parquet", "test-1.parquet"], [], [0, 1]),
        (["testimony.parquet", "trainer.parquet", "valley.parquet"], [0, 1, 2], []),
    ],
)
def test_files_are_train_or_test_by_their_names(names, train, test):
    uris = [f"s3://bucket/set/{name}" for name in names]
    found = split_files(uris, "s3://bucket/set")
    assert found == ([uris[i] for i in train], [uris[i] for i in test])


def test_folders_above_the_data_set_say_nothing_about_train_and_test():
    uris = ["/home/test/set/a.parquet", "/home/test/set/test/b.parquet"]
    assert split_files(uris, "/home/test/set/") == ([uris[0]], [uris[1]])


def test_a_relative_folder_is_split_like_an_absolute_one(tmp_path, monkeypatch):
    shard(tmp_path / "set/train/0.parquet", 0, 1)
    shard(tmp_path / "set/test/0.parquet", 0, 1)
    monkeypatch.chdir(tmp_path)
    for path, folder in (("set", "set"), ("set/**/*.parquet", "set"), ("set/*", "set")):
        train, test = split_files(parquet_files(path), folder)
        assert [Path(uri).parent.name for uri in train] == ["train"]
        assert [Path(uri).parent.name for uri in test] == ["test"]


# What cannot be used


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.parquet is not a readable Parquet file"):
        open_shards([str(tmp_path / "gone.parquet")], str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 what is this PAR1", b"\x89PNG"])
def test_a_broken_file_is_named_with_the_way_out(tmp_path, content):
    good, bad = shard(tmp_path / "a.parquet", 0, 4), tmp_path / "b.parquet"
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.parquet is not a readable.*selfray shards check"):
        open_shards([good, str(bad)], str(tmp_path))


def test_a_truncated_file_is_named(tmp_path):
    good, bad = shard(tmp_path / "a.parquet", 0, 4), shard(tmp_path / "b.parquet", 4, 100)
    Path(bad).write_bytes(Path(bad).read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"b\.parquet is not a readable Parquet file"):
        open_shards([good, bad], str(tmp_path))


def test_files_without_rows_are_refused_together_and_do_no_harm_beside_others(tmp_path):
    empty = shard(tmp_path / "empty.parquet", 0, 0)
    with pytest.raises(ValueError, match="holds no images: all of its 1 Parquet files are empty"):
        open_shards([empty], str(tmp_path))
    full = shard(tmp_path / "full.parquet", 0, 5)
    assert everything(open_shards([empty, full], str(tmp_path)))[0] == [name(i) for i in range(5)]


def test_a_file_without_images_is_named_with_its_columns(tmp_path):
    uri = write(tmp_path / "x.parquet", {"text": pa.array(["a"]), "age": pa.array([3])})
    with pytest.raises(
        ValueError, match=r"x\.parquet has no image column.*text: string, age: int64.*--data.image"
    ):
        open_shards([uri], uri)


def test_an_image_column_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    uri = shard(tmp_path / "x.parquet", 0, 1)
    with pytest.raises(ValueError, match=r"-column photo is not in .*has image: .*, label: int64"):
        open_shards([uri], uri, "photo")


def test_a_file_that_lacks_the_images_of_the_others_is_named(tmp_path):
    first = shard(tmp_path / "a.parquet", 0, 4)
    second = write(tmp_path / "b.parquet", {"label": pa.array([1])})
    with pytest.raises(
        ValueError, match=r"b\.parquet lacks the column image, which .*a\.parquet has"
    ):
        open_shards([first, second], str(tmp_path))


def test_a_file_that_lacks_the_labels_of_the_others_costs_its_own(tmp_path):
    first = shard(tmp_path / "a.parquet", 0, 4)
    second = write(tmp_path / "b.parquet", {"image": structs([b"1"])})
    shards = open_shards([first, second], str(tmp_path))
    assert everything(shards)[1] == [0, 1, 2, 0, -1]
    assert [file.labelled for file in shards.files] == [4, 0]


# The cache


def one_file(tmp_path: Path) -> tuple[ShardSet, Path]:
    """Four row groups of one row of 1,000 bytes."""
    path = tmp_path / "x.parquet"
    write(path, {"image": structs([bytes([i]) * 1000 for i in range(4)])}, rows_per_group=1)
    return open_shards([str(path)], str(path)), path


def row(shards: ShardSet, group: int, cache: RowGroupCache) -> bytes:
    return read_rows(shards, np.array([group]), np.array([0]), cache)[0][0]


def test_a_row_group_is_read_from_storage_once_while_it_fits(tmp_path):
    shards, path = one_file(tmp_path)
    cache = RowGroupCache(100_000)
    for group in range(4):
        row(shards, group, cache)
    path.unlink()
    assert [row(shards, group, cache)[0] for group in (3, 0, 2, 1)] == [3, 0, 2, 1]


def test_the_cache_forgets_what_was_used_longest_ago_beyond_its_limit(tmp_path):
    shards, path = one_file(tmp_path)
    cache = RowGroupCache(2500)
    for group in (0, 1, 0, 2):  # two fit; 1 was used longest ago when 2 came
        row(shards, group, cache)
    path.unlink()
    assert row(shards, 0, cache)[0] == 0
    assert row(shards, 2, cache)[0] == 2
    assert row(shards, 1, cache) == b"", "it asked the file, which is gone"


def test_a_row_group_larger_than_the_cache_is_still_read(tmp_path):
    shards, path = one_file(tmp_path)
    cache = RowGroupCache(10)
    assert [row(shards, group, cache)[0] for group in range(4)] == [0, 1, 2, 3]
    path.unlink()
    assert row(shards, 3, cache)[0] == 3
    assert row(shards, 2, cache) == b"", "it asked the file, which is gone"


def test_a_row_group_is_read_once_for_all_of_its_rows(shards, tmp_path):
    cache = RowGroupCache(1)  # holds one row group: a second visit would read again
    groups, rows = np.array([0, 1, 0, 1, 0]), np.array([0, 0, 1, 1, 2])
    images, _ = read_rows(shards, groups, rows, cache)
    assert images == [name(i) for i in (0, 4, 1, 5, 2)]


def test_shards_on_another_filesystem_are_listed_by_their_own_names(tmp_path):
    shard(tmp_path / "x.parquet", 0, 1)
    assert parquet_files(Location.of(f"file://{tmp_path}")) == [f"file://{tmp_path}/x.parquet"]
