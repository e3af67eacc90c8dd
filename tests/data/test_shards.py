"""Images -> Parquet shards: every kind of source, of broken file and of interruption."""

import hashlib
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from pyarrow import fs

from helpers import wait_for, write, write_tar
from selfray.cluster import build as builder
from selfray.cluster.build import BuildOptions, Manifest, build, check
from selfray.cluster.endings import RunFailed
from selfray.data import destination, rows, samples, writer
from selfray.data.writer import write_arrays
from selfray.storage import Location

PLATFORM = str(Path(__file__).resolve().parents[2] / "platform")
pytestmark = pytest.mark.usefixtures("ray_session")

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(seed: int, size: tuple[int, int] = (24, 16), kind: str = "JPEG") -> bytes:
    """An encoded image of noise; every seed gives other bytes."""
    pixels = random.Random(seed).randbytes(size[0] * size[1] * 3)
    file = io.BytesIO()
    Image.frombytes("RGB", size, pixels).save(file, kind)
    return file.getvalue()


def bomb() -> bytes:
    """A small PNG whose header declares 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def table_of(folder: Path) -> pa.Table:
    manifest = Manifest.load(str(folder))
    return pa.concat_tables(pq.read_table(folder / shard.name) for shard in manifest.shards)


def rows_of(folder: Path) -> dict[str, bytes]:
    return {row["path"]: row["bytes"] for row in table_of(folder).column("image").to_pylist()}


def labels_of(folder: Path) -> dict[str, int]:
    rows = table_of(folder).to_pylist()
    return {row["image"]["path"]: row["label"] for row in rows}


def quarantine_of(folder: Path) -> dict[str, str]:
    lines = (folder / "quarantine.jsonl").read_text().splitlines()
    return {entry["file"]: entry["reason"] for entry in map(json.loads, lines)}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# Sources


def test_a_folder_of_images_becomes_shards_that_hold_its_very_bytes(tmp_path):
    files = {f"deep/er/{i}.jpg": picture(i) for i in range(20)} | {"a.png": picture(99, kind="PNG")}
    source = write(tmp_path / "source", files)
    manifest = build(source, tmp_path / "out", BuildOptions(shard_bytes=5000))
    assert rows_of(tmp_path / "out") == files
    assert len(manifest.shards) > 2
    assert (manifest.images, manifest.formats) == (21, {"JPEG": 20, "PNG": 1})
    assert manifest.labels is None
    assert (manifest.image_width.median, manifest.image_height.max) == (24, 16)
    assert Manifest.load(tmp_path / "out") == manifest
    assert sorted(contents(tmp_path / "out")) == sorted(
        [shard.name for shard in manifest.shards] + ["manifest.json", "quarantine.jsonl"]
    )


def test_the_shards_are_in_hugging_face_layout_and_uncompressed(tmp_path):
    write(tmp_path / "source", {f"{name}/{i}.jpg": picture(i) for i in range(3) for name in "ab"})
    build(tmp_path / "source", tmp_path / "out")
    file = pq.ParquetFile(tmp_path / "out" / "shard-00000.parquet")
    assert file.schema_arrow.field("image").type == IMAGE_TYPE
    assert file.schema_arrow.field("label").type == pa.int64()
    assert file.metadata.row_group(0).column(0).compression == "UNCOMPRESSED"
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features == {
        "image": {"_type": "Image"},
        "label": {"names": ["a", "b"], "_type": "ClassLabel"},
    }


def test_class_folders_become_labels(tmp_path):
    files = {f"{name}/{i}.jpg": picture(i) for i in range(4) for name in ("dog", "cat")}
    source = write(tmp_path / "source", files | {"README.md": b"two classes"})
    manifest = build(source, tmp_path / "out")
    assert manifest.labels == builder.Labels(("cat", "dog"), {"cat": 4, "dog": 4}, 0)
    assert labels_of(tmp_path / "out") == {name: int("dog" in name) for name in files}
    unlabelled = build(source, tmp_path / "none", BuildOptions(labels="none"))
    assert unlabelled.labels is None


@pytest.mark.parametrize(
    "names", [["a/1.jpg", "a/2.jpg"], ["a/1.jpg", "b/1.jpg", "2.jpg", "3.jpg"], ["images/1.jpg"]]
)
def test_folders_that_are_not_clearly_classes_give_no_labels(tmp_path, names):
    write(tmp_path, {name: picture(i) for i, name in enumerate(names)})
    plan = builder.make_plan(Location.of(tmp_path), BuildOptions())
    assert plan.layout.label_names is None


def test_labels_folders_takes_the_first_folder_whatever_lies_deeper(tmp_path):
    write(tmp_path, {"a/b/1.jpg": picture(1), "c/2.jpg": picture(2)})
    plan = builder.make_plan(Location.of(tmp_path), BuildOptions(labels="folders"))
    assert plan.layout.label_names == ("a", "c")
    write(tmp_path, {"3.jpg": picture(3)})
    with pytest.raises(ValueError, match=r"holds 3\.jpg itself"):
        builder.make_plan(Location.of(tmp_path), BuildOptions(labels="folders"))


def test_webdataset_tars_give_one_row_for_each_key(tmp_path):
    source = tmp_path / "tars"
    for archive in range(3):
        members = {}
        for i in range(4):
            members[f"./d/{i}.jpg"] = picture(10 * archive + i)
            members[f"./d/{i}.cls"] = f"{i % 2}\n".encode()
            members[f"./d/{i}.json"] = b"{}"
        write_tar(source / f"{archive}.tar", members)
    manifest = build(source, tmp_path / "out")
    assert rows_of(tmp_path / "out")["1.tar!./d/2.jpg"] == picture(12)
    assert labels_of(tmp_path / "out")["1.tar!./d/3.jpg"] == 1
    assert manifest.labels == builder.Labels(None, {"0": 6, "1": 6}, 0)
    assert (manifest.images, manifest.quarantined.count) == (12, 0)


def test_a_tar_larger_than_a_shard_becomes_several_shards(tmp_path):
    members = {f"{i:02d}.jpg": picture(i) for i in range(30)}
    source = write_tar(tmp_path / "one.tar", members)
    manifest = build(source, tmp_path / "out", BuildOptions(shard_bytes=10_000))
    assert len(manifest.shards) >= 3
    assert rows_of(tmp_path / "out") == {f"one.tar!{name}": data for name, data in members.items()}
    paths = [row["path"] for row in table_of(tmp_path / "out").column("image").to_pylist()]
    assert paths != sorted(paths)

    before = contents(tmp_path / "out")
    (tmp_path / "out" / manifest.shards[1].name).unlink()
    kept = [
        tmp_path / "out" / shard.name for shard in manifest.shards if shard != manifest.shards[1]
    ]
    times = [file.stat().st_mtime_ns for file in kept]
    build(source, tmp_path / "out", BuildOptions(shard_bytes=10_000))
    assert contents(tmp_path / "out") == before
    assert [file.stat().st_mtime_ns for file in kept] == times


def test_what_is_odd_in_a_tar_is_quarantined_and_the_rest_kept(tmp_path):
    write_tar(
        tmp_path / "source" / "a.tar",
        {
            "1.jpg": picture(1),
            "1.cls": b"7",
            "2.txt": b"no image here",
            "3.mask.png": picture(4, kind="PNG"),
            "3.jpg": picture(3),
            "4.jpg": b"",
        },
    )
    manifest = build(tmp_path / "source", tmp_path / "out")
    assert labels_of(tmp_path / "out") == {"a.tar!1.jpg": 7, "a.tar!3.jpg": -1}
    assert manifest.labels == builder.Labels(None, {"7": 1}, 1)
    assert quarantine_of(tmp_path / "out") == {
        "a.tar!2": "no image",
        "a.tar!3.mask.png": "second image",
        "a.tar!4.jpg": "empty",
    }


@pytest.mark.parametrize("damage", ["cut in a member", "cut at a member", "header", "no tar"])
def test_a_damaged_tar_is_quarantined_with_what_was_salvaged_before(tmp_path, damage):
    source = tmp_path / "source"
    whole = write_tar(source / "b.tar", {f"{i}.jpg": picture(i) for i in range(4)}).read_bytes()
    third = 2 * (512 + -(-len(picture(0)) // 512) * 512)
    assert whole[third : third + 5] == b"2.jpg"
    damaged = {
        "cut in a member": whole[: third + 600],
        "cut at a member": whole[:third],
        "header": whole[:third] + b"\xff" * 512 + whole[third + 512 :],
        "no tar": b"x" * 2000,
    }[damage]
    (source / "b.tar").write_bytes(damaged)
    write_tar(source / "a.tar", {"x.jpg": picture(9)})
    manifest = build(source, tmp_path / "out")
    salvaged = set() if damage == "no tar" else {"b.tar!0.jpg", "b.tar!1.jpg"}
    assert set(rows_of(tmp_path / "out")) == {"a.tar!x.jpg"} | salvaged
    assert quarantine_of(tmp_path / "out") == {"b.tar": "unreadable"}
    assert manifest.quarantined.reasons == {"unreadable": 1}


def hugging_face_file(path: Path, first: int, count: int, column: str = "image") -> None:
    rows = [{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(first, first + count)]
    metadata = {"label": {"names": ["even", "odd"], "_type": "ClassLabel"}}
    schema = pa.schema(
        [(column, IMAGE_TYPE), ("label", pa.int32())],
        metadata={"huggingface": json.dumps({"info": {"features": metadata}})},
    )
    labels = [i % 2 for i in range(first, first + count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table([rows, labels], schema=schema), path, row_group_size=3)


def test_hugging_face_parquet_keeps_paths_labels_and_class_names(tmp_path):
    for i in range(2):
        hugging_face_file(tmp_path / "source" / "data" / f"{i}.parquet", 10 * i, 7, column="img")
    manifest = build(tmp_path / "source", tmp_path / "out", BuildOptions(shard_bytes=4000))
    assert rows_of(tmp_path / "out")["12.jpg"] == picture(12)
    assert labels_of(tmp_path / "out")["13.jpg"] == 1
    assert manifest.labels == builder.Labels(("even", "odd"), {"even": 8, "odd": 6}, 0)
    assert len(manifest.shards) > 1


def test_a_plain_binary_column_of_parquet_is_read_and_broken_rows_are_named(tmp_path):
    rows = [picture(0), b"", None, b"plain text", picture(4)]
    (tmp_path / "source").mkdir()
    table = pa.table({"photo": pa.array(rows, pa.binary()), "caption": ["x"] * 5})
    pq.write_table(table, tmp_path / "source" / "p.parquet", row_group_size=2)
    (tmp_path / "source" / "q.parquet").write_bytes(b"PAR1 broken")
    manifest = build(tmp_path / "source" / "p.parquet", tmp_path / "file")
    assert manifest.quarantined.count == 3
    manifest = build(tmp_path / "source", tmp_path / "out")
    assert rows_of(tmp_path / "out") == {"p.parquet#row 0": rows[0], "p.parquet#row 4": rows[4]}
    assert quarantine_of(tmp_path / "out") == {
        "p.parquet#row 1": "empty",
        "p.parquet#row 2": "no image",
        "p.parquet#row 3": "not an image",
        "q.parquet": "unreadable",
    }


def test_a_damaged_row_group_costs_only_its_own_rows(tmp_path):
    path = tmp_path / "source" / "a.parquet"
    hugging_face_file(path, 0, 9)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    build(tmp_path / "source", tmp_path / "out")
    assert set(rows_of(tmp_path / "out")) == {f"{i}.jpg" for i in (0, 1, 2, 6, 7, 8)}
    assert quarantine_of(tmp_path / "out") == {"a.parquet": "unreadable"}


# Quarantine


def test_every_kind_of_broken_file_is_quarantined_with_its_reason(tmp_path):
    whole = picture(1, size=(64, 64))
    source = write(
        tmp_path / "source",
        {
            "good.jpg": whole,
            "no_extension": picture(2),
            "empty.jpg": b"",
            "notes.txt": b"these are my holidays",
            "text.jpg": b"not really",
            "cut.jpg": whole[: len(whole) // 2],
            "bomb.png": bomb(),
            ".DS_Store": b"x",
            "Thumbs.db": b"x",
            ".cache/thumb.jpg": b"x",
        },
    )
    (source / "link.jpg").symlink_to("nowhere")
    (source / "circle").symlink_to(source)
    os.mkfifo(source / "pipe.jpg")
    Path(os.fsdecode(bytes(source) + b"/caf\xe9.jpg")).write_bytes(whole)  # Latin-1, not UTF-8
    manifest = build(source, tmp_path / "out")
    assert set(rows_of(tmp_path / "out")) == {"good.jpg", "no_extension"}
    assert quarantine_of(tmp_path / "out") == {
        "empty.jpg": "empty",
        "notes.txt": "not an image",
        "text.jpg": "not an image",
        "cut.jpg": "truncated",
        "bomb.png": "too large",
        "link.jpg": "unreadable",
        "circle": "unreadable",
        "pipe.jpg": "unreadable",
        "caf\\udce9.jpg": "unreadable",
    }
    assert manifest.quarantined.count == 9
    assert manifest.quarantined.reasons["not an image"] == 2
    assert check(tmp_path / "out", deep=True).ok


def test_what_may_not_be_opened_is_quarantined():
    # Not tmp_path: only its owner may enter that, and this test becomes another user.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        source.chmod(0o755)
        write(source, {"a.jpg": picture(1), "b.jpg": picture(2), "c/d.jpg": picture(3)})
        (source / "b.jpg").chmod(0)
        (source / "c").chmod(0)
        if os.geteuid() == 0:  # root may open everything
            os.seteuid(65534)
        try:
            plan = builder.make_plan(Location.of(source), BuildOptions())
            rows = list(samples.read_samples(plan.source, plan.layout, plan.items[0].inputs))
        finally:
            os.seteuid(os.getuid())
            (source / "c").chmod(0o755)
    assert [entry.file for entry in plan.quarantined] == ["c"]
    assert [row.file for row in rows if isinstance(row, builder.Quarantined)] == ["b.jpg"]


def test_an_outage_of_remote_storage_stops_the_build_and_quarantines_nothing(tmp_path):
    remote = Location(fs.SubTreeFileSystem("/", fs.LocalFileSystem()), str(tmp_path)[1:], "s3://x")
    with pytest.raises(OSError, match="AWS Error NETWORK_CONNECTION"):
        rows.raise_if_outage(OSError("AWS Error NETWORK_CONNECTION"), remote)
    rows.raise_if_outage(OSError("AWS Error ACCESS_DENIED"), remote)
    rows.raise_if_outage(OSError("a bad sector"), Location.of(tmp_path))


# Properties of a build


def test_shards_are_shuffled_over_the_whole_source_and_byte_identical_for_one_seed(tmp_path):
    files = {f"{name}/{i}.jpg": picture(i) for i in range(15) for name in "abc"}
    source = write(tmp_path / "source", files)
    options = BuildOptions(shard_bytes=8000)
    build(source, tmp_path / "one", options)
    build(source, tmp_path / "two", options)
    build(source, tmp_path / "three", BuildOptions(shard_bytes=8000, seed=1))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "three")
    assert list(rows_of(tmp_path / "one")) != list(rows_of(tmp_path / "three"))
    for shard in Manifest.load(tmp_path / "one").shards:
        assert len(set(pq.read_table(tmp_path / "one" / shard.name)["label"].to_pylist())) > 1


def test_max_side_shrinks_large_images_and_leaves_small_ones_alone(tmp_path):
    source = write(tmp_path / "source", {"a.png": picture(1, (80, 40), "PNG"), "b.jpg": picture(2)})
    manifest = build(source, tmp_path / "out", BuildOptions(max_side=32))
    rows = rows_of(tmp_path / "out")
    assert Image.open(io.BytesIO(rows["a.png"])).size == (32, 16)
    assert rows["b.jpg"] == picture(2)
    assert manifest.max_side == 32
    assert manifest.image_width == builder.Spread(24, 24, 32)
    assert manifest.formats == {"JPEG": 2}


def test_row_groups_close_at_their_bytes_or_rows_whichever_is_first(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ROW_GROUP_ROWS", 4)
    images = [picture(i) for i in range(10)]
    assert write_arrays(tmp_path / "rows", images).shards[0].row_groups == (4, 4, 2)
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", 3 * len(images[0]) + 200)
    assert write_arrays(tmp_path / "bytes", images).shards[0].row_groups == (3, 3, 3, 1)


def test_a_source_that_is_not_local_gives_the_same_shards(tmp_path):
    write(tmp_path / "source", {f"{name}/{i}.jpg": picture(i) for i in range(30) for name in "ab"})
    filesystem = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    build(tmp_path / "source", tmp_path / "local")
    build(
        Location(filesystem, "source", "s3://bucket/source"),
        Location(filesystem, "remote", "s3://bucket/remote"),
    )
    assert rows_of(tmp_path / "remote") == rows_of(tmp_path / "local")
    assert check(Location(filesystem, "remote", "s3://bucket/remote"), deep=True).ok


def test_progress_counts_up_to_the_whole(tmp_path):
    source = write(tmp_path / "source", {f"{i}.jpg": picture(i) for i in range(20)} | {"x": b"-"})
    seen: list[builder.Progress] = []
    manifest = build(source, tmp_path / "out", BuildOptions(shard_bytes=5000), seen.append)
    assert (seen[0].images_done, seen[0].images_total, seen[0].shards_done) == (0, 21, 0)
    last = seen[-1]
    assert (last.images_done, last.quarantined) == (20, 1)
    assert last.shards_done == last.shards_total == len(manifest.shards)
    assert last.bytes == manifest.bytes
    assert [p.shards_done for p in seen] == sorted(p.shards_done for p in seen)


# Interruption and repetition

BUILD_SCRIPT = """
import sys
from selfray.cluster import runtime
from selfray.cluster.build import BuildOptions, build
with runtime.session(sys.argv[1]):
    build(sys.argv[3], sys.argv[4], BuildOptions(shard_bytes=int(sys.argv[5]), max_side=64))
