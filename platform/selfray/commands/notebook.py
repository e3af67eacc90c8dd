"""Shows the progress of a run and its pictures in the cell of a notebook."""

import sys
from typing import Any

from selfray.console import Console, printable
from selfray.runs.reading import pictures_of
from selfray.storage import Location


def is_notebook() -> bool:
    """Whether this code runs in a cell of Jupyter, or of another program with IPython's kernel."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython  # pyright: ignore[reportMissingImports]

    return getattr(get_ipython(), "kernel", None) is not None


class NotebookConsole(Console):
    """A console whose live line is one output of the cell, replaced in place, as plain text."""

    def __init__(self) -> None:
        super().__init__(sys.stdout, None)
        self.is_terminal = True  # its live line is replaced, so no lines of progress stay
        self._output: Any = None

    def live(self, text: str) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        line = {"text/plain": printable(text, keep="")}
        with self._lock:
            if self._output is None:
                self._output = display(line, raw=True, display_id=True)
            else:
                self._output.update(line, raw=True)


def show_pictures(run: Location) -> None:
    """Show the pictures of a run, each under its name."""
    from IPython.display import Image, display  # pyright: ignore[reportMissingImports]

    for name, file in sorted(pictures_of(run).items()):
        print(name)
        display(Image(file.read_bytes(), format="png"))
