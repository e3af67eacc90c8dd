"""A coroutine that runs to its end, with and without a loop around it."""

import _thread
import asyncio
import signal

import pytest

from selfray import loops


async def work(done: list[str]) -> None:
    await asyncio.sleep(0)
    done.append("done")


async def broken() -> None:
    await asyncio.sleep(0)
    raise ValueError("views")


def run_inside_a_loop(coroutine) -> None:
    async def cell() -> None:  # as a notebook runs a cell
        loops.run_to_its_end(coroutine)

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(cell())
    finally:
        loop.close()


@pytest.mark.parametrize("run", [loops.run_to_its_end, run_inside_a_loop])
def test_a_coroutine_runs_to_its_end_and_its_error_is_raised(run):
    done: list[str] = []
    run(work(done))
    assert done == ["done"]
    with pytest.raises(ValueError, match="views"):
        run(broken())


def test_an_interrupt_of_a_notebook_s_cell_cancels_the_coroutine():
    ended: list[str] = []

    async def endless() -> None:
        _thread.interrupt_main()
        try:
            await asyncio.sleep(1e6)
        finally:
            ended.append("cancelled")

    # As in a notebook's kernel; other tests leave handlers that raise nothing.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_inside_a_loop(endless())
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == ["cancelled"]
