import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from selfray.storage import Location


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    location = Location.of("runs/one")
    assert location.uri == location.path == str(tmp_path / "runs/one")
    assert location.is_local


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Location.of("~/data").path == str(tmp_path / "data")


def test_a_location_of_a_location_is_itself(tmp_path):
    location = Location.of(tmp_path)
    assert Location.of(location) is location


def test_a_file_uri_is_local(tmp_path):
    location = Location.of(f"file://{tmp_path}")
    assert location.is_local
    assert location.path == str(tmp_path)


def test_a_scheme_that_is_not_understood_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"cannot open ftp://host/x.*s3://bucket/folder or gs://"):
        Location.of("ftp://host/x")


def test_the_parts_of_a_path_join_and_name_it(tmp_path):
    location = Location.of(tmp_path) / "a" / "b.json"
    assert location.name == "b.json"
    assert str(location) == location.uri == str(tmp_path / "a/b.json")


def test_a_file_is_written_whole_and_read_back(tmp_path):
    location = Location.of(tmp_path) / "x.bin"
    location.write_bytes(b"one")
    location.write_bytes(b"two")
    assert location.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["x.bin"], "no temporary file stays"


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    location = Location.of(tmp_path) / "x.bin"
    location.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        location.write_bytes(b"new")
    assert location.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_json_survives(tmp_path):
    location = Location.of(tmp_path) / "x.json"
    location.write_json({"ü": [1, 2.5, None]})
    assert location.read_json() == {"ü": [1, 2.5, None]}
    assert json.loads(Path(location.path).read_text()) == {"ü": [1, 2.5, None]}


def test_an_object_store_is_written_and_read_the_same_way(tmp_path):
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    location = Location(store, "runs/one", "memory://runs/one")
    assert not location.is_local
    location.make_folder()
    (location / "x.json").write_json([1])
    assert (location / "x.json").read_json() == [1]
    assert [info.base_name for info in location.list()] == ["x.json"]


def test_a_folder_lists_sorted_and_one_that_is_missing_lists_nothing(tmp_path):
    location = Location.of(tmp_path)
    for name in ("b", "a", "c/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (location / name).write_bytes(b"")
    assert [info.base_name for info in location.list()] == ["a", "b", "c"]
    assert [info.base_name for info in location.list(recursive=True)] == ["a", "b", "c", "d"]
    assert (location / "gone").list() == []


def test_folders_are_made_told_apart_and_deleted(tmp_path):
    folder = Location.of(tmp_path) / "a" / "b"
    assert not folder.exists()
    folder.make_folder()
    assert folder.exists()
    assert folder.is_folder()
    (folder / "x").write_bytes(b"1")
    assert not (folder / "x").is_folder()
    folder.delete_folder()
    folder.delete_folder()
    assert not folder.exists()


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        (Location.of(tmp_path) / "gone.json").read_json()


def test_a_location_travels_between_processes(tmp_path):
    location = Location.of(tmp_path) / "x"
    assert pickle.loads(pickle.dumps(location)) == location


def test_a_folder_that_appears_while_it_is_listed_is_listed(tmp_path):
    class Late:
        """As pyarrow if a folder is made between its two looks at it."""

        def get_file_info(self, selector):
            if not (tmp_path / "spool").exists():
                (tmp_path / "spool").mkdir()
                (tmp_path / "spool" / "a.jsonl").write_text("{}")
                raise FileNotFoundError(2, "Cannot list directory")
            return fs.LocalFileSystem().get_file_info(selector)

    late: Any = Late()
    folder = Location(late, str(tmp_path / "spool"), str(tmp_path / "spool"))
    assert [info.base_name for info in folder.list()] == ["a.jsonl"]
