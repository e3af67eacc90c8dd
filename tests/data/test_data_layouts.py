"""Each row of docs/layouts.md: what the names and columns of a data set mean, by every route.

`pretrain.py`, the sweeps and `selfray probe` open data by `open_data`, and `selfray shards build`
plans by `make_plan`: each row goes both ways, and its shards are opened again.
"""

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from helpers import write_tar
from selfray.data.data_sets import DataSets, open_data
from selfray.data.destination import finish, open_destination, refuse_other_plan, start
from selfray.data.files import list_matching, list_source
from selfray.data.listing import make_plan
from selfray.data.manifest import Manifest
from selfray.data.options import BuildOptions
from selfray.data.reader import read_rows
from selfray.data.shard_set import ShardSet, open_shards
from selfray.data.writer import Job, build_item
from selfray.experiment import DataConfig
from selfray.storage import Location

DOCS = Path(__file__).resolve().parents[2] / "docs" / "layouts.md"


@lru_cache(maxsize=64)
def picture(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def build_here(
    source: Location,
    destination: Location,
    options: BuildOptions,
    say: Callable[[str], object] = lambda _: None,
) -> Manifest:
    """A build in this process: what the tasks of `selfray shards build` do."""
    state = open_destination(destination)
    if state.manifest is not None:
        return state.manifest
    plan = make_plan(source, options)
    for note in plan.notes:
        say(note)
    start(destination, plan)
    job = Job(plan.source, destination, plan.layout, options)
    records = [record for item in plan.items for record in build_item(job, item, frozenset())]
    return finish(destination, plan, sorted(records, key=lambda record: record.number))


def opened(
    path: Path | str, output: Path, said: list[str] | None = None, **fields: Any
) -> DataSets:
    config = DataConfig(path=str(path), **fields)
    say = [].append if said is None else said.append
    return open_data(config, Location.of(output), say, build_here)


def images(folder: Path, *names: str, count: int = 3) -> Path:
    """`count` images in each of some folders, or one by the name of a file."""
    for place, name in enumerate(names):
        files = [name] if name.endswith(".png") else [f"{name}/{i}.png" for i in range(count)]
        for index, file in enumerate(files):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(picture(place * count + index))
    return folder


def parquet(path: Path, labels: Any = None, count: int = 3, column: str = "label") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(count)]
    columns: dict[str, Any] = {"image": rows}
    if labels is not None:
        columns[column] = labels
    pq.write_table(pa.table(columns), path)
    return path


def classes_of(shards: ShardSet) -> list[str]:
    """The class of every image of a data set, `-` for none."""
    groups = np.repeat(np.arange(len(shards.group_rows)), shards.group_rows)
    rows = np.concatenate([np.arange(count) for count in shards.group_rows])
    _, labels = read_rows(shards, groups, rows)
    names = [*(shards.label_names or ()), "-"]
    return [names[label] for label in labels]


# The table


def with_table(folder: Path, name: str) -> None:
    images(folder, "1.png", "2.png", "3.png", "4.png")
    rows = [{"file_name": f"{i}.png", "label": "cat" if i % 2 else "dog"} for i in range(1, 5)]
    if name.endswith(".csv"):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "label"])
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / name)


