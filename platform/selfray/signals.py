"""Ctrl-C, SIGTERM and SIGHUP become one exception in the main thread, with its exit code."""

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""`ray job stop`, a batch system and `kill` send SIGTERM; a terminal that closes sends SIGHUP."""
PATIENCE = 3
"""The third signal ends a command at once, without any further message."""

INTERRUPTED = 130
"""Exit code by Ctrl-C: 128 and the signal's number, as shells have it."""

_received: list[int] = []


class Interrupted(KeyboardInterrupt):
    """Raised when a first signal asks the command to end. A second one is ignored; the third ends
    the process."""


def catch() -> None:
    """Install handlers that raise `Interrupted`. Call it again after Ray has started, because Ray
    installs its own. Does nothing outside the main thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in CAUGHT:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP: leave it so
            signal.signal(number, _handle)


def are_caught() -> bool:
    """Whether `catch` has installed its handlers; not in a process that only imports selfray."""
    return signal.getsignal(signal.SIGINT) is _handle  # ray.init replaces SIGTERM's


def _handle(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if len(_received) >= PATIENCE:
        leave()
    if len(_received) == 1:
        raise Interrupted


def were_received() -> bool:
    """Whether a signal has asked this command to end."""
    return bool(_received)


def exit_code() -> int:
    """What a command that was interrupted ends with: 130 by Ctrl-C, 143 by SIGTERM, 129 by
    SIGHUP."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def leave() -> None:
    """End the process now. Threads of Ray and MLflow may be in native code, and Python's normal
    exit would then abort with exit code -6. Linux ends Ray's processes together with this one."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the terminal may be closed
            stream.flush()
    os._exit(exit_code())
