"""Kernels are compiled once for what their sources say, wherever these lie."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from selfray import caches
from selfray.pixels import compiled

SERVER = """
import json, os, sys, traceback
import numba
import numpy as np

def use_a_kernel(platform, settings):
    os.environ.update(settings)
    numba.core.config.reload_config()
    sys.path.insert(0, platform)
    from selfray.pixels import compiled, random
    random.digest(np.zeros(4, np.uint64), np.zeros(4, np.uint64))
    stats = random.digest.stats
    counts = sum(stats.cache_hits.values()), sum(stats.cache_misses.values())
    return [*counts, str(compiled.cache_folder())]

for line in sys.stdin:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = use_a_kernel(*json.loads(line))
        except BaseException:
            answer = traceback.format_exc()
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    print(os.read(read, 65536).decode(), flush=True)
    os.close(read)
"""


class Used(NamedTuple):
    """What a new process saw when it called a kernel for the first time."""

    found: int
    """How often the kernel's code was found in the cache."""
    compiled: int
    folder: Path
    """The cache; Path("None") without one."""


Run = Callable[..., Used]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Use a kernel of the sources at `platform` in a new process, with a cache in `caches`.

    The processes are forks of one that has imported numba, which takes longer than all the rest.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    environment.pop("PYTHONPATH", None)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def use(platform: Path, caches: Path, **settings: str) -> Used:
        assert server.stdin is not None
        assert server.stdout is not None
        request = [str(platform), {"XDG_CACHE_HOME": str(caches)} | settings]
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = json.loads(server.stdout.readline())
        assert isinstance(answer, list), answer
        return Used(answer[0], answer[1], Path(answer[2]))

    yield use
    server.stdin.close()
    server.wait()


def sources(folder: Path) -> Path:
    """The files of which the kernels are made, and nothing else of the package."""
    package = folder / "selfray" / "pixels"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    shutil.copyfile(caches.__file__, package.parent / "caches.py")
    for name in compiled.SOURCES:
        # Without the file's times, as a clone or an upload has it.
        shutil.copyfile(Path(compiled.__file__).with_name(name), package / name)
    return folder


def test_another_copy_of_the_same_sources_finds_them_compiled(tmp_path: Path, run: Run) -> None:
    caches = tmp_path / "caches"
    first = run(sources(tmp_path / "one"), caches)
    assert first[:2] == (0, 1)
    assert first[2].is_relative_to(caches)
    assert run(sources(tmp_path / "two"), caches) == (1, 0, first[2])


