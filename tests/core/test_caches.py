"""Folders of the temporary folder and caches: only what nobody else can change is believed."""

import os
import tempfile
from pathlib import Path

import pytest

from selfray import caches
from selfray.commands import main
from selfray.console import quiet_console
from selfray.step import compiled

STRANGER = 12345
as_root = pytest.mark.skipif(os.getuid() != 0, reason="gives a folder to another user")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "above" / "cache"
    folder.mkdir(parents=True, mode=0o700)
    return folder


def test_a_folder_of_this_user_alone_is_private(folder):
    assert caches.why_not_private(folder) is None
    folder.parent.chmod(0o1777)  # as the temporary folder is
    assert caches.why_not_private(folder) is None


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o1777, 0o722])
def test_a_folder_that_others_may_write_to_is_not(folder, mode):
    folder.chmod(mode)
    assert f"others may write to {folder}" in str(caches.why_not_private(folder))


def test_nor_is_one_that_others_may_put_in_its_place(folder):
    folder.parent.chmod(0o777)
    assert f"others may write to {folder.parent}" in str(caches.why_not_private(folder))


@as_root
@pytest.mark.parametrize("level", ["cache", "above"])
def test_nor_is_one_of_another_user(folder, level):
    owned = folder if level == "cache" else folder.parent
    os.chown(owned, STRANGER, STRANGER)
    assert caches.why_not_private(folder) == f"{owned} belongs to user {STRANGER}"


@as_root
def test_a_group_counts_as_others_unless_it_is_the_owner_s_own(folder):
    folder.chmod(0o770)
    os.chown(folder, 0, STRANGER)
    assert "others may write" in str(caches.why_not_private(folder))
    os.chown(folder, 0, 0)  # root's own group
    assert caches.why_not_private(folder) is None


@as_root
def test_a_link_is_judged_by_its_owner_and_by_where_it_leads(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert caches.why_not_private(link) is None
    folder.chmod(0o777)
    assert "others may write" in str(caches.why_not_private(link))
    folder.chmod(0o700)
    os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
    assert caches.why_not_private(link) == f"{link} belongs to user {STRANGER}"


@as_root
def test_a_log_goes_nowhere_that_another_user_has_prepared(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("runs").touch()  # so that no folder for logs can be made in it
    assert main._log_folder() == tmp_path / f"selfray-{os.getuid()}" / "logs"
    os.chown(caches.temporary(), STRANGER, STRANGER)
    found = main._log_folder()
    assert not found.is_relative_to(caches.temporary())
    assert found.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", [os.symlink, os.link])
def test_a_link_in_the_place_of_a_log_is_refused_and_its_file_stays(tmp_path, kind):
    treasure, log = tmp_path / "treasure", tmp_path / "20261128-000000.log"
    treasure.write_text("as it was")
    kind(treasure, log)
    with pytest.raises(OSError, match=f"{log} is .* remove it"), quiet_console(log):
        pass
    assert treasure.read_text() == "as it was"


def test_a_log_is_read_by_its_user_alone(tmp_path):
    descriptor = caches.append_to(tmp_path / "log")
    os.write(descriptor, b"one ")
    os.close(descriptor)
    descriptor = caches.append_to(tmp_path / "log")
    os.write(descriptor, b"two")
    os.close(descriptor)
    assert (tmp_path / "log").read_text() == "one two"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_what_torch_compiles_is_kept_where_nobody_else_can_write(monkeypatch, folder):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    compiled._keep_code_privately()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent))
    compiled._keep_code_privately()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder.parent / "selfray" / "torch")
    # By itself torch takes a name in the temporary folder that anybody knows.
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compiled._keep_code_privately()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder.parent / "selfray" / "torch")