"""


def test_a_killed_build_is_finished_by_running_it_again(tmp_path):
    images = [picture(i, (500, 400)) for i in range(4)]
    files = {f"{i}.jpg": images[i % 4] for i in range(90)} | {"bad.jpg": b"bad"}
    source, out = write(tmp_path / "source", files), tmp_path / "out"
    shard_bytes = 5 * len(images[0])
    options = BuildOptions(shard_bytes=shard_bytes, max_side=64)
    address = ray.get_runtime_context().gcs_address
    arguments = [address, PLATFORM, str(source), str(out), str(shard_bytes)]
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD_SCRIPT, *arguments], env={**os.environ, "PYTHONPATH": PLATFORM}
    )
    wait_for("a shard", lambda: list(out.glob("_build/shard-*.json")), 0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    (problem,) = check(out).problems
    assert "run the same `selfray shards build` again" in problem
    records = list(out.glob("_build/shard-*.parquet.json"))
    finished = {
        r.name.removesuffix(".json"): (out / r.name.removesuffix(".json")).stat() for r in records
    }
    assert finished
    (out / "shard-00017.parquet.123.tmp").write_bytes(b"half a shard")

    with pytest.raises(ValueError, match=r"unfinished build of something else .seed was 0, now 3"):
        build(source, out, BuildOptions(shard_bytes=shard_bytes, max_side=64, seed=3))
    seen: list[builder.Progress] = []
    build(source, out, options, seen.append)
    assert any("continuing" in progress.note for progress in seen)
    build(source, tmp_path / "uninterrupted", options)
    assert contents(out) == contents(tmp_path / "uninterrupted")
    for name, before in finished.items():
        assert (out / name).stat().st_mtime_ns == before.st_mtime_ns


def test_a_complete_build_is_returned_at_once_and_lost_shards_are_built_again(tmp_path):
    files = {f"{i}.jpg": picture(i) for i in range(20)} | {"x.jpg": b"broken"}
    source, out = write(tmp_path / "source", files), tmp_path / "out"
    options = BuildOptions(shard_bytes=5000)
    first = build(source, out, options)
    before = contents(out)
    seen: list[builder.Progress] = []
    assert build(source, out, options, seen.append) == first
    assert "complete" in seen[0].note
    assert seen[0].shards_done == seen[0].shards_total
    (out / first.shards[1].name).unlink()
    assert build(source, out, options) == first
    assert contents(out) == before


def test_storage_that_fails_on_the_way_says_how_to_go_on(tmp_path):
    source, out = write(tmp_path / "source", {"a.jpg": picture(1)}), tmp_path / "out"
    destination.start(Location.of(out), builder.make_plan(Location.of(source), BuildOptions()))
    (out / "shard-00000.parquet").mkdir()  # in the way of the shard
    with pytest.raises(RunFailed, match=r"build of .*/out stopped: .*run the same build again"):
        build(source, out)
    (out / "shard-00000.parquet").rmdir()
    assert build(source, out).images == 1


def test_another_source_or_option_or_folder_is_refused_with_the_difference(tmp_path):
    source = write(tmp_path / "source", {f"{i}.jpg": picture(i) for i in range(3)})
    build(source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"a complete build .*max_side was None, now 9.*delete"):
        build(source, tmp_path / "out", BuildOptions(max_side=9))
    other = write(tmp_path / "other", {"1.jpg": picture(1)})
    with pytest.raises(ValueError, match=r"source was .*/source, now .*/other"):
        build(other, tmp_path / "out")
    write(source, {"new.jpg": picture(7)})
    with pytest.raises(ValueError, match="the source had 3 files"):
        build(source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"other holds other files \(1\.jpg\)|other files"):
        build(source, other)


# Checking


def test_check_names_every_problem_and_the_way_out(tmp_path):
    source = write(tmp_path / "source", {f"{i}.jpg": picture(i) for i in range(30)})
    out = tmp_path / "out"
    names = [s.name for s in build(source, out, BuildOptions(shard_bytes=5000)).shards]
    assert check(out) == builder.CheckReport(
        str(out), len(names), 30, sum((out / name).stat().st_size for name in names), ()
    )
    data = bytearray((out / names[0]).read_bytes())
    data[100] ^= 1
    (out / names[0]).write_bytes(data)
    (out / names[1]).write_bytes(b"short")
    (out / names[2]).unlink()
    (out / "extra.parquet").write_bytes(b"x")
    (out / "shard-00000.parquet.9.tmp").write_bytes(b"x")
    (out / "quarantine.jsonl").unlink()
    (out / "quarantine.jsonl").write_text("{}\n")
    report = check(out)
    assert not report.ok
    expected = {
        names[0]: "its sha256 is not the manifest's; delete it and run the same build again",
        names[1]: "5 bytes instead of",
        names[2]: "missing; run the same build again",
        "extra.parquet": "delete it",
        "shard-00000.parquet.9.tmp": "delete it",
        "quarantine.jsonl": "1 entries instead of 0",
    }
    assert len(report.problems) == len(expected)
    for name, text in expected.items():
        (line,) = [line for line in report.problems if line.startswith(f"{out / name}:")]
        assert text in line
        assert "\n" not in line


def test_deep_check_decodes_every_image(tmp_path):
    write_arrays(tmp_path, [picture(1), picture(2)], names=["a", "b"])
    manifest = Manifest.load(tmp_path).to_json()
    path = tmp_path / manifest["shards"][0]["name"]
    good, data = picture(2), path.read_bytes()
    path.write_bytes(data.replace(good, b"\x00" * len(good)))
    manifest["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert check(tmp_path).ok
    (problem,) = check(tmp_path, deep=True).problems
    assert f"{path}#row 1: not an image" in problem


# Direct writing


def test_write_arrays_keeps_order_and_finds_its_result_again(tmp_path):
    images = [picture(i) for i in range(7)]
    arguments = {"labels": [0, 1, 2, 0, 1, 2, 0], "label_names": ["x", "y", "z"]}
    manifest = write_arrays(tmp_path / "out", images, rows_per_shard=3, **arguments)
    assert [shard.rows for shard in manifest.shards] == [3, 3, 1]
    assert list(rows_of(tmp_path / "out").values()) == images
    assert table_of(tmp_path / "out")["label"].to_pylist() == arguments["labels"]
    assert manifest.labels == builder.Labels(("x", "y", "z"), {"x": 3, "y": 2, "z": 2}, 0)
    assert write_arrays(tmp_path / "out", images, rows_per_shard=3, **arguments) == manifest
    assert check(tmp_path / "out", deep=True).ok
    with pytest.raises(ValueError, match="a complete build of something else"):
        write_arrays(tmp_path / "out", images[:5])


def test_write_arrays_refuses_a_broken_image_and_leaves_the_folder_alone(tmp_path):
    with pytest.raises(ValueError, match="image 000001 is broken: not an image"):
        write_arrays(tmp_path / "out", [picture(1), b"text"])
    with pytest.raises(ValueError, match="labels must have one entry for each of the 1 images"):
        write_arrays(tmp_path / "out", [picture(1)], labels=[1, 2])
    assert not (tmp_path / "out").exists()


# Bad input


def test_bad_sources_and_destinations_are_named_in_one_line(tmp_path):
    def refused(match: str, source: Path, out: Path, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=match) as caught:
            build(source, out)
        assert "\n" not in str(caught.value)
        assert str(source) in str(caught.value) or str(out) in str(caught.value)

    out, empty, good = tmp_path / "out", tmp_path / "empty", tmp_path / "good"
    empty.mkdir()
    write(good, {"a.jpg": picture(1), "b.jpg": picture(2)})
    refused("does not exist", tmp_path / "missing", out, FileNotFoundError)
    refused("is empty", empty, out)
    refused("neither .tar nor .parquet", good / "a.jpg", out)
    refused("lies inside the source", good, good / "shards")
    refused("lies inside the source", good, good)
    (tmp_path / "file").write_text("x")
    refused("cannot be (written|listed)", good, tmp_path / "file" / "below")
    refused("cannot be listed", good, tmp_path / "file")
    mixed = write(tmp_path / "mixed", {"a.jpg": picture(1), "b.tar": b""})
    refused(r"several kinds \(1 images, 1 tar\)", mixed, out)
    table = pa.table({"text": ["a"], "number": [1]})
    (tmp_path / "parquet").mkdir()
    pq.write_table(table, tmp_path / "parquet" / "p.parquet")
    refused("no image column .*are text: string, number: int64", tmp_path / "parquet", out)
    two = pa.table({"left": pa.array([b"x"]), "right": pa.array([b"x"])})
    pq.write_table(two, tmp_path / "parquet" / "p.parquet")
    refused(r"\(left, right\): choose one with --data.image-column", tmp_path / "parquet", out)
    (tmp_path / "parquet" / "p.parquet").write_bytes(b"nothing")
    refused("none of the 1 Parquet files .* can be read", tmp_path / "parquet", out)
    assert not out.exists()
    text = write(tmp_path / "text", {"a.txt": b"hello", "b.txt": b""})
    refused(r"holds no readable image: all 2 files were refused \(", text, out)
    assert list(out.iterdir()) == []
    build(good, out)


def test_options_are_validated_by_name():
    for name, value in [("max_side", 0), ("shard_bytes", 0), ("max_pixels", -1), ("labels", "x")]:
        with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
            BuildOptions(**{name: value})


def test_a_manifest_of_another_version_is_refused(tmp_path):
    write_arrays(tmp_path, [picture(1)])
    value = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(value | {"version": 2}))
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read: .*version 2"):
        Manifest.load(tmp_path)
