"""However a command ends before its time: one line, the right exit code, and nothing left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil
import pytest
from mlflow.tracking import MlflowClient

import selfray
from helpers import wait_for
from selfray.runs import record
from selfray.storage import Location

COMMAND = "import sys; from selfray.commands.main import main; sys.exit(main())"
NO_NETWORK = Path(__file__).parents[1] / "fixtures" / "no-network"
FLAGS = ("mae-digits", "--epochs", "40", "--checkpoint.times", "40", "--probe.times", "0")


def _heed_interrupts() -> None:
    """A shell starts what runs in its background with SIGINT ignored, nohup with SIGHUP, and so
    would this test."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@dataclass
class Run:
    """`selfray pretrain` on the digits, in a process of its own, and what Ray starts for it."""

    output: Path
    flags: Sequence[str] = FLAGS
    family: set[psutil.Process] = field(default_factory=set)

    def __enter__(self) -> Self:
        self.console = self.output.with_name(self.output.name + "-console")
        with self.console.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, *self.words],
                env=self.environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=_heed_interrupts,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def words(self) -> list[str]:
        return ["pretrain", *self.flags, "--output", str(self.output)]

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if "RAY" not in name}
        return kept | {"PYTHONPATH": str(Path(selfray.__file__).parents[1])}

    @property
    def said(self) -> str:
        return self.console.read_text()

    def waits_for(self, what: str, happened: Callable[[], bool]) -> None:
        def look() -> bool:
            assert self.process.poll() is None, self.said
            with suppress(psutil.Error):
                self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
            return happened()

        wait_for(what, look)

    def trains(self) -> None:
        self.waits_for("training", lambda: "images/s" in self.said)

    def only(self, name: str) -> psutil.Process:
        """The process of this name. Others of the family may end while they are asked."""
        found = []
        for process in self.family:
            with suppress(psutil.NoSuchProcess):
                found += [process] if process.name() == name else []
        (one,) = found
        return one

    def ended(self) -> int:
        """Its exit code, once nothing of it is left."""
        code = self.process.wait(300)
        _, alive = psutil.wait_procs(list(self.family), timeout=60)
        assert alive == []
        return code

    @property
    def status(self) -> str:
        """Of its run in MLflow."""
        client = MlflowClient(f"sqlite:///{self.output}/mlflow.db")
        tracked = client.get_experiment_by_name("selfray")
        assert tracked is not None
        (run,) = client.search_runs([tracked.experiment_id])
        return run.info.status


@dataclass
class WatchedRun(Run):
    """A run of which no process may reach beyond this machine."""

    @property
    def reached(self) -> Path:
        return self.output.with_name(self.output.name + "-reached")

    @property
    def environment(self) -> dict[str, str]:
        path = f"{NO_NETWORK}{os.pathsep}{super().environment['PYTHONPATH']}"
        return super().environment | {
            "PYTHONPATH": path,
            "SELFRAY_TEST_REACHED": str(self.reached),
        }

    def ended(self) -> int:
        def look() -> bool:
            self._look_at_sockets()
            return self.process.poll() is not None

        wait_for("the end", look, every=0.3)
        code = super().ended()
        assert not self.reached.exists(), self.reached.read_text()
        return code

    def _look_at_sockets(self) -> None:
        """Ray's own processes are not Python: Linux tells what they are connected to."""
        with suppress(psutil.Error):
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
        for process in self.family:
            with suppress(psutil.Error):
                for socket in process.net_connections("tcp"):
                    host = socket.raddr.ip if socket.raddr else "127.0.0.1"
                    assert host.removeprefix("::ffff:").startswith("127."), (process, socket)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own, in memory; needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Take the last free byte of a disk."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    return filler


@pytest.mark.long
def test_a_disk_that_fills_up_is_told_everywhere_and_the_same_command_goes_on(disk: Path) -> None:
    flags = ("mae-digits", "--epochs", "8", "--checkpoint.times", "4", "--probe.times", "0")
    flags = (*flags, "--max-failures", "0")
    with WatchedRun(disk / "runs", flags) as run:
        run.waits_for("a checkpoint", lambda: any(disk.rglob("step-*/MANIFEST.json")))
        filler = fill(disk)
        assert run.ended() == 1
    assert "error: the last checkpoint cannot be written to" in run.said
    assert "make room and start the same command again" in run.said
    assert "Traceback" not in run.said
    (written,) = disk.glob("runs/mae-digits-*/run.json")
    told = json.loads(written.read_text())
    assert told["status"] == "failed"
    assert told["failure"].startswith("the last checkpoint cannot be written to")
    assert run.status == "FAILED"
    filler.unlink()
    with WatchedRun(disk / "runs", flags) as run:
        assert run.ended() == 0
    assert "continuing from step" in run.said
    assert run.status == "FINISHED"


@pytest.mark.long
def test_two_interrupts_at_the_start_and_a_lost_raylet_are_one_line_and_leave_nothing(
    tmp_path: Path,
) -> None:
    with Run(tmp_path) as run:
        run.waits_for("Ray's start", lambda: bool(run.family))
        for _ in range(2):
            os.killpg(run.process.pid, signal.SIGINT)
            time.sleep(0.2)
        assert run.ended() == 130
    assert [line for line in run.said.splitlines() if "interrupted" in line]
    assert "Traceback" not in run.said

    with Run(tmp_path) as run:
        run.trains()
        run.only("raylet").kill()
        assert run.ended() == 1
    assert "error: Ray's process raylet ended unexpectedly" in run.said.splitlines()[-1]
    assert run.status == "FAILED"
    (written,) = tmp_path.glob("mae-digits-*/run.json")
    told = json.loads(written.read_text())
    assert told["status"] == "failed"
    assert "raylet" in told["failure"]


def test_a_failure_is_written_into_the_room_that_was_kept_for_it(tmp_path: Path) -> None:
    from helpers import experiment

    run = Location.of(tmp_path)
    record.write(run, experiment(), "running")
    assert (tmp_path / record.RESERVE).stat().st_size == record.RESERVE_BYTES
    record.write_failure(run, experiment(), "the disk is full")
    assert not (tmp_path / record.RESERVE).exists()
    assert record.read(run)["failure"] == "the disk is full"


def test_a_second_command_waits_for_the_first_to_make_its_data(tmp_path: Path) -> None:
    said: list[str] = []
    code = (
        "import sys, time; from selfray.runs import record; from selfray.storage import Location\n"
        "with record.exclusive(Location.of(sys.argv[1]), print):\n"
        "    print('mine', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    assert first.stdin is not None
    assert first.stdout.readline() == "mine\n"

    def tell(text: str) -> None:
        said.append(text)
        first.stdin.close()  # type: ignore[union-attr]

    with record.exclusive(Location.of(tmp_path), tell):
        assert first.wait(60) == 0
    assert said == [f"another command is preparing its data in {tmp_path / 'data'}: waiting for it"]
