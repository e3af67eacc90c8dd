"""Garbage collection pauses while large packages are imported, and only then."""

import contextlib
import gc

import pytest

from selfray.imports import uncollected


@pytest.mark.parametrize("was", [True, False])
def test_garbage_collection_is_afterwards_as_before_also_after_an_error(was: bool) -> None:
    before = gc.isenabled()
    (gc.enable if was else gc.disable)()
    inside = []
    try:
        with contextlib.suppress(ImportError), uncollected():
            inside.append(gc.isenabled())
            raise ImportError
        assert (inside, gc.isenabled()) == ([False], was)
    finally:
        (gc.enable if before else gc.disable)()
