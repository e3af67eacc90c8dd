"""The console, for lines that a person reads, and the log file, for all other output."""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from selfray.caches import append_to
from selfray.masking import masked

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 30.0
"""Without a terminal, the console prints at least one line in this time while work goes on."""

_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0 and C1: escape sequences, bells, carriage returns
    "\u061c\u200b-\u200f\u202a-\u202e\u2066-\u2069"  # change the text direction, or are invisible
    "\u2028\u2029\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
    "\ud800-\udfff]"  # lone surrogates: bytes of a file name that is not UTF-8
)


def printable(text: str, keep: str = "\n") -> str:
    """A text that is safe to print on a terminal: credentials are hidden, and control characters
    are escaped (\\x1b, \\u202e) except those in `keep`. Names of files and runs may hold anything.
    """

    def escaped(match: re.Match[str]) -> str:
        letter = match[0]
        return letter if letter in keep else letter.encode("unicode_escape", "replace").decode()

    return _UNPRINTABLE.sub(escaped, masked(text))


class LogFormatter(logging.Formatter):
    """Formats log lines, tracebacks included, without credentials or control characters."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


class Console:
    """Prints lines for a person. All other output of this process goes to a log file.

    Ray's C++ core, gRPC and other libraries write to file descriptors 1 and 2 directly and bypass
    Python's logging. So both descriptors are redirected to the log, and the console keeps a private
    copy of standard output.

    A standard output that cannot be written (its reader is gone, its disk is full) ends no run: the
    lines go to the log from then on, and `failure` holds the cause.
    """

    def __init__(self, stream: IO[str], log: Path | None) -> None:
        self._stream = stream
        self.log = log
        self.is_terminal = stream.isatty()
        self._live = False
        self._lock = threading.RLock()
        self._spoke = time.monotonic()
        self._doing, self._doing_since = "", self._spoke
        self.failure: OSError | None = None

    def say(self, text: str = "") -> None:
        """Print lines that stay."""
        with self._lock:
            if self._stream.closed:  # a thread may outlive the command
                return
            self._clear()
            self._write(printable(text) + "\n")
            self._spoke = time.monotonic()

    def live(self, text: str) -> None:
        """Show what is being done, in a line that the next one replaces. Without a terminal,
        `beat` prints the newest one every 30 s."""
        with self._lock:
            if text != self._doing:
                self._doing, self._doing_since = text, time.monotonic()
            if self.is_terminal and not self._stream.closed:
                width = os.get_terminal_size(self._stream.fileno()).columns or 80
                self._write("\r\x1b[K" + printable(text, keep="")[: width - 1])
                self._live = True

    def beat(self, now: float) -> None:
        """Without a terminal: print the newest live line, if nothing was printed for 30 s.

        Args:
            now: time.monotonic().
        """
        with self._lock:
            if self.is_terminal or not self._doing or now - self._spoke < HEARTBEAT_SECONDS:
                return
            lasts = now - self._doing_since
            self.say(self._doing + (f" (for {lasts:.0f} s)" if lasts >= HEARTBEAT_SECONDS else ""))
            self._spoke = now

    def _clear(self) -> None:
        if self._live:
            self._write("\r\x1b[K")
            self._live = False

    def _write(self, text: str) -> None:
        if self.failure is None:
            try:
                self._stream.write(text)
                self._stream.flush()
            except OSError as error:
                self.failure = error
                discard(self._stream)
        if self.failure is not None:
            log.info("%s", text.rstrip("\n"))


def discard(stream: IO[str]) -> None:
    """Send what a stream still holds, and gets later, nowhere. Otherwise closing it fails again."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextmanager
def _beating(console: Console) -> Iterator[None]:
    """Call the console's `beat` every second from a thread."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(1.0):
            console.beat(time.monotonic())

    thread = threading.Thread(target=beat, daemon=True, name="selfray-heartbeat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def quiet_console(log: Path) -> Iterator[Console]:
    """Redirect this process's standard output and error, native code's included, to a log file.

    With `SELFRAY_VERBOSE=1` nothing is redirected.
    """
    if os.environ.get("SELFRAY_VERBOSE", "0") not in ("", "0"):
        yield Console(sys.stdout, None)
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace") as stream:
        with os.fdopen(append_to(log), "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            console = Console(stream, log)
            with _beating(console):
                yield console
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