def with_lists(folder: Path) -> None:
    images(folder, "1.png", "2.png", "3.png", "4.png")
    rows = [
        {"file_names": ["1.png", "2.png"], "label": "cat"},
        {"file_names": ["3.png", "4.png"], "label": "dog"},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def tars(folder: Path, label: Callable[[int], tuple[str, bytes]]) -> None:
    for split in ("train", "test"):
        members = {}
        for i in range(4):
            suffix, content = label(i)
            members |= {f"{i}.png": picture(i), f"{i}.{suffix}": content}
        write_tar(folder / f"{split}-000.tar", members)


def one_tar(file: Path, *folders: str, labels: str = "") -> None:
    """Three images in each of some folders of one tar, with one of some labels beside each."""
    members = {}
    for place, folder in enumerate(folders):
        for i in range(3):
            members[f"{folder}/{i}.png"] = picture(3 * place + i)
            if labels:
                members[f"{folder}/{i}.cls"] = labels.split()[place % 2].encode()
    write_tar(file, members)


LAYOUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "train/CLASS/*, val/CLASS/*": (
        lambda f: images(f, "train/a", "train/b", "val/a", "val/b"),
        "6 train images of 2 classes (a, b), 6 test images from val/",
    ),
    "CLASS/*": (
        lambda f: images(f, "a", "b", "c", "d"),
        "12 train images of 4 classes (a ... d)",
    ),
    "CLASS/* beside test/": (
        lambda f: images(f, "a", "b", "test"),
        "6 train images of 2 classes (a, b), 3 test images from test/, without labels",
    ),
    "train/*, val/* without classes": (
        lambda f: images(f, "train", "val"),
        "3 train images without labels, 3 test images from val/, without labels",
    ),
    "one folder of images": (
        lambda f: images(f, "pictures"),
        "3 train images without labels",
    ),
    "nested folders below a class": (
        lambda f: images(f, "a/x/y", "a/z", "b/x"),
        "9 train images of 2 classes (a, b)",
    ),
    "a folder around all others": (
        lambda f: images(f, "set/train/a", "set/train/b", "set/test/a"),
        "6 train images of 2 classes (a, b), 3 test images from test/",
    ),
    "CLASS/train/*, CLASS/test/*": (
        lambda f: images(f, "a/train", "a/test", "b/train", "b/test"),
        "6 train images of 2 classes (a, b), 6 test images from test/",
    ),
    "train2017/, val2017/ and another": (
        lambda f: images(f, "train2017", "val2017", "extra"),
        "3 train images without labels, 3 test images from val2017/, without labels, "
        "3 left out: extra/",
    ),
    "trainingSet/CLASS, testSet/": (
        lambda f: images(f, "trainingSet/0", "trainingSet/1", "testSet"),
        "6 train images of 2 classes (0, 1), 3 test images from testSet/, without labels",
    ),
    "a class called train": (
        lambda f: images(f, "bus", "car", "train", "test/bus", "test/train"),
        "9 train images of 3 classes (bus, car, train), 6 test images from test/",
    ),
    "a class called test-tube": (
        lambda f: images(f, "beaker", "test-tube"),
        "6 train images of 2 classes (beaker, test-tube)",
    ),
    "one image beside the class folders": (
        lambda f: images(f, "a", "b", "cover.png"),
        "7 train images, 6 of them of 2 classes (a, b)",
    ),
    "train/, unlabeled/, dev/": (
        lambda f: images(f, "train/a", "train/b", "unlabeled", "dev/a"),
        "9 train images, 6 of them of 2 classes (a, b) (3 of them from unlabeled), "
        "3 test images from dev/",
    ),
    "Parquet files by the names of splits": (
        lambda f: [
            parquet(f / f"data/{name}-00000-of-00001.parquet", ["a", "b", "a"])
            for name in ("train", "test", "unlabeled")
        ],
        "6 train images of 2 classes (a, b) (3 of them from unlabeled), 3 test images from test",
    ),
    "name-train.parquet, name-eval.parquet": (
        lambda f: [parquet(f / f"birds-{n}.parquet", [0, 1, 1]) for n in ("train", "eval")],
        "3 train images of 2 classes (0, 1), 3 test images from test",
    ),
    "split=train/, split=holdout/": (
        lambda f: [parquet(f / f"split={n}/0.parquet", [0, 1, 1]) for n in ("train", "holdout")],
        "3 train images of 2 classes (0, 1), 3 test images from split=holdout/",
    ),
    "label=cat/": (
        lambda f: [parquet(f / f"label={n}/0.parquet") for n in ("cat", "dog")],
        "6 train images of 2 classes (cat, dog)",
    ),
    "train/CLASS/images/*, val/images/*": (
        lambda f: images(f, "train/a/images", "train/b/images", "val/images"),
        "6 train images of 2 classes (a, b), 3 test images from val/, without labels",
    ),
    "images_001/*, images_002/*": (
        lambda f: images(f, "images_001", "images_002"),
        "6 train images without labels",
    ),
    "train/images/*, train/masks/*": (
        lambda f: images(f, "train/images", "train/masks", "val/images", "val/masks"),
        "3 train images without labels, 3 test images from val/, without labels, 6 left out: "
        "train/masks/, val/masks/",
    ),
    "images/*, masks/*": (
        lambda f: images(f, "images", "masks"),
        "3 train images without labels, 3 left out: masks/",
    ),
    "fold1/CLASS/*, fold2/CLASS/*": (
        lambda f: images(f, "fold1/a", "fold1/b", "fold2/a"),
        "9 train images of 2 classes (a, b)",
    ),
    "class1/*, class2/*": (
        lambda f: images(f, "class1", "class2"),
        "6 train images of 2 classes (class1, class2)",
    ),
    "split=val/label=big%20cat/": (
        lambda f: [
            parquet(f / f"split={split}/label={label}/0.parquet")
            for split in ("train", "val")
            for label in ("big%20cat", "dog")
        ],
        "6 train images of 2 classes (big cat, dog), 6 test images from split=val/",
    ),
    "Train/, VAL/, hold-out/": (
        lambda f: images(f, "set/Train/a", "set/Train/b", "set/VAL/a", "set/hold-out/b"),
        "6 train images of 2 classes (a, b), 6 test images from VAL/ and hold-out/",
    ),
    "metadata.csv beside images": (
        lambda f: with_table(f, "metadata.csv"),
        "4 train images of 2 classes (cat, dog)",
    ),
    "metadata.jsonl beside images": (
        lambda f: with_table(f, "metadata.jsonl"),
        "4 train images of 2 classes (cat, dog)",
    ),
    "metadata.parquet beside images": (
        lambda f: with_table(f, "metadata.parquet"),
        "4 train images of 2 classes (cat, dog)",
    ),
    "WebDataset with .cls": (
        lambda f: tars(f, lambda i: ("cls", str(i % 2).encode())),
        "4 train images of 2 classes (0, 1), 4 test images from test",
    ),
    "WebDataset with .cls of text": (
        lambda f: tars(f, lambda i: ("cls", (b"cat", b"dog")[i % 2])),
        "4 train images of 2 classes (cat, dog), 4 test images from test",
    ),
    "WebDataset with .json": (
        lambda f: tars(f, lambda i: ("json", json.dumps({"label": "cd"[i % 2]}).encode())),
        "4 train images of 2 classes (c, d), 4 test images from test",
    ),
    "a tar with train/CLASS/*, val/CLASS/* in it": (
        lambda f: one_tar(f / "all.tar", "./set/train/a", "./set/train/b", "./set/val/a"),
        "6 train images of 2 classes (a, b), 3 test images from val/",
    ),
    "tars with CLASS/* in them": (
        lambda f: [one_tar(f / f"{n}.tar", "a", "b") for n in ("train-0", "train-1", "val-0")],
        "12 train images of 2 classes (a, b), 6 test images from validation",
    ),
    "train/val/* in train/": (
        lambda f: images(f, "train/a", "train/b", "train/val/a", "train/val/b"),
        "6 train images of 2 classes (a, b), 6 test images from train/val/",
    ),
    "train/train/CLASS/*, train/val/CLASS/*": (
        lambda f: images(f, "train/train/a", "train/train/b", "train/val/a", "test/b"),
        "6 train images of 2 classes (a, b), 6 test images from train/val/ and test/",
    ),
    "train/val/*, test/val/*, where val is a class": (
        lambda f: images(f, "train/a", "train/val", "test/a", "test/val"),
        "6 train images of 2 classes (a, val), 6 test images from test/",
    ),
    "en/train-0.parquet, fr/train-0.parquet": (
        lambda f: [
            parquet(f / f"{name}/{split}-00000-of-00001.parquet", [0, 1, 1])
            for name in ("en", "fr")
            for split in ("train", "test")
        ],
        "6 train images of 2 classes (0, 1), 6 test images from test, "
        "of 2 data sets side by side (en/, fr/) taken as one",
    ),
    "1/*, 2/*, 10/*": (
        lambda f: images(f, "1", "2", "10"),
        "9 train images of 3 classes (1, 2, 10)",
    ),
    "metadata.jsonl with several images in a row": (
        lambda f: with_lists(f),
        "4 train images of 2 classes (cat, dog)",
    ),
    "a tar with folders and .cls": (
        lambda f: one_tar(f / "all.tar", "train/0", "train/1", "test/0", labels="owl tit"),
        "6 train images of 2 classes (owl, tit), 3 test images from test/",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_understood_by_every_route(tmp_path, name):
    make, expected = LAYOUTS[name]
    make(tmp_path / "data")
    said: list[str] = []
    data = opened(tmp_path / "data", tmp_path / "runs", said)
    assert data.described() == [expected]
    assert said[-1] == expected
    plan = make_plan(Location.of(tmp_path / "data"), BuildOptions())
    if "tar" not in name and "WebDataset" not in name:  # whose images nobody has counted
        assert plan.notes == (expected,)
    # The same images by `shards build`, whose folder keeps the splits.
    build_here(Location.of(tmp_path / "data"), Location.of(tmp_path / "shards"), BuildOptions())
    again = opened(tmp_path / "shards", tmp_path / "runs")
    assert again.train.rows == data.train.rows
    assert sorted(classes_of(again.train)) == sorted(classes_of(data.train))
    assert (again.test is None) == (data.test is None)
    if data.test is not None and again.test is not None:
        assert sorted(classes_of(again.test)) == sorted(classes_of(data.test))


@pytest.mark.parametrize(
    ("table", "encoding"),
    [
        ("file_name;label\n{0};x\n{1};y\n", "utf-8"),
        ("file_name\tlabel\n{0}\tx\n{1}\ty\n", "utf-8-sig"),
        ("file_name,label\r\n{0},x\r\n{1},y\r\n", "utf-16"),
    ],
)
@pytest.mark.parametrize("slash", ["/", "\\"])
def test_a_table_may_be_as_other_programs_write_it(tmp_path, table, encoding, slash):
    images(tmp_path / "data", "deep/1.png", "deep/2.png")
    names = [f"deep{slash}{i}.png" for i in (1, 2)]
    (tmp_path / "data" / "metadata.csv").write_text(table.format(*names), encoding=encoding)
    said: list[str] = []
    assert classes_of(opened(tmp_path / "data", tmp_path, said).train) in (["x", "y"], ["y", "x"])
    assert not any("do not exist" in line for line in said)


def test_what_a_build_has_to_note_is_told_by_a_run_too(tmp_path):
    images(tmp_path / "data", "1.png", "2.png")
    (tmp_path / "data" / "metadata.csv").write_text("file_name,label\n1.png,x\n3.png,y\n")
    said: list[str] = []
    opened(tmp_path / "data", tmp_path, said)
    assert "1 images named in metadata.csv do not exist" in said


def test_packed_archives_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"holds packed archives \(a.zip\): unpack them"):
        make_plan(Location.of(tmp_path), BuildOptions())


def test_a_path_that_windows_wrote_is_found(tmp_path):
    images(tmp_path, "deep/0.png")
    rows = pa.array([{"bytes": None, "path": "deep\\0.png"}])
    table = pa.table({"image": rows.cast(pa.struct({"bytes": pa.binary(), "path": "string"}))})
    pq.write_table(table, tmp_path / "x.parquet")
    shards = opened(tmp_path / "x.parquet", tmp_path).train
    assert read_rows(shards, np.zeros(1, int), np.zeros(1, int))[0] == [picture(0)]


def test_every_layout_is_in_the_documented_table():
    rows = [line.split("|")[1].strip() for line in DOCS.read_text().splitlines() if "|" in line]
    assert set(LAYOUTS) <= {row.replace("`", "") for row in rows}


def test_test_images_are_never_trained_on(tmp_path):
    images(tmp_path / "data", "test", "val")
    with pytest.raises(ValueError, match=r"holds only test images \(val/ and test/\)"):
        opened(tmp_path / "data", tmp_path / "runs")
    assert opened(tmp_path / "data" / "test", tmp_path / "runs").train.rows == 3


# Labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([10**15, 3, 10**15], ["1000000000000000", "3", "1000000000000000"]),
        ([5, -1, 9], ["5", "-", "9"]),
        (pa.array([2**64 - 1, 0, 0], pa.uint64()), ["18446744073709551615", "0", "0"]),
        (["b", "a", None], ["b", "a", "-"]),
        (["10", "9", ""], ["10", "9", "-"]),
        ([True, False, True], ["true", "false", "true"]),
        ([1.0, float("nan"), 0.0], ["1", "-", "0"]),
        (pa.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x"]),
        (pa.array(["x", "y", "x"], pa.large_string()), ["x", "y", "x"]),
        (pa.array(["x", "y", "x"], pa.string_view()), ["x", "y", "x"]),
        (pa.array([b"x", b"y", b"x"]), ["x", "y", "x"]),
    ],
)
def test_labels_of_every_type_become_classes(tmp_path, labels, expected):
    uri = str(parquet(tmp_path / "x.parquet", labels))
    assert classes_of(open_shards([uri], uri, "image")) == expected


