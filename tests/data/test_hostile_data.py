"""Damaged and hostile files of data: what they cost, and what is said of them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_data_layouts import build_here, images, picture

from selfray.data.data_sets import as_started
from selfray.data.destination import open_destination, read_records, start
from selfray.data.files import Quarantined
from selfray.data.listing import make_plan
from selfray.data.manifest import Manifest
from selfray.data.options import BuildOptions
from selfray.data.reader import read_chosen
from selfray.data.row_cache import RowGroupCache
from selfray.data.rows import Sample
from selfray.data.shard_set import ShardSet, open_shards
from selfray.data.tar import MAX_HEADER_BYTES, read_tar
from selfray.data.writer import write_arrays
from selfray.storage import Location

# Flipped bits

COUNT = 40


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[bytes], list[int]]:
    """A shard as it is written, its images and labels."""
    folder = tmp_path_factory.mktemp("sound")
    data = [picture(i) for i in range(COUNT)]
    labels = [i % 5 for i in range(COUNT)]
    manifest = write_arrays(folder, data, labels, label_names="abcde")
    return (folder / manifest.shards[0].name).read_bytes(), data, labels


def opened(path: Path, content: bytes) -> ShardSet:
    path.write_bytes(content)
    return open_shards([str(path)], str(path))


@pytest.mark.parametrize("one_by_one", [False, True], ids=["whole row groups", "one by one"])
def test_a_flipped_bit_is_never_read_in_silence(tmp_path, sound, one_by_one):
    content, data, labels = sound
    path = tmp_path / "x.parquet"
    groups, rows = np.zeros(COUNT, int), np.arange(COUNT)
    rng = np.random.default_rng(0)
    told = 0
    for at in rng.integers(4, len(content) - 4, 150).tolist():
        flipped = bytearray(content)
        flipped[at] ^= 1 << int(rng.integers(8))
        try:
            shards = opened(path, bytes(flipped))
        except ValueError:  # in the footer
            told += 1
            continue
        cache = RowGroupCache(2**20)
        if one_by_one:  # as where the cache is full
            full = write_arrays(tmp_path / "other", [b"".join([data[0]])])
            other = open_shards([f"{tmp_path}/other/{full.shards[0].name}"], "other")
            read_chosen(other, np.zeros(1, int), np.zeros(1, int), cache)
            cache.limit_bytes = 1
        chosen = read_chosen(shards, groups, rows, cache)
        told += bool(chosen.unreadable or shards.notes)
        for row in set(range(COUNT)) - set(chosen.unreadable):
            assert chosen.images[row] == data[row]
            assert chosen.labels[row] in (labels[row], -1)
            assert chosen.labels[row] == labels[row] or shards.notes
    assert told > 100


def test_a_damaged_image_costs_its_own_row(tmp_path, sound):
    content, data, labels = sound
    at = content.index(data[7]) + len(data[7]) // 2
    damaged = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    shards = opened(tmp_path / "x.parquet", damaged)
    chosen = read_chosen(shards, np.zeros(COUNT, int), np.arange(COUNT), RowGroupCache(2**20))
    assert list(chosen.unreadable) == [7]
    assert str(chosen.unreadable[7]).startswith(f"{tmp_path}/x.parquet row 7: damaged")
    assert chosen.images[:7] + chosen.images[8:] == data[:7] + data[8:]
    assert chosen.labels.tolist() == labels


def test_metadata_that_was_copied_to_other_rows_is_not_believed(tmp_path, sound):
    content, data, labels = sound
    (tmp_path / "x.parquet").write_bytes(content)
    table = pq.read_table(tmp_path / "x.parquet")
    pq.write_table(table.slice(1).take(list(range(COUNT - 1))[::-1]), tmp_path / "y.parquet")
    shards = open_shards([str(tmp_path / "y.parquet")], "y")
    chosen = read_chosen(shards, np.zeros(COUNT - 1, int), np.arange(COUNT - 1))
    assert not chosen.unreadable
    assert chosen.images == data[:0:-1]
    assert chosen.labels.tolist() == labels[:0:-1]


# Tars


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **more: object) -> bytes:
    """One member of a tar as its bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    for field, value in more.items():
        setattr(info, field, value)
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return header + data + b"\0" * (-len(data) % 512)


END = b"\0" * 1024


def read(tmp_path: Path, *members: bytes, end: bytes = END) -> tuple[list[str], dict[str, str]]:
    """(names of the images kept, what is said of each refused member)."""
    (tmp_path / "x.tar").write_bytes(b"".join(members) + end)
    rows = list(read_tar(Location.of(tmp_path), "x.tar"))
    kept = [row.name.partition("!")[2] for row in rows if isinstance(row, Sample)]
    refused = [row for row in rows if isinstance(row, Quarantined)]
    return kept, {row.file.partition("!")[2]: row.message for row in refused}


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (member("b.png", kind=tarfile.SYMTYPE, linkname="a.png"), "a symbolic link"),
        (member("b.png", kind=tarfile.LNKTYPE, linkname="a.png"), "a hard link"),
        (member("b.png", kind=tarfile.CHRTYPE, devmajor=1, devminor=5), "a device"),
        (member("b.png", kind=tarfile.BLKTYPE), "a device"),
        (member("b.png", kind=tarfile.FIFOTYPE), "a pipe"),
        (member("b.png", b"x", kind=b"Z"), "of unknown type"),
        (member("/b.png", picture(1)), "leads out of the archive"),
        (member("../b.png", picture(1)), "leads out of the archive"),
        (member("a/../../b.png", picture(1)), "leads out of the archive"),
        (member("b.cls", b"1" * 100_000), "a label of 100,000 bytes"),
    ],
)
def test_an_odd_member_is_quarantined_and_the_rest_is_kept(tmp_path, odd, said):
    kept, refused = read(tmp_path, member("a.png", picture(0)), odd, member("z.png", picture(2)))
    assert kept == ["a.png", "z.png"]
    assert len(refused) == 1
    assert said in next(iter(refused.values()))


