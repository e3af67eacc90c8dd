"""One real Ray for all tests that need one: starting it costs seconds each time."""

from collections.abc import Iterator

import pytest

from selfray.cluster import runtime


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    with runtime.session():
        yield
