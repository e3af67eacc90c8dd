"""How the kernels are compiled, and where their machine code is kept.

Compiling them takes 20 to 40 s of a core, once: the code is kept in the user's cache folder, under
a hash of their sources. numba by itself keeps code under the path of its source, so each uploaded
job, each clone and each node would compile it again.

This subclasses numba's FunctionCache and CompileResultCacheImpl, which are private: pyproject.toml
bounds numba's version, and tests/test_compiled.py says what is expected of them.
"""

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache

from selfray import caches

log = logging.getLogger(__name__)

config: Any = numba.config
SOURCES = (
    "compiled.py",
    "intrinsics.py",
    "headers.py",
    "random.py",
    "resize.py",
    "colour.py",
    "draw.py",
    "compose.py",
    "jpeg.py",
)
"""Files whose functions call one another's kernels: a change of one recompiles those of all."""
ROOM = 32 << 20
"""Free bytes that a cache folder's disk must have; all kernels take 3.5 MB."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of SOURCES at its first call; later processes load it from the cache."""
    dispatcher: Any = numba.njit(nogil=True, error_model="numpy")(function)
    if not config.DISABLE_JIT and cache_folder() is not None:
        # What njit(cache=True) does, with our cache instead of numba's.
        dispatcher._cache = _Cache(function)
    return dispatcher


class _Locator:
    """Tells numba where a function's machine code is kept, and for which sources it is valid."""

    def __init__(self, line: int, file: str) -> None:
        self.line = line
        self._py_file = file  # numba's messages name it

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> "_Locator":
        return cls(function.__code__.co_firstlineno, file)

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def ensure_cache_path(self) -> None:
        """Called before code is stored."""
        os.makedirs(self.get_cache_path(), exist_ok=True)

    def get_source_stamp(self) -> str:
        return digest()

    def get_disambiguator(self) -> str:
        return str(self.line)


class _Implementation(CompileResultCacheImpl):
    _locator_classes = [_Locator]  # noqa: RUF012 - numba's name and kind


class _Cache(FunctionCache):
    """A cache whose faults, such as a full disk or a damaged index, only cost time to compile."""

    _impl_class = _Implementation

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a damaged index raises many types
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


@functools.cache
def cache_folder() -> Path | None:
    """The first of these folders that can be used, or None.

    The candidates are those of `caches.choices`, NUMBA_CACHE_DIR first if it is set. numba
    unpickles the files in it, which runs code, so a folder that other users can write to is never
    used.
    """
    name = f"kernels-{digest()}"
    for folder in (choice / name for choice in caches.choices(config.CACHE_DIR)):
        try:
            # Filled already: it may be read-only, such as part of a container's image.
            is_filled = next(folder.glob("*.nbi"), None) is not None
            if not is_filled:
                caches.make(folder)
            if (cause := caches.why_not_private(folder)) is not None:
                log.info("compiled kernels are not kept in %s: %s", folder, cause)
                continue
            if is_filled:
                return folder
            tempfile.TemporaryFile(dir=folder).close()
            if shutil.disk_usage(folder).free > ROOM:
                return folder
        except OSError:
            continue
    return None


@functools.cache
def digest() -> str:
    """A hash of everything the machine code depends on, as 16 hexadecimal digits.

    SOURCES, numba's version and settings, and the processor: nodes of two kinds may share a home
    folder, and numba's index allows one writer at a time.
    """
    settings = (config.OPT, config.BOUNDSCHECK, config.DEBUGINFO_DEFAULT)
    processor = (
        config.CPU_NAME or llvm.get_host_cpu_name(),
        config.CPU_FEATURES or llvm.get_host_cpu_features().flatten(),
    )
    found = hashlib.sha256(repr((numba.__version__, settings, processor)).encode())
    for name in SOURCES:
        found.update(Path(__file__).with_name(name).read_bytes())
    return found.hexdigest()[:16]
