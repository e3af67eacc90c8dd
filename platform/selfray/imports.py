"""Imports of large packages: without garbage collection, and torch's compiler only to compile.

Importing `torch._dynamo` with all that it imports takes 1.4 s of CPU and 95 MB in each process that
builds an encoder (torch 2.15, torchvision 0.29, timm 1.0.31). Three places that compile nothing
import it: a decorator in timm, every step of an optimizer, and torchvision's operators for
detection, of which timm needs two small modules.
"""

import functools
import gc
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
WITH_LIGHT_PARTS = ("torchvision.models", "torchvision.ops")
"""Packages of which a single module can be imported without the package's own imports."""

_loading = threading.RLock()


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


def postpone_compiler() -> None:
    """From now on, the compiler is imported when something asks for more than its decorators. No-op
    where it has been imported."""
    if COMPILER not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def uncompiled() -> AbstractContextManager[object]:
    """Inside, nothing is compiled: what was compiled before runs eagerly."""
    found = sys.modules.get(COMPILER)
    if found is None or isinstance(found, _Postponed):
        return nullcontext()
    import torch

    return torch.compiler.set_stance("force_eager")


class _Postponed(ModuleType):
    """A module whose code runs as soon as an attribute is asked for that it does not have yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module, such as by inspect and pickle
            raise AttributeError(name)
        _load(self)
        return getattr(self, name)


def _load(module: ModuleType) -> None:
    with _loading:
        if not isinstance(module, _Postponed):
            return
        for name in STAND_INS:
            vars(module).pop(name, None)
        module.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]
        spec = module.__spec__
        assert spec is not None
        assert isinstance(spec.loader, _Postponing)
        spec.loader = module.__loader__ = spec.loader.usual
        spec.loader.exec_module(module)


def _graph_break(*_: Any, **__: Any) -> None:
    return


def _disable(fn: Callable[..., Any] | None = None, *more: Any, **named: Any) -> Any:
    """As torch._dynamo.disable, which changes nothing as long as there is no compiler."""
    if fn is None:
        return lambda fn: _disable(fn, *more, **named)

    @functools.wraps(fn)
    def disabled(*arguments: Any, **by_name: Any) -> Any:
        compiler: Any = sys.modules[COMPILER]
        if isinstance(compiler, _Postponed):
            return fn(*arguments, **by_name)
        return compiler.disable(fn, *more, **named)(*arguments, **by_name)

    return disabled


STAND_INS = {"graph_break": _graph_break, "disable": _disable}
"""Functions of the compiler that eager code calls, as they are without it."""


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(f"{COMPILER}."):
            _load(sys.modules[COMPILER])
            loaded = sys.modules.get(fullname)
            return None if loaded is None else _Loaded.spec_of(loaded)
        if fullname != COMPILER and fullname not in WITH_LIGHT_PARTS:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Postponing(spec.loader)
        return spec


class _Postponing(Loader):
    def __init__(self, usual: Loader) -> None:
        self.usual = usual

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Postponed(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == COMPILER:
            vars(module).update(STAND_INS)


class _Loaded(Loader):
    """Gives a module that the import of its package has just brought."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    @classmethod
    def spec_of(cls, module: ModuleType) -> ModuleSpec:
        spec = ModuleSpec(module.__name__, cls(module))
        # Python prefers the spec of a module that appeared during the search. Not by assignment:
        # torch's modules of settings refuse names that are none.
        vars(module)["__spec__"] = spec
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__spec__"] = self.spec
