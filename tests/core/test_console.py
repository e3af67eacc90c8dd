"""What a person reads where there is no terminal: never silent for long, never noisy."""

import io
import time

from selfray.console import HEARTBEAT_SECONDS, Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_the_newest_live_line_is_said_every_30_seconds():
    written = io.StringIO()
    console = Console(written, None)
    now = time.monotonic()
    console.beat(now + 100)
    assert written.getvalue() == "", "nothing is being done yet"
    for step in range(1000):
        console.live(f"step {step}")
    console.beat(now + HEARTBEAT_SECONDS / 2)
    assert written.getvalue() == ""
    late = now + HEARTBEAT_SECONDS + 10
    console.beat(late)
    console.beat(late + HEARTBEAT_SECONDS / 2)
    assert written.getvalue().startswith("step 999 (for ")
    assert written.getvalue().count("\n") == 1
    console.beat(late + 2 * HEARTBEAT_SECONDS)
    assert written.getvalue().count("\n") == 2


def test_a_line_that_stays_puts_the_next_beat_off():
    written = io.StringIO()
    console = Console(written, None)
    console.live("drawing pictures")
    console.say("epoch 1: kNN 98.0 %")
    console.beat(time.monotonic() + HEARTBEAT_SECONDS / 2)
    assert written.getvalue() == "epoch 1: kNN 98.0 %\n"


def test_a_terminal_shows_live_lines_in_place_and_gets_no_beats(monkeypatch):
    monkeypatch.setattr("os.get_terminal_size", lambda _: type("Size", (), {"columns": 40})())
    monkeypatch.setattr(Terminal, "fileno", lambda _: 1)
    written = Terminal()
    console = Console(written, None)
    console.live("step 1")
    console.beat(time.monotonic() + 1000)
    assert written.getvalue() == "\r\x1b[Kstep 1"
    console.say("done")
    assert written.getvalue() == "\r\x1b[Kstep 1\r\x1b[Kdone\n"