def test_a_row_of_several_images_is_refused_with_the_way_out(tmp_path):
    rows = [[{"bytes": picture(0), "path": "0.png"}, {"bytes": picture(1), "path": "1.png"}]]
    pq.write_table(pa.table({"images": rows, "label": [1]}), tmp_path / "x.parquet")
    for column in (None, "images"):
        with pytest.raises(ValueError, match=r"images holds several images in a row \(list<.*\n?"):
            opened(tmp_path / "x.parquet", tmp_path, image_column=column)


def test_an_unfinished_build_with_classes_in_another_order_is_not_continued(tmp_path):
    source, out = Location.of(images(tmp_path / "a", "1", "2", "10")), Location.of(tmp_path / "b")
    plan = make_plan(source, BuildOptions())
    start(out, replace(plan, class_order=""))  # as an earlier version would have begun it
    with pytest.raises(ValueError, match="numbers were in another order"):
        refuse_other_plan(out, open_destination(out), plan)
    complete = build_here(source, Location.of(tmp_path / "c"), BuildOptions())
    refuse_other_plan(out, replace(open_destination(out), manifest=complete), plan)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([[1], [2], [3]], "holds list<"),
        ([0.5, 1.0, 2.0], "holds numbers that are not whole"),
        ([None, None, None], "is empty"),
        ([-1, -1, -1], "holds no label"),
    ],
)
def test_a_label_column_of_no_use_is_named_with_its_reason(tmp_path, labels, reason):
    parquet(tmp_path / "x.parquet", labels)
    line, *notes = opened(tmp_path / "x.parquet", tmp_path).described()
    assert line == "3 train images without labels"
    assert len(notes) == 1
    assert reason in notes[0]


