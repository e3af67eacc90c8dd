"""Imports of large packages without garbage collection, which would take a sixth of their time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python does not look for garbage. Importing makes a million objects and hardly any
    garbage: torch and ray.data take 1.84 s of CPU so, and 2.24 s otherwise (means of three)."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
