"""Progress in a notebook's cell; IPython is replaced by a module that records what is displayed."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from selfray.commands import library, notebook
from selfray.storage import Location


@pytest.fixture
def cell(monkeypatch):
    """What the cell's outputs hold: the newest content of each."""
    outputs: list[object] = []

    def display(content, **_):
        outputs.append(content)
        place = len(outputs) - 1
        return SimpleNamespace(update=lambda new, **_: outputs.__setitem__(place, new))

    python, shown = ModuleType("IPython"), ModuleType("IPython.display")
    python.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    shown.display = display  # type: ignore[attr-defined]
    shown.Image = lambda data, format: (format, data)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", python)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    return outputs


def test_the_live_line_is_one_output_that_is_replaced_and_holds_no_escapes(cell, capsys):
    console = library._screen()
    for step in range(3):
        console.live(f"step {step}\x1b[31m")
    console.say("epoch 1: kNN 98.0%")
    assert cell == [{"text/plain": "step 2\\x1b[31m"}]
    assert capsys.readouterr().out == "epoch 1: kNN 98.0%\n"


def test_the_pictures_of_a_run_are_shown_in_the_cell(cell, tmp_path, capsys):
    folder = tmp_path / "artifacts" / "pictures"
    folder.mkdir(parents=True)
    (folder / "views.png").write_bytes(b"views")
    (folder / "curves.png").write_bytes(b"curves")
    (folder / "thumbnails.png").write_bytes(b"a sheet for the page, not for a person")
    notebook.show_pictures(Location.of(tmp_path))
    assert cell == [("png", b"curves"), ("png", b"views")]
    assert capsys.readouterr().out == "curves\nviews\n"


def test_a_script_and_a_terminal_s_ipython_are_no_notebook(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not notebook.is_notebook()
    terminal = ModuleType("IPython")
    terminal.get_ipython = lambda: SimpleNamespace()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", terminal)
    assert not notebook.is_notebook()