def test_the_label_column_can_be_chosen(tmp_path):
    parquet(tmp_path / "x.parquet", ["owl", "owl", "tit"], column="species")
    assert not opened(tmp_path / "x.parquet", tmp_path).can_probe
    data = opened(tmp_path / "x.parquet", tmp_path, label_column="species")
    assert classes_of(data.train) == ["owl", "owl", "tit"]
    with pytest.raises(ValueError, match=r"--data.label-column order of .* is missing"):
        opened(tmp_path / "x.parquet", tmp_path, label_column="order")


def test_train_and_test_have_one_set_of_classes(tmp_path):
    parquet(tmp_path / "train.parquet", ["b", "c", "c"])
    parquet(tmp_path / "test.parquet", ["a", "c", "b"])
    data = opened(tmp_path, tmp_path)
    assert data.test is not None
    assert data.train.label_names == data.test.label_names
    assert (classes_of(data.train), classes_of(data.test)) == (["b", "c", "c"], ["a", "c", "b"])
    assert data.described()[1].startswith("1 of the classes of the test images are not among")


def test_what_makes_probes_say_nothing_is_said(tmp_path):
    parquet(tmp_path / "one" / "x.parquet", [4, 4, 4])
    assert "there is only one class, 4" in opened(tmp_path / "one", tmp_path).described()[1]


