"""Imports: torch's compiler only to compile, and no garbage collection meanwhile."""

import contextlib
import gc
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from selfray import imports

COMPILER = "slow_to_import"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package in place of torch._dynamo, which is not imported yet."""
    package = tmp_path / COMPILER
    package.mkdir()
    (package / "__init__.py").write_text(
        "from . import utils\n"
        "kept = utils.once()\n"
        "def graph_break(): return 'a break'\n"
        "def disable(fn=None, recursive=True, *, reason=None):\n"
        "    return lambda *given: ('disabled', fn(*given), recursive, reason)\n"
    )
    (package / "utils.py").write_text("imported = []\ndef once(): imported.append(1); return 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(imports, "COMPILER", COMPILER)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    imports.postpone_compiler()
    for name in (COMPILER, f"{COMPILER}.utils"):
        monkeypatch.setitem(sys.modules, name, None)  # restores their absence at the end
        del sys.modules[name]
    return COMPILER


def is_imported() -> bool:
    return f"{COMPILER}.utils" in sys.modules


def test_decorators_and_graph_breaks_import_no_compiler(compiler: str) -> None:
    found = importlib.import_module(compiler)
    assert found.graph_break() is None
    assert found.disable(lambda x: x + 1)(2) == 3
    assert found.disable(recursive=False)(lambda x: x + 1)(2) == 3
    assert not hasattr(found, "__wrapped__")  # which inspect asks of every module
    assert not is_imported()


def test_anything_else_of_the_compiler_imports_all_of_it_once(compiler: str) -> None:
    found = importlib.import_module(compiler)
    earlier = found.disable(lambda x: x + 1, reason="slow")
    assert found.kept == 7
    assert found.utils.imported == [1]
    assert found.graph_break() == "a break"
    assert earlier(2) == (
        "disabled",
        3,
        True,
        "slow",
    )  # decorated before, and disabled all the same
    assert importlib.import_module(compiler) is found
    assert type(found) is type(sys)


def test_a_module_of_the_compiler_is_that_of_its_package(compiler: str) -> None:
    utils = importlib.import_module(f"{compiler}.utils")
    found = importlib.import_module(compiler)
    assert utils is found.utils
    assert utils.imported == [1]
    assert importlib.reload(utils) is utils  # its spec is the one that it was loaded by


def test_a_module_that_refuses_attributes_is_imported_as_well(
    compiler: str, tmp_path: Path
) -> None:
    (tmp_path / COMPILER / "utils.py").write_text(
        "import sys, types\n"
        "def once(): return 7\n"
        "class Settings(types.ModuleType):  # as torch's modules of settings\n"
        "    def __setattr__(self, name, value): raise AttributeError(name)\n"
        "sys.modules[__name__].__class__ = Settings\n"
    )
    assert importlib.import_module(f"{compiler}.utils").once() == 7


def test_an_error_in_the_compiler_is_raised_where_it_is_asked_for(
    compiler: str, tmp_path: Path
) -> None:
    (tmp_path / COMPILER / "__init__.py").write_text("raise OSError('no such library')\n")
    found = importlib.import_module(compiler)
    with pytest.raises(OSError, match="no such library"):
        _ = found.kept


@pytest.mark.long
def test_an_encoder_is_built_and_trained_without_the_compiler_until_one_is_asked_for() -> None:
    code = """
import sys, torch
from selfray import health, imports
imports.postpone_compiler()
import timm
encoder = timm.create_model("resnet18", num_classes=0)
optimizer = torch.optim.AdamW(encoder.parameters())
encoder(torch.zeros(2, 3, 32, 32)).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
class Encoder(torch.nn.Module):
    def forward(self, images):
        return type("Features", (), {"cls": encoder(images)})
health.feature_health(Encoder(), torch.randn(4, 3, 32, 32))
assert "torch._dynamo.utils" not in sys.modules
torch.compile(torch.nn.Linear(3, 3), backend="eager")(torch.zeros(1, 3))
assert "torch._dynamo.utils" in sys.modules
import torchvision
assert torchvision.ops.nms and torchvision.models.resnet18
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("was", [True, False])
def test_garbage_collection_is_afterwards_as_before_also_after_an_error(was: bool) -> None:
    before = gc.isenabled()
    (gc.enable if was else gc.disable)()
    inside = []
    try:
        with contextlib.suppress(ImportError), imports.uncollected():
            inside.append(gc.isenabled())
            raise ImportError
        assert (inside, gc.isenabled()) == ([False], was)
    finally:
        (gc.enable if before else gc.disable)()
