"""What a person reads where there is no terminal: never silent for long, never noisy."""

import errno
import io
import os
import subprocess
import sys
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


def test_an_output_that_cannot_be_written_ends_nothing_and_its_lines_go_to_the_log(caplog):
    caplog.set_level("INFO")
    with open("/dev/full", "w") as stream:
        console = Console(stream, None)
        console.say("loss 1.0")
        console.say("loss 0.5")
        assert console.failure is not None
        assert console.failure.errno == errno.ENOSPC
    assert [record.message for record in caplog.records] == ["loss 1.0", "loss 0.5"]


def test_a_full_disk_behind_standard_output_is_one_line_and_a_closed_pipe_is_none():
    command = [sys.executable, "-m", "selfray.commands.main", "pretrain", "--help"]
    with open("/dev/full", "w") as full:
        told = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert told.returncode == 1
    assert told.stderr == "error: standard output cannot be written: No space left on device\n"
    reading, writing = os.pipe()
    os.close(reading)
    told = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (told.returncode, told.stderr) == (0, "")
