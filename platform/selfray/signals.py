"""Ctrl-C, SIGTERM and SIGHUP as one exception in the main thread, and the exit code for it."""

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""`ray job stop`, a batch system and `kill` send SIGTERM; a terminal that closes sends SIGHUP."""
PATIENCE = 3
"""The signal that ends a command which is ending already, at once and without a word."""

INTERRUPTED = 130
"""Exit code by Ctrl-C: 128 and the signal's number, as shells have it."""

_received: list[int] = []


class Interrupted(KeyboardInterrupt):
    """A signal asked this command to end. One that follows is waited out, up to the third."""


def catch() -> None:
    """Turn the signals into `Interrupted`. Again after Ray has started, whose own code sets others;
    nothing outside the main thread, where Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in CAUGHT:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if len(_received) >= PATIENCE:
        leave()
    if len(_received) == 1:
        raise Interrupted


def were_received() -> bool:
    """Whether this command is ending by a signal."""
    return bool(_received)


def exit_code() -> int:
    """What a command that was interrupted ends with: 130 by Ctrl-C, 143 by SIGTERM, 129 by
    SIGHUP."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def leave() -> None:
    """End now. Threads of Ray and MLflow may be in native code, and Python's own way out would then
    abort with exit code -6. Linux ends Ray's processes with this one."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a terminal that is gone
            stream.flush()
    os._exit(exit_code())
