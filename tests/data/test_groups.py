"""data.group_by: images of one patient are never on both sides of the held-out split."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data_layouts import build_here

from helpers import write
from selfray.cluster.checking import _check_shard
from selfray.data.data_sets import DataSets, open_data
from selfray.data.listing import make_plan
from selfray.data.options import BuildOptions
from selfray.data.source import Sample
from selfray.experiment import DataConfig
from selfray.pixels.codecs import encode_png
from selfray.storage import Location

PATIENTS = {f"p{n}": n % 7 + 1 for n in range(25)}
"""Images of each patient."""
ROWS = [(f"clinic/{name}_{i}.png", name) for name, count in PATIENTS.items() for i in range(count)]


def picture(row: int) -> bytes:
    return encode_png(np.full((2, 2, 3), row, np.uint8))


def scans(folder: Path, files: dict[str, list[int]], **columns: list[object]) -> Path:
    """Parquet files of chosen ROWS with their patients, labels and further columns."""
    folder.mkdir(parents=True)
    for name, rows in files.items():
        images = [{"bytes": picture(row), "path": ROWS[row][0]} for row in rows]
        own = {key: [values[row] for row in rows] for key, values in columns.items()}
        labels = [("sick", "well")[row % 2] for row in rows]
        patients = [ROWS[row][1] for row in rows]
        table = pa.table({"image": images, "label": labels, "patient": patients, **own})
        pq.write_table(table, folder / name, row_group_size=5)
    return folder


def opened(path: Path, group_by: str | None, said: list[str] | None = None) -> DataSets:
    say = (lambda _: None) if said is None else said.append
    data = DataConfig(str(path), group_by=group_by)
    return open_data(data, Location.of(path.parent / "runs"), say, build=None)  # type: ignore[arg-type]


def paths_of(sample: Sample) -> list[str]:
    """The path of each image of a sample."""
    first = np.cumsum([0, *sample.shards.group_rows])
    columns = [pq.read_table(file.uri).column("image") for file in sample.shards.files]
    paths = [image["path"] for column in columns for image in column.to_pylist()]
    places = zip(sample.groups, sample.rows, strict=True)
    return [paths[first[group] + row] for group, row in places]


def sides(path: Path, group_by: str, *limits: int) -> list[list[str]]:
    return [paths_of(s) for s in opened(path, group_by).samples(2, *(limits or (1000, 1000)))]


def patient(path: str) -> str:
    return path.partition("/")[2].partition("_")[0]


@pytest.mark.parametrize("group_by", ["patient", r"(p\d+)_", r"^(\w+)/(p\d+)"])
def test_no_group_is_on_both_sides_and_about_a_fifth_is_held_out(tmp_path, group_by):
    folder = scans(tmp_path / "set", {"a.parquet": list(range(len(ROWS)))})
    train, test = sides(folder, group_by)
    assert sorted(train + test) == sorted(path for path, _ in ROWS)
    assert not set(map(patient, train)) & set(map(patient, test))
    assert 0.1 * len(ROWS) < len(test) <= 0.2 * len(ROWS)
    assert len(set(map(patient, test))) > 2


def test_the_split_does_not_depend_on_the_order_of_files_and_rows(tmp_path):
    rows = list(range(len(ROWS)))
    mixed = np.random.default_rng(0).permutation(rows).tolist()
    one = scans(tmp_path / "one", {"a.parquet": rows})
    many = scans(tmp_path / "many", {"z.parquet": mixed[:30], "b.parquet": mixed[30:]})
    assert sides(one, "patient") == sides(many, "patient") == sides(one, r"/(p\d+)")
    limited = sides(many, "patient", 20, 5)
    assert limited == sides(one, "patient", 20, 5)
    assert [len(side) for side in limited] == [20, 5]


def test_the_understood_line_counts_groups_and_images_without_one(tmp_path):
    folder = scans(tmp_path / "set", {"a.parquet": list(range(len(ROWS)))})
    said: list[str] = []
    train, test = opened(folder, r"(p1\d|p2\d)", said).samples(2, 1000, 1000)
    line = next(line for line in said if "groups" in line)
    few = sum(count for name, count in PATIENTS.items() if len(name) == 2)
    assert line.startswith("16 groups: ")
    assert f"({len(train.rows)} images) for train" in line
    assert f"({len(test.rows)} images) held out for the test" in line
    assert line.endswith(f"; {few} images have no group and count as one")


def test_groups_that_given_test_images_share_with_train_are_told(tmp_path):
    rows = list(range(len(ROWS)))
    last = [row for row in rows if ROWS[row][1] in ("p23", "p24")]
    rest = [row for row in rows if row not in last]
    leaks = scans(tmp_path / "leaks", {"train.parquet": rest + last[:1], "test.parquet": last[1:]})
    sound = scans(tmp_path / "sound", {"train.parquet": rest, "test.parquet": last})
    said: list[list[str]] = [[], []]
    opened(leaks, "patient", said[0])
    opened(sound, "patient", said[1])
    assert any("1 of the 2 groups of the test images are among the train" in x for x in said[0])
    assert "none of the 2 groups of the test images is among the train images" in said[1]


@pytest.mark.parametrize(
    ("group_by", "error"),
    [
        ("patients", "has no column patients, only image, label, patient, clinic; give one of"),
        (r"p\d+", r"has no group in parentheses.*write '\(p\\d\+\)'"),
        (r"(q\d+)", "matches no path, such as clinic/p0_0.png"),
        (r"(p\d+", "is no regular expression: missing"),
        ("label", "is the column of the labels"),
        ("clinic", "puts all .* images of .* into one group"),
        (r"^(\w+)/", "puts all .* images of .* into one group"),
    ],
)
def test_a_group_by_that_cannot_be_meant_is_refused_by_name(tmp_path, group_by, error):
    folder = scans(
        tmp_path / "set", {"a.parquet": list(range(len(ROWS)))}, clinic=["north"] * len(ROWS)
    )
    with pytest.raises(ValueError, match=f"data.group_by.*{error}"):
        opened(folder, group_by)


@pytest.mark.parametrize("kind", ["table", "parquet"])
def test_a_build_keeps_the_column_of_groups_which_then_splits(tmp_path, kind):
    source = tmp_path / "in"
    if kind == "parquet":
        scans(source, {"a.parquet": list(range(len(ROWS)))})
    else:
        lines = ["file_name,label,patient"]
        for row, (path, patient_of_row) in enumerate(ROWS):
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(picture(row))
            lines.append(f"{path},{row % 2},{patient_of_row}")
        (source / "metadata.csv").write_text("\n".join(lines))
    built = Location.of(tmp_path / "shards")
    manifest = build_here(Location.of(source), built, BuildOptions(group_column="patient"))
    assert [_check_shard(built, shard, True, None)[1] for shard in manifest.shards] == [[]]
    train, test = sides(tmp_path / "shards", "group")
    assert sorted(train + test) == sorted(path for path, _ in ROWS)
    assert sides(tmp_path / "shards", r"/(p\d+)") == [train, test]
    with pytest.raises(ValueError, match=r"--group-column who is not in .* has .*patient"):
        make_plan(Location.of(source), BuildOptions(group_column="who"))


def test_a_column_of_groups_needs_columns(tmp_path):
    write(tmp_path, {"in/a.png": picture(0)})
    with pytest.raises(ValueError, match=r"--group-column who: .* has no table of columns"):
        make_plan(Location.of(tmp_path / "in"), BuildOptions(group_column="who"))