def test_a_sparse_member_is_quarantined(tmp_path):
    header = bytearray(member("b.png", b"x" * 512, kind=tarfile.GNUTYPE_SPARSE))
    header[386 : 386 + 24] = b"00000000000\x0000000001000\0"[:24]
    header[483:495] = b"77777777777\0"  # a real size of 8 GiB
    header[148:156] = b"        "
    header[148:156] = f"{sum(header[:512]):06o}\0 ".encode()
    kept, refused = read(tmp_path, bytes(header), member("z.png", picture(2)))
    assert kept == ["z.png"]
    assert "a sparse file" in refused["b.png"]


def test_names_of_any_encoding_become_text(tmp_path):
    info = tarfile.TarInfo("caf\udce9.png")
    info.size = len(picture(0))
    raw = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + picture(0)
    kept, refused = read(tmp_path, raw + b"\0" * (-len(picture(0)) % 512))
    assert (kept, refused) == (["caf\\udce9.png"], {})


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    huge = bytearray(member("long", kind=tarfile.GNUTYPE_LONGNAME))
    huge[124:136] = f"{MAX_HEADER_BYTES * 1000:011o}\0".encode()
    huge[148:156] = b"        "
    huge[148:156] = f"{sum(huge[:512]):06o}\0 ".encode()
    kept, refused = read(tmp_path, member("a.png", picture(0)), bytes(huge))
    assert kept == ["a.png"]
    assert "a header of 1,048,576,000 bytes" in refused[""]


def test_a_sample_of_endless_members_takes_bounded_memory(tmp_path):
    many = b"".join(member(f"a.{i:06d}.txt") for i in range(3000))
    kept, refused = read(tmp_path, many, member("b.png", picture(0)))
    assert kept == ["b.png"]
    assert refused["a"].endswith("and 2,990 more")


# Records


NONSENSE = [
    b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b'{"a": Infinity}', b"[" * 100_000,
    b'{"options": 3, "source": [], "files": NaN}', b'{"files": {"x": ["a"]}}', b'{"files": 7}',
]  # fmt: skip


@pytest.mark.parametrize("content", NONSENSE)
def test_a_record_of_another_shape_is_no_record_and_said(tmp_path, content):
    shards = tmp_path / "shards"
    write_arrays(shards, [picture(0)])
    data = open_shards([str(shards / "shard-00000.parquet")], str(shards))
    (tmp_path / "data.json").write_bytes(content)
    said: list[str] = []
    assert as_started(data, Location.of(tmp_path), said.append) is data
    assert len(said) == 1
    assert "data.json cannot be used (" in said[0]
    (shards / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest.json cannot be read: .*restore it from a copy"):
        Manifest.load(shards)


@pytest.mark.parametrize("content", NONSENSE)
def test_an_unfinished_build_with_damaged_records_starts_again(tmp_path, content):
    source, out = Location.of(images(tmp_path / "source", "a", "b")), Location.of(tmp_path / "out")
    start(out, make_plan(source, BuildOptions()))
    (tmp_path / "out" / "_build" / "shard-00000.parquet.json").write_bytes(content)
    assert read_records(out) == {}
    (tmp_path / "out" / "_build" / "plan.json").write_bytes(content)
    state = open_destination(out)
    assert "is not a plan" in state.damage
    assert state.plan is None


def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path):
    write_arrays(tmp_path, [picture(0)])
    value = json.loads((tmp_path / "manifest.json").read_text())
    value["shards"][0]["name"] = "../shard-00000.parquet"
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match="it names a shard"):
        Manifest.load(tmp_path)


def test_a_build_of_a_tar_with_a_link_keeps_its_images(tmp_path):
    (tmp_path / "source").mkdir()
    with tarfile.open(tmp_path / "source" / "x.tar", "w") as archive:
        for i in range(6):
            info = tarfile.TarInfo(f"{i}.png")
            info.size = len(picture(i))
            archive.addfile(info, io.BytesIO(picture(i)))
            if i == 2:
                link = tarfile.TarInfo("latest.png")
                link.type, link.linkname = tarfile.SYMTYPE, "2.png"
                archive.addfile(link)
    source, out = Location.of(tmp_path / "source"), Location.of(tmp_path / "out")
    manifest = build_here(source, out, BuildOptions())
    assert (manifest.images, manifest.quarantined.reasons) == (6, {"unreadable": 1})
