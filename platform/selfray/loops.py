"""Runs a coroutine to its end, also in a notebook, whose cells run inside a loop already."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

CANCEL_SECONDS = 10.0
"""An interrupted coroutine has this time to end."""


def run_to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """asyncio.run, also where this thread runs a loop already, as a notebook's cell does: then in a
    thread with a loop of its own, which is cancelled if this thread is interrupted."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    ended = threading.Event()

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(asyncio.wait([task]))
        finally:
            ended.set()

    thread = threading.Thread(target=run, daemon=True, name="selfray-controller")
    try:
        thread.start()
        while not ended.wait(1.0):
            pass
    except BaseException:
        loop.call_soon_threadsafe(task.cancel)
        ended.wait(CANCEL_SECONDS)
        raise
    loop.close()
    task.result()
