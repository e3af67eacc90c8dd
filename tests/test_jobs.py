"""`ray job submit` from this checkout to a cluster that was started by hand with `ray start`."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from selfray.checkpoint import latest
from selfray.storage import Location

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).parent / "ray"
JOB = "--runtime-env experiments/runtime_env.yaml --"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def wait_until(happens: Callable[[], object], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, f"{what} did not happen in {seconds} s"
        time.sleep(1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which `ray job` finds a cluster of one node with two CPUs."""
    dashboard = f"http://127.0.0.1:{free_port()}"
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment = {**kept, "RAY_AUTH_MODE": "disabled", "RAY_API_SERVER_ADDRESS": dashboard}
    log = (tmp_path_factory.mktemp("head") / "log").open("w")
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={free_port()}",
         "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard.rpartition(':')[2]}",
         "--temp-dir", f"/tmp/ray-{os.getpid()}"],  # a short path: sockets lie there
        env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"{dashboard}/api/version", timeout=2).status == 200
        except OSError:
            return False

    wait_until(answers, "the dashboard's first answer")
    yield environment
    os.killpg(head.pid, signal.SIGTERM)
    try:
        head.wait(30)
    finally:
        if head.poll() is None:
            os.killpg(head.pid, signal.SIGKILL)


def ray_job(cluster: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RAY, "job", *words], cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=500
    )


def runs_in(output: Path) -> dict[str, list[str]]:
    """The statuses of the MLflow runs in an output folder: of sweeps and of single runs."""
    client = MlflowClient(f"sqlite:///{output}/mlflow.db")
    tracked = client.get_experiment_by_name("selfray")
    assert tracked is not None
    found: dict[str, list[str]] = {"sweep": [], "run": []}
    for run in client.search_runs([tracked.experiment_id]):
        kind = "sweep" if "sweep.question" in run.data.tags else "run"
        found[kind].append(run.info.status)
    return found


def test_a_sweep_is_submitted_and_answers_in_its_log(cluster, tmp_path) -> None:
    command = f"python experiments/sweep_mae.py --ratios 0.5 0.75 --epochs 1 --output {tmp_path}"
    done = ray_job(cluster, "submit", *JOB.split(), *command.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Which mask ratio is best for these images? mask ratio" in done.stdout
    assert runs_in(tmp_path) == {"sweep": ["FINISHED"], "run": ["FINISHED"] * 2}


def test_a_stopped_job_says_killed_in_mlflow_and_is_continued_by_the_same_command(
    cluster, tmp_path
) -> None:
    command = (
        f"python experiments/pretrain.py mae-digits --epochs 300 --checkpoint.times 150 "
        f"--probe.times 0 --output {tmp_path}"
    )
    first, second = f"first-{os.getpid()}", f"second-{os.getpid()}"
    for name in (first, second):
        done = ray_job(
            cluster, "submit", "--no-wait", "--submission-id", name, *JOB.split(), *command.split()
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if name == first:

            def has_a_checkpoint() -> bool:
                folders = [path for path in tmp_path.glob("mae-digits-*") if path.is_dir()]
                return any(latest(Location.of(folder)) for folder in folders)

            wait_until(has_a_checkpoint, "a checkpoint")
        else:

            def goes_on() -> bool:
                return "continuing from step" in ray_job(cluster, "logs", second).stdout

            wait_until(goes_on, "going on")
        stopped = ray_job(cluster, "stop", name)
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        assert runs_in(tmp_path) == {"sweep": [], "run": ["KILLED"]}
    assert "interrupted: the same command continues" in ray_job(cluster, "logs", first).stdout
