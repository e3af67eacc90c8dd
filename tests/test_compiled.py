"""Kernels are compiled once for what their sources say, wherever these lie."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selfray import compiled

SCRIPT = """
import numpy as np
from selfray import compiled, kernels
kernels.digest(np.zeros(4, np.uint64), np.zeros(4, np.uint64))
stats = kernels.digest.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()), compiled.cache_folder())
"""


def sources(folder: Path) -> Path:
    """What the kernels are made of, and nothing else of the package."""
    package = folder / "selfray"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in compiled.SOURCES:
        # Without the file's times, as a clone or an upload has it.
        shutil.copyfile(Path(compiled.__file__).with_name(name), package / name)
    return folder


def run(platform: Path, caches: Path, **more: str) -> tuple[int, int, Path]:
    """A first kernel in a new process: how often it was found, how often compiled, the folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    environment |= {"PYTHONPATH": str(platform), "XDG_CACHE_HOME": str(caches)} | more
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, missed, folder = done.stdout.split()
    return int(found), int(missed), Path(folder)


def test_another_copy_of_the_same_sources_finds_them_compiled(tmp_path: Path) -> None:
    caches = tmp_path / "caches"
    first = run(sources(tmp_path / "one"), caches)
    assert first[:2] == (0, 1)
    assert first[2].is_relative_to(caches)
    assert run(sources(tmp_path / "two"), caches) == (1, 0, first[2])


@pytest.mark.parametrize("name", compiled.SOURCES)
def test_a_change_of_any_of_them_compiles_anew(tmp_path: Path, monkeypatch, name: str) -> None:
    before = compiled.digest_of_sources()
    package = sources(tmp_path) / "selfray"
    monkeypatch.setattr(compiled, "__file__", str(package / "compiled.py"))
    assert compiled.digest_of_sources.__wrapped__() == before
    with (package / name).open("a") as file:
        file.write("# changed\n")
    assert compiled.digest_of_sources.__wrapped__() != before


def test_all_that_kernels_import_is_among_the_sources() -> None:
    for name in compiled.SOURCES:
        text = Path(compiled.__file__).with_name(name).read_text()
        for line in text.splitlines():
            if line.startswith("from selfray.") and "workspace" not in line:
                assert f"{line.split()[1].removeprefix('selfray.')}.py" in compiled.SOURCES


def test_where_the_cache_cannot_be_written_kernels_still_run(tmp_path: Path) -> None:
    (tmp_path / "caches").write_text("a file is in the way")
    found, missed, folder = run(sources(tmp_path / "one"), tmp_path / "caches")
    assert (found, missed) == (0, 1)
    assert not folder.exists(), "it goes with the process"


def test_what_numba_is_told_holds_for_the_kernels_too(tmp_path: Path) -> None:
    own = tmp_path / "own"
    _, _, folder = run(sources(tmp_path / "one"), tmp_path / "caches", NUMBA_CACHE_DIR=str(own))
    assert folder.is_relative_to(own)
    assert list(folder.glob("*.nbc"))
    assert not (tmp_path / "caches").exists()
