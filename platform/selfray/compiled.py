"""How the kernels are compiled, and where their machine code is kept.

Compiling them takes 20 to 40 s of a core, once: the code is kept in the user's cache folder under
what their sources say. numba by itself keeps it under a file's path and time, and each uploaded
job, each clone and each node would wait for it anew.
"""

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

config: Any = numba.config
SOURCES = ("compiled.py", "intrinsics.py", "kernels.py", "jpeg.py")
"""The files whose functions are compiled into one another."""
ROOM = 32 << 20
"""Free bytes that a cache folder must have; all kernels take 3 MB."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of SOURCES at its first call; later processes find it compiled."""
    # What numba reads while it decorates; whoever has set NUMBA_CACHE_LOCATOR_CLASSES knows best.
    others = config.CACHE_LOCATOR_CLASSES
    config.CACHE_LOCATOR_CLASSES = others or f"{__name__}.{Locator.__name__}"
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    finally:
        config.CACHE_LOCATOR_CLASSES = others


class Locator:
    """Tells numba where a function's code is and of which sources; numba's file names and index
    tell apart functions, arguments, processors and versions of Python."""

    def __init__(self, line: int) -> None:
        self.line = line

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> "Locator":
        return cls(function.__code__.co_firstlineno)

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def ensure_cache_path(self) -> None:
        """Called before code is stored."""
        cache_folder().mkdir(parents=True, exist_ok=True)

    def get_source_stamp(self) -> str:
        return digest_of_sources()

    def get_disambiguator(self) -> str:
        return str(self.line)


@functools.cache
def cache_folder() -> Path:
    """The first of these with room: NUMBA_CACHE_DIR if it is set, `selfray` in XDG_CACHE_HOME or
    ~/.cache, and a temporary folder that goes with this process."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    for choice in (*filter(None, [config.CACHE_DIR]), caches / "selfray"):
        folder = Path(choice) / f"kernels-{digest_of_sources()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            if shutil.disk_usage(folder).free > ROOM:
                return folder
        except OSError:
            continue
    return Path(_temporary_folder().name)


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="selfray-kernels-")


@functools.cache
def digest_of_sources() -> str:
    """Of SOURCES and of numba: 16 hexadecimal digits."""
    digest = hashlib.sha256(numba.__version__.encode())
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:16]
