"""One thread for torch, one real Ray for all tests that need one, and what runs side by side."""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

# Tests compute with tensors so small that a second thread of OpenMP only waits for the first, and
# on a busy machine waits for long. Before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's workers, and the commands that tests start, are those of the tree that the tests lie in, not
# of another one that the environment was made for.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1] / "platform"), os.environ.get("PYTHONPATH", "")]
).rstrip(os.pathsep)

from selfray.cluster import runtime

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    with runtime.session():
        yield


FIRST = ("ray", "tests/core/test_distributed.py")
"""What takes longest, so that it is not what all wait for at the end."""


def _side_by_side(file: str, is_drill: bool, test: str) -> str:
    """The group of a test: those of a group share one process, and so their fixtures. A file is a
    group; all files of fast tests that need Ray are one, since each process would start a Ray of
    its own. A drill is a group by itself."""
    if is_drill:
        return test
    return "ray" if _needs_ray(file) else file


@lru_cache
def _needs_ray(file: str) -> bool:
    return "ray_session" in (ROOT / file).read_text()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        group = _side_by_side(item.path.relative_to(ROOT).as_posix(), False, "")
        return FIRST.index(group) if group in FIRST else len(FIRST)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's own `--dist loadgroup` writes groups into names of tests, which pytest 9.2 does not
    read: every fixture of a file was made in each process."""
    from xdist.scheduler import LoadScopeScheduling

    class SideBySide(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            is_drill = config.option.markexpr == "long"
            return _side_by_side(nodeid.partition("::")[0], is_drill, nodeid)

    return SideBySide(config, log)