# Images


@pytest.mark.parametrize(
    "kind",
    [pa.binary_view(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())],
    ids=str,
)
def test_bytes_of_every_type_are_images(tmp_path, kind):
    data = [picture(i) for i in range(3)]
    column = pa.array(data, pa.binary())
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    pq.write_table(pa.table({"image": column}), tmp_path / "x.parquet")
    shards = opened(tmp_path, tmp_path).train
    assert read_rows(shards, np.zeros(3, int), np.arange(3))[0] == data


def test_bytes_of_fixed_size_are_images(tmp_path):
    size = max(len(picture(i)) for i in range(3))
    data = [picture(i).ljust(size, b"\0") for i in range(3)]
    pq.write_table(pa.table({"image": pa.array(data, pa.binary(size))}), tmp_path / "x.parquet")
    shards = opened(tmp_path, tmp_path).train
    assert read_rows(shards, np.zeros(3, int), np.arange(3))[0] == data


def test_several_image_columns_are_refused_in_the_same_words_everywhere(tmp_path):
    table = pa.table({"depth": [picture(1)], "rgb": [picture(2)]})
    pq.write_table(table, tmp_path / "x.parquet")
    words = r"has several columns that may hold images \(depth, rgb\): choose one with --data.image"
    with pytest.raises(ValueError, match=words):
        opened(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=words):
        make_plan(Location.of(tmp_path), BuildOptions())


