"""How the kernels are compiled, and where their machine code is kept.

Compiling them takes 20 to 40 s of a core, once: the code is kept in the user's cache folder under
what their sources say. numba by itself keeps it under a file's path, and each uploaded job, each
clone and each node would wait for it anew.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache

config: Any = numba.config
SOURCES = ("compiled.py", "intrinsics.py", "kernels.py", "jpeg.py")
"""The files whose functions are compiled into one another."""
ROOM = 32 << 20
"""Free bytes that a cache folder must have; all kernels take 3.5 MB."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of SOURCES at its first call; later processes find it compiled."""
    dispatcher: Any = numba.njit(nogil=True, error_model="numpy")(function)
    if not config.DISABLE_JIT and cache_folder() is not None:
        # As njit's cache=True does, with a cache of numba's own kind.
        dispatcher._cache = _Cache(function)
    return dispatcher


class _Locator:
    """Tells numba where a function's code is and of which sources."""

    def __init__(self, line: int, file: str) -> None:
        self.line = line
        self._py_file = file  # numba names it where a function cannot be kept

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
    """Without what numba lets a caller feel: a disk that is full, an index that a crash cut off."""

    _impl_class = _Implementation

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # as many kinds as there are ways to damage it
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


@functools.cache
def cache_folder() -> Path | None:
    """Where the code is kept, the first of these that can be: NUMBA_CACHE_DIR if it is set,
    `selfray` in XDG_CACHE_HOME or ~/.cache, a folder of the user's among the temporary ones."""
    name = f"kernels-{digest()}"
    for folder in (choice / name for choice in _choices()):
        try:
            # Of others' making, in an image or on a disk that is read only.
            if next(folder.glob("*.nbi"), None):
                return folder
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            if shutil.disk_usage(folder).free > ROOM:
                return folder
        except OSError:
            continue
    return None


def _choices() -> Iterator[Path]:
    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        yield Path(caches) / "selfray"
    with contextlib.suppress(RuntimeError):  # a user without a home
        yield Path.home() / ".cache" / "selfray"
    # Code that somebody else may have put there must not be run.
    folder = Path(tempfile.gettempdir()) / f"selfray-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if found.st_uid == os.getuid() and found.st_mode & 0o077 == 0:
            yield folder


@functools.cache
def digest() -> str:
    """Of all that the code depends on, 16 hexadecimal digits: SOURCES, numba, its settings, and the
    processor. Nodes of two kinds may share a home, and numba's index is for one writer at a time.
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
