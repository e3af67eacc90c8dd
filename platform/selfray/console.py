"""Where a person reads: the console, and the log that takes everything else."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class Console:
    """Where a person reads. Everything else that this process prints goes to a log file.

    Ray's C++ core, gRPC and libraries write to file descriptors 1 and 2 directly, past Python's
    logging; so the descriptors themselves are turned to the log, and the console keeps a private
    copy of standard output.
    """

    def __init__(self, stream: IO[str], log: Path | None) -> None:
        self._stream = stream
        self.log = log
        self.is_terminal = stream.isatty()
        self._live = False

    def say(self, text: str = "") -> None:
        """Print lines that stay."""
        if self._stream.closed:  # a thread that ends after the command has nobody to tell
            return
        self._clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def live(self, text: str) -> None:
        """Show a line that the next one replaces; nothing where nobody watches."""
        if self.is_terminal and not self._stream.closed:
            width = os.get_terminal_size(self._stream.fileno()).columns or 80
            self._stream.write("\r\x1b[K" + text[: width - 1])
            self._stream.flush()
            self._live = True

    def _clear(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[K")
            self._live = False


@contextmanager
def quiet_console(log: Path) -> Iterator[Console]:
    """Turn this process's standard output and error, native ones included, into a log file.

    `SELFRAY_VERBOSE=1` leaves them where they are.
    """
    if os.environ.get("SELFRAY_VERBOSE", "0") not in ("", "0"):
        yield Console(sys.stdout, None)
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace") as stream:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            yield Console(stream, log)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