def test_paths_without_bytes_are_found_beside_the_file_or_refused_at_once(tmp_path):
    rows = [{"bytes": None, "path": f"pictures/{i}.png"} for i in range(3)]
    table = pa.table({"image": pa.array(rows, pa.struct({"bytes": pa.binary(), "path": "string"}))})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"holds only the paths .* no pictures/0.png beside it"):
        opened(tmp_path / "x.parquet", tmp_path)
    images(tmp_path, "pictures")
    shards = opened(tmp_path / "x.parquet", tmp_path).train
    assert read_rows(shards, np.zeros(3, int), np.arange(3))[0] == [picture(i) for i in range(3)]


@pytest.mark.parametrize("path", ["/etc/hostname", "../secret.png", "a/../../secret.png"])
def test_a_path_that_leads_out_of_its_folder_is_not_read(tmp_path, path):
    (tmp_path / "secret.png").write_bytes(picture(0))
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"image": [{"path": path}]}), tmp_path / "data" / "x.parquet")
    with pytest.raises(ValueError, match=r"has no image column|holds only the paths"):
        opened(tmp_path / "data", tmp_path)


@pytest.mark.parametrize("features", ['{"info": {"features": null}}', "[1]", "no json", '{"a": 1}'])
def test_features_of_another_kind_do_no_harm(tmp_path, features):
    table = pa.table({"image": [picture(0)], "label": [1]})
    table = table.replace_schema_metadata({"huggingface": features})
    pq.write_table(table, tmp_path / "x.parquet")
    assert classes_of(opened(tmp_path, tmp_path).train) == ["1"]


def test_a_column_that_is_there_twice_is_not_used(tmp_path):
    table = pa.table([[picture(0)], [1], [2]], names=["image", "label", "label"])
    pq.write_table(table, tmp_path / "x.parquet")
    assert "exists more than once" in opened(tmp_path, tmp_path).described()[1]


# Names and folders


def test_links_in_a_circle_give_each_image_once(tmp_path):
    images(tmp_path / "data", "a/x", "b")
    (tmp_path / "data" / "latest").symlink_to(".")
    (tmp_path / "data" / "a" / "up").symlink_to("../../data")
    (tmp_path / "data" / "again").symlink_to("b")
    listing = list_source(Location.of(tmp_path / "data"))
    assert len(listing.files) == 6
    assert [entry.file for entry in listing.quarantined] == ["a/up", "again", "latest"]
    parquet(tmp_path / "set" / "x.parquet")
    (tmp_path / "set" / "latest").symlink_to(".")
    assert opened(tmp_path / "set", tmp_path).train.rows == 3


def test_names_in_other_encodings_are_passed_over_and_said(tmp_path):
    parquet(tmp_path / "set" / "x.parquet")
    Path(os.fsdecode(bytes(tmp_path / "set") + b"/caf\xe9.parquet")).write_bytes(b"x")
    said: list[str] = []
    assert opened(tmp_path / "set", tmp_path, said).train.rows == 3
    assert said[0].startswith("skipped: caf\\udce9.parquet (the file name is not UTF-8")


def test_a_pattern_lists_what_it_matches_and_no_more(tmp_path):
    for name in ("a-1.parquet", "a-2.parquet", "b[1].parquet", "deep/a-3.parquet", "x/y/a.parquet"):
        parquet(tmp_path / name)

    def names(pattern: str) -> list[str]:
        return [file.name for file in list_matching(f"{tmp_path}/{pattern}").files]

    assert names("a-*.parquet") == ["a-1.parquet", "a-2.parquet"]
    assert names("b[1]*") == ["b[1].parquet"]
    assert names("*/a-*.parquet") == ["deep/a-3.parquet"]
    assert names("**/a*.parquet") == [
        "a-1.parquet", "a-2.parquet", "deep/a-3.parquet", "x/y/a.parquet",
    ]  # fmt: skip
    assert names("x/*") == ["y/a.parquet"]
    assert names("nothing*") == []
