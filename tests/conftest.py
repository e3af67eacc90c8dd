"""One thread for torch, and one real Ray for all tests that need one: it takes seconds to start."""

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
