"""Signals at the stages of commands: exit code, last line, MLflow, and what is left behind.

Two more stages are in test_endings.py (two Ctrl-C at the start) and test_sweep_runs.py (a sweep).
docs/reliability.md has the whole matrix.
"""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
from test_data_layouts import images
from test_endings import Run

SHARDS = "finished shards are kept; the same command resumes"
TORCHS_CACHE = "torchinductor_"


class Watched(Run):
    """A command with a temporary folder of its own."""

    @property
    def temporary(self) -> Path:
        folder = Path(tempfile.gettempdir()) / f"sig-{os.getpid()}"  # sockets need a short path
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"TMPDIR": str(self.temporary)}

    def left(self) -> list[str]:
        """What the command left in its temporary folder, without torch's cache."""
        names = [path.name for path in self.temporary.iterdir()]
        return [name for name in names if not name.startswith(TORCHS_CACHE)]

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for path in self.temporary.iterdir():
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if not any(self.temporary.iterdir()):
            self.temporary.rmdir()

    @property
    def last_line(self) -> str:
        return self.said.splitlines()[-1]


class Build(Watched):
    @property
    def words(self) -> list[str]:
        source = str(self.output / "images")
        return ["shards", "build", source, str(self.output / "shards"), "--shard-mib", "0.0005"]

    def builds(self) -> None:
        """Until more shards are whole than there were."""
        before = len(self.records())
        self.waits_for("shards", lambda: len(self.records()) > before + 1)

    def records(self) -> list[Path]:
        return list(self.output.glob("shards/_build/*.parquet.json"))


@pytest.mark.long
def test_a_build_ends_by_each_signal_and_goes_on(tmp_path: Path) -> None:
    images(tmp_path / "runs" / "images", *"abcdefgh", count=250)
    for number, is_group in ((signal.SIGINT, True), (signal.SIGHUP, False)):
        with Build(tmp_path / "runs") as build:
            build.builds()
            (os.killpg if is_group else os.kill)(build.process.pid, number)
            assert build.ended() == 128 + number, build.said
            assert build.last_line == f"interrupted: {SHARDS}"
            assert build.left() == []
            assert "Traceback" not in build.said
    assert "continuing: " in build.said  # the second found what the first had finished


@pytest.mark.long
def test_a_run_ends_by_a_closed_terminal_at_its_start_and_by_two_kills_in_training(
    tmp_path: Path,
) -> None:
    with Watched(tmp_path / "runs") as run:
        run.waits_for("Ray's start", lambda: bool(run.family))
        os.killpg(run.process.pid, signal.SIGHUP)
        assert run.ended() == 129
        assert run.last_line == "interrupted: nothing was started yet; the same command starts it"
        assert run.left() == []
    with Watched(tmp_path / "runs") as run:
        run.trains()
        for _ in range(2):
            os.killpg(run.process.pid, signal.SIGTERM)
            time.sleep(0.2)
        assert run.ended() == 143
        assert run.last_line == ("interrupted: the same command continues from the last checkpoint")
        assert run.status == "KILLED"
        assert run.left() == []
    assert list(tmp_path.rglob("*.tmp")) == []
