"""One thread for torch, one real Ray for all tests that need one, and what runs side by side."""

import os
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    with runtime.session():
        yield


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup`: a file's tests share one process, for their fixtures; and all fast
    tests that need Ray share one, since each process would start a Ray of its own."""
    for item in items:
        needs_ray = "ray_session" in getattr(item, "fixturenames", ())
        is_long = item.get_closest_marker("long") is not None
        group = "ray" if needs_ray and not is_long else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