def test_all_that_is_compiled_and_what_it_imports_is_among_the_sources() -> None:
    package = Path(compiled.__file__).parent
    with_kernels = {f.name for f in package.rglob("*.py") if "\n@compiled\n" in f.read_text()}
    assert with_kernels <= set(compiled.SOURCES)
    imported = set()
    for name in compiled.SOURCES:
        for node in ast.walk(ast.parse((package / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "selfray.pixels":
                imported |= {f"{alias.name}.py" for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module == "selfray":
                assert [alias.name for alias in node.names] == ["caches"]  # called by Python alone
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("selfray."):
                imported.add(f"{node.module}.py".removeprefix("selfray.pixels."))
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("selfray") for alias in node.names)
    imported.remove("workspace.py")  # called by Python alone
    assert imported <= set(compiled.SOURCES)


@pytest.mark.parametrize("name", compiled.SOURCES)
def test_a_change_of_any_of_them_compiles_anew(tmp_path: Path, monkeypatch, name: str) -> None:
    before = compiled.digest()
    package = sources(tmp_path) / "selfray" / "pixels"
    monkeypatch.setattr(compiled, "__file__", str(package / "compiled.py"))
    assert compiled.digest.__wrapped__() == before
    with (package / name).open("a") as file:
        file.write("# changed\n")
    assert compiled.digest.__wrapped__() != before


@pytest.mark.parametrize(
    ("variable", "value"),
    [("NUMBA_CPU_NAME", "nehalem"), ("NUMBA_BOUNDSCHECK", "1"), ("NUMBA_OPT", "1")],
)
def test_so_does_another_processor_and_another_setting(
    tmp_path: Path, run: Run, variable: str, value: str
) -> None:
    platform, caches = sources(tmp_path / "one"), tmp_path / "caches"
    folder = run(platform, caches).folder
    found, missed, another = run(platform, caches, **{variable: value})
    assert (found, missed) == (0, 1)
    assert another != folder


def test_where_no_cache_can_be_written_kernels_still_run(tmp_path: Path, run: Run) -> None:
    (tmp_path / "caches").write_text("a file is in the way")
    blocked = {"HOME": str(tmp_path / "caches"), "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    found, missed, folder = run(sources(tmp_path / "one"), tmp_path / "caches", **blocked)
    assert (found, missed) == (0, 1)
    assert folder.is_relative_to(tmp_path / "temporary")
    (private,) = (tmp_path / "temporary").iterdir()
    assert private.stat().st_mode & 0o777 == 0o700
    # A folder that others may write to could have anybody's code.
    private.chmod(0o777)
    assert run(tmp_path / "one", tmp_path / "caches", **blocked) == (0, 1, Path("None"))


@pytest.mark.parametrize("variable", ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
@pytest.mark.parametrize("attack", ["shared above", "shared", "another's"])
def test_code_that_others_may_have_put_there_is_not_run(
    tmp_path: Path, monkeypatch, variable: str, attack: str
) -> None:
    named = tmp_path / "named"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(compiled.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(variable, str(named))
    if variable == "NUMBA_CACHE_DIR":
        monkeypatch.setattr(compiled.config, "CACHE_DIR", str(named))
    folder = compiled.cache_folder.__wrapped__()
    assert folder is not None
    assert folder.is_relative_to(named)
    (folder / "kernel.nbi").write_bytes(b"a pickle of anybody's")
    if attack == "shared above":
        named.chmod(0o777)
    elif attack == "shared":
        folder.chmod(0o777)
    elif os.getuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        pytest.skip("gives a folder to another user")
    found = compiled.cache_folder.__wrapped__()
    assert found is not None
    assert not found.is_relative_to(named)


def test_a_user_without_a_home_has_a_cache_too(monkeypatch, tmp_path: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(compiled.config, "CACHE_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = compiled.cache_folder.__wrapped__()
    assert found is not None
    assert found.is_relative_to(tmp_path)


def test_a_cache_that_others_made_is_used_where_it_cannot_be_written(
    tmp_path: Path, run: Run, monkeypatch
) -> None:
    platform, caches = sources(tmp_path / "one"), tmp_path / "caches"
    folder = run(platform, caches).folder
    monkeypatch.setattr(compiled, "__file__", str(platform / "selfray" / "pixels" / "compiled.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
    monkeypatch.setattr(compiled.config, "CACHE_DIR", "")

    def full(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert compiled.cache_folder.__wrapped__() == folder


def test_a_disk_that_fills_up_and_an_index_that_was_cut_off_only_cost_time(
    tmp_path: Path, run: Run
) -> None:
    platform, caches = sources(tmp_path / "one"), tmp_path / "caches"
    folder = run(platform, caches).folder
    (index,) = folder.glob("random.digest*.nbi")
    index.write_bytes(b"")
    assert run(platform, caches)[:2] == (0, 1)
    assert run(platform, caches)[:2] == (1, 0), "it was written anew"
    # Where the code should be stored is a folder: neither root nor anybody else can replace it.
    for file in folder.iterdir():
        file.unlink()
    index.mkdir()
    (index / "in the way").touch()
    assert run(platform, caches)[:2] == (0, 1)


def test_what_numba_is_told_holds_for_the_kernels_too(tmp_path: Path, run: Run) -> None:
    own = tmp_path / "own"
    _, _, folder = run(sources(tmp_path / "one"), tmp_path / "caches", NUMBA_CACHE_DIR=str(own))
    assert folder.is_relative_to(own)
    assert list(folder.glob("*.nbc"))
    assert not (tmp_path / "caches").exists()
