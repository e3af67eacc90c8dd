"""Tracking reaches MLflow complete, once, and without ever standing in the way of training."""

import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from pyarrow import fs

from helpers import wait_for
from selfray.cluster.mlflow_store import (
    DataSetInput,
    database_file,
    experiment_name,
    tracking_uri,
)
from selfray.cluster.tracking import Tracker
from selfray.runs import environment
from selfray.runs.environment import environment_tags
from selfray.runs.folder import SHIPPED, SPOOL
from selfray.runs.spool import SpoolReader, SpoolWriter
from selfray.storage import Location, read_object

PLATFORM = Path(__file__).parents[2] / "platform"
IN_TIME = 25.0
"""Seconds: less than a Tracker waits by default, and enough on a machine that does much else."""

# A driver in a process of its own: it reports its run id, then trains until it is told to stop.
DRIVER = """
import json, sys, time
from selfray.cluster.tracking import Tracker
from selfray.runs.spool import SpoolWriter
from selfray.storage import Location
uri, folder, points = sys.argv[1], Location.of(sys.argv[2]), int(sys.argv[3])
tracker = Tracker(uri, "shared", folder.name, folder, {"epochs": 3}, {"who": folder.name})
tracker.start()
writer = SpoolWriter(folder / "spool", "train-0")
for step in range(points):
    writer.metrics(step, {"loss": 1 / (step + 1)})
print(tracker.wait_for_run(60), flush=True)
sys.stdin.readline()
print(tracker.finish("FINISHED"), flush=True)
"""


def client(uri: str):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client(uri).get_metric_history(run_id, key))


def everything_shipped(run: Location) -> bool:
    """Whether MLflow has all that the run's spool holds, and how the run ended."""
    shipped = read_object(run / SHIPPED)
    records, _ = SpoolReader(run / SPOOL).read(shipped.get("offsets", {}))
    return shipped.get("status") is not None and not records and not shipped.get("artifacts")


def start_driver(uri: str, folder: Path, points: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, uri, str(folder), str(points)],
        env={**os.environ, "PYTHONPATH": str(PLATFORM)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name means something in URIs, so that each test shows that it does not
    matter."""
    output = tmp_path_factory.mktemp("output") / "a b%20?#'x"
    output.mkdir()
    return output


@pytest.fixture(scope="module")
def uri(output: Path) -> str:
    """One store for all tests here: making a fresh one takes seconds."""
    return tracking_uri(str(output))


@pytest.fixture(scope="module")
def two_drivers(output: Path, uri: str) -> Iterator[dict[str, str]]:
    """Two drivers that met in a fresh store: `one` finished, `two` was killed. Their run ids."""
    drivers = {name: start_driver(uri, output / name, 2500) for name in ("one", "two")}
    try:
        run_ids = {name: d.stdout.readline().strip() for name, d in drivers.items() if d.stdout}
        shipped = output / "two/shipped.json"
        wait_for("what was shipped", lambda: "train-0.jsonl" in shipped.read_text())
        drivers["two"].send_signal(signal.SIGKILL)
        out, err = drivers["one"].communicate("\n", timeout=60)
        assert out == "True\n"
        assert err == ""  # neither MLflow's nor alembic's chatter
        yield run_ids
    finally:
        for driver in drivers.values():
            driver.kill()
            driver.communicate()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(uri: str, output: Path, said: list[str], request) -> Callable[..., Tracker]:
    """Makes a Tracker on the shared store; its run folder is named after the test."""

    def make(params=None, tags=None, store: str = uri, **more) -> Tracker:
        folder = Location.of(output / request.node.name)
        tracker = Tracker(
            store,
            "tests",
            request.node.name,
            folder,
            params or {},
            tags or {},
            say=said.append,
            retry_seconds=(0.1, 0.5),
            **more,
        )
        tracker.start()
        return tracker

    return make


def run_of(tracker: Tracker, uri: str):
    assert tracker.run_id is not None
    return client(uri).get_run(tracker.run_id)


def test_importing_the_tracker_does_not_import_mlflow() -> None:
    code = (
        "import sys, selfray.cluster.tracking; print({'mlflow', 'ray', 'torch'} & {*sys.modules})"
    )
    env = {**os.environ, "PYTHONPATH": str(PLATFORM)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_drivers_that_meet_in_a_fresh_store_share_one_experiment(
    uri: str, two_drivers: dict[str, str]
) -> None:
    experiment = client(uri).get_experiment_by_name("shared")
    assert experiment is not None
    for name, run_id in two_drivers.items():
        run = client(uri).get_run(run_id)
        assert run.info.experiment_id == experiment.experiment_id
        assert run.data.tags["who"] == name
    assert client(uri).search_runs(["0"]) == []  # none landed in "Default"
    assert len(client(uri).search_runs([experiment.experiment_id])) == 2


def test_a_killed_driver_s_successor_goes_on_in_the_same_run_with_every_point_once(
    uri: str, output: Path, two_drivers: dict[str, str], said: list[str]
) -> None:
    folder = Location.of(output / "two")
    # As if it had been killed after sending, before that was recorded: most is sent again.
    lines = (folder / "spool/train-0.jsonl").read_bytes().splitlines(keepends=True)
    shipped = (folder / "shipped.json").read_json()
    shipped["offsets"]["train-0.jsonl"] = sum(map(len, lines[:900]))
    (folder / "shipped.json").write_json(shipped)
    assert not everything_shipped(folder)
    writer = SpoolWriter(folder / "spool", "train-1")
    writer.metrics(2500, {"loss": 0.5})
    tracker = Tracker(uri, "shared", "two", folder, {"epochs": 4}, {}, say=said.append)
    tracker.start()
    assert tracker.finish("FAILED")
    assert tracker.run_id == two_drivers["two"]
    expected = [(step, 1 / (step + 1)) for step in range(2500)] + [(2500, 0.5)]
    assert history(uri, two_drivers["two"], "loss") == expected
    run = run_of(tracker, uri)
    assert run.info.status == "FAILED"
    assert run.data.params == {"epochs": "3"}
    assert run.data.tags["resumed_with.epochs"] == "4"
    assert everything_shipped(folder)
    assert said == []


@pytest.mark.long
def test_a_server_that_is_down_is_said_once_and_gets_everything_when_it_is_up(
    tmp_path: Path, make: Callable[..., Tracker], said: list[str]
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server_uri = f"http://127.0.0.1:{port}"
    client(server_uri)  # import MLflow first: the server must still be starting when we begin
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        tracker = make({"lr": 0.1, "empty": "", "long": "x" * 7000}, {"a.b": "c"}, store=server_uri)
        writer = SpoolWriter(tracker.run_folder / "spool", "train-0")
        for step in range(2000):
            writer.metrics(step, {"loss": step / 7})
        tracker.set_tags({"probe.knn.protocol": "v1"})
        tracker.log_picture(Image.new("RGB", (4, 4), "red"), "pictures/red.png")
        wait_for("a line", lambda: said)
        assert len(said) == 1
        assert f"tracking server {server_uri} cannot be reached" in said[0]
        assert "Connection refused" in said[0]
        assert str(tracker.run_folder / "spool") in said[0]
        assert "next start of the command" in said[0]

        wait_for("a second line", lambda: len(said) == 2)
        # One line for all the attempts that were refused while the server was starting.
        assert said[1] == f"{server_uri} is back: everything kept has been sent"
        writer.metrics(2000, {"loss": 0.25})
        assert tracker.finish("FINISHED")
        assert tracker.run_id is not None
        expected = [(step, step / 7) for step in range(2000)] + [(2000, 0.25)]
        assert history(server_uri, tracker.run_id, "loss") == expected
        run = run_of(tracker, server_uri)
        assert run.info.status == "FINISHED"
        assert run.data.params["lr"] == "0.1"
        assert run.data.params["empty"] == ""
        assert len(run.data.params["long"]) == 6000
        assert run.data.tags["a.b"] == "c"
        assert run.data.tags["probe.knn.protocol"] == "v1"
        files = client(server_uri).list_artifacts(tracker.run_id, "pictures")
        assert [file.path for file in files] == ["pictures/red.png"]
        assert tracker.run_url == (
            f"{server_uri}/#/experiments/{run.info.experiment_id}/runs/{tracker.run_id}"
            "?workflowType=machine_learning"
        )
        assert len(said) == 2
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_finishing_with_a_dead_server_ends_in_time_and_the_next_start_sends_all(
    make: Callable[..., Tracker], uri: str, two_drivers, said: list[str]
) -> None:
    tracker = make({"lr": 0.1}, store="http://127.0.0.1:9")
    SpoolWriter(tracker.run_folder / "spool", "train-0").metrics(1, {"loss": 1.0})
    tracker.set_tags({"late": "yes"})
    start = time.monotonic()
    assert not tracker.finish("FINISHED", seconds=1.0)
    assert time.monotonic() - start < IN_TIME
    assert len(said) == 2
    assert "not everything was sent" in said[1]
    assert not everything_shipped(tracker.run_folder)

    successor = make({"lr": 0.1})
    assert successor.finish("FINISHED")
    assert successor.run_id is not None
    assert history(uri, successor.run_id, "loss") == [(1, 1.0)]
    assert run_of(successor, uri).data.tags["late"] == "yes"
    assert everything_shipped(tracker.run_folder)


def test_a_server_that_never_answers_does_not_hold_up_the_driver(
    make: Callable[..., Tracker], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        start = time.monotonic()
        tracker = make(store=f"http://127.0.0.1:{listener.getsockname()[1]}")
        tracker.set_tags({"a": "b"})
        assert time.monotonic() - start < IN_TIME
        wait_for("a line", lambda: said)
        start = time.monotonic()
        assert not tracker.finish("FINISHED", seconds=0.5)
        assert time.monotonic() - start < IN_TIME
        assert "no answer within 1 s" in said[0]


def test_what_mlflow_refuses_is_said_and_does_not_hold_up_the_rest(
    make: Callable[..., Tracker], uri: str, two_drivers, said: list[str]
) -> None:
    tracker = make()
    values = [(step, step / 2) for step in range(40)]
    lines = [
        {"time": 5 if step != 20 else -5, "kind": "metrics", "images_seen": step}
        | {"values": {"loss": value}}
        for step, value in values
    ]
    spool = tracker.run_folder / "spool"
    spool.make_folder()
    (spool / "w.jsonl").write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    assert tracker.finish("FINISHED")
    assert tracker.run_id is not None
    assert history(uri, tracker.run_id, "loss") == values[:20] + values[21:]
    assert len(said) == 1
    assert "MLflow refuses metrics 'loss'" in said[0]


def test_metrics_arrive_where_files_cannot(
    tmp_path: Path, uri: str, two_drivers, said: list[str]
) -> None:
    store = tmp_path / "store"
    store.write_text("a file where MLflow wants a folder")
    client(uri).create_experiment("no files", artifact_location=str(store / "files"))
    folder = Location.of(tmp_path / "run")
    tracker = Tracker(uri, "no files", "run", folder, {}, {}, say=said.append)
    tracker.start()
    tracker.log_picture(Image.new("RGB", (4, 4), "red"), "red.png")
    SpoolWriter(folder / "spool", "train-0").metrics(1, {"loss": 1.0})
    assert not tracker.finish("FINISHED")
    assert run_of(tracker, uri).data.metrics == {"loss": 1.0}
    assert run_of(tracker, uri).info.status == "FINISHED"
    assert "takes metrics but no files" in said[0]

    store.unlink()
    successor = Tracker(uri, "no files", "run", folder, {}, {}, say=said.append)
    successor.start()
    assert successor.finish("FINISHED")
    assert successor.run_id is not None
    assert successor.run_id == tracker.run_id
    assert [file.path for file in client(uri).list_artifacts(successor.run_id)] == ["red.png"]


@pytest.mark.parametrize("store", ["gopher://nowhere", "./mlruns"])
def test_a_refused_uri_is_said_once_with_its_cause(
    store: str, make: Callable[..., Tracker], said: list[str]
) -> None:
    tracker = make(store=store)
    wait_for("a line", lambda: said)
    tracker.finish("FINISHED", seconds=0.3)
    assert store in said[0]
    assert ("unsupported URI" if "gopher" in store else "maintenance mode") in said[0]
    assert len(said) == 2


def test_nan_and_infinities_arrive(make: Callable[..., Tracker], uri: str, two_drivers) -> None:
    tracker = make()
    writer = SpoolWriter(tracker.run_folder / "spool", "train-0")
    writer.metrics(8, {"nan": math.nan, "inf": math.inf, "minus": -math.inf})
    assert tracker.finish("FINISHED")
    metrics = run_of(tracker, uri).data.metrics
    assert math.isnan(metrics["nan"])
    assert metrics["inf"] > 1e308  # SQL knows no infinity; MLflow stores the largest double
    assert metrics["minus"] < -1e308


def test_files_and_probes_arrive_with_their_names_made_acceptable(
    tmp_path: Path, make: Callable[..., Tracker], uri: str, output: Path, two_drivers, said
) -> None:
    tracker = make()
    (tmp_path / "table.txt").write_text("hello")
    tracker.log_artifact(tmp_path / "table.txt", "tables")
    tracker.log_artifact(tmp_path / "absent.txt")
    probe = SpoolWriter(tracker.run_folder / "spool", "probe-0")
    probe.metrics(4096, {"probe/knn": 0.75, "odd%name": 1.0, "/../x": 2.0})
    probe.tags({"probe.knn.protocol": "knn", "probe.knn.version": "1"})
    assert tracker.finish("FINISHED")
    assert tracker.run_id is not None
    assert history(uri, tracker.run_id, "probe/knn") == [(4096, 0.75)]
    run = run_of(tracker, uri)
    assert run.data.metrics == {"probe/knn": 0.75, "odd_name": 1.0, "x": 2.0}
    assert run.data.tags["probe.knn.version"] == "1"
    sent = output / "mlartifacts" / tracker.run_id / "artifacts" / "tables" / "table.txt"
    assert sent.read_text() == "hello"
    assert (output / tracker.run_name / "artifacts/tables/table.txt").read_text() == "hello"
    assert len(said) == 1
    assert "absent.txt" in said[0]


def test_a_run_folder_on_an_object_store_is_shipped_too(
    tmp_path: Path, uri: str, two_drivers, said: list[str]
) -> None:
    # Anything but a LocalFileSystem is treated as an object store.
    filesystem = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    folder = Location(filesystem, "runs/a", "test://runs/a")
    tracker = Tracker(uri, "tests", "a", folder, {}, {}, say=said.append)
    tracker.start()
    tracker.log_picture(Image.new("RGB", (4, 4), "red"), "pictures/red.png")
    writer = SpoolWriter(folder / "spool", "train-0", flush_seconds=0.05)
    for step in range(100):
        writer.metrics(step, {"loss": step})
        time.sleep(0.002)
    writer.close()
    assert tracker.finish("FINISHED")
    assert tracker.run_id is not None
    assert history(uri, tracker.run_id, "loss") == [(step, step) for step in range(100)]
    assert client(uri).list_artifacts(tracker.run_id, "pictures")[0].path == "pictures/red.png"
    assert everything_shipped(folder)
    assert said == []


def test_a_reopened_run_is_running_until_it_finishes_and_children_know_their_parent(
    make: Callable[..., Tracker], uri: str, two_drivers, tmp_path: Path
) -> None:
    parent = make()
    assert parent.finish("FINISHED")
    assert run_of(parent, uri).info.status == "FINISHED"
    parent = make()
    parent_id = parent.wait_for_run(30)
    wait_for("a running run", lambda: run_of(parent, uri).info.status == "RUNNING")
    folder = Location.of(tmp_path / "child")
    child = Tracker(uri, "tests", "child", folder, {}, {}, parent_run_id=parent_id)
    child.start()
    assert child.finish("KILLED")
    assert run_of(child, uri).data.tags["mlflow.parentRunId"] == parent_id
    assert run_of(child, uri).info.status == "KILLED"
    assert parent.finish("FAILED")
    assert run_of(parent, uri).info.status == "FAILED"


def test_a_run_that_its_user_deleted_is_not_made_anew(
    make: Callable[..., Tracker], uri: str, two_drivers, said: list[str]
) -> None:
    tracker = make()
    run_id = tracker.wait_for_run(30)
    assert run_id is not None
    client(uri).delete_run(run_id)
    SpoolWriter(tracker.run_folder / "spool", "train-0").metrics(1, {"loss": 1.0})
    wait_for("a line", lambda: said)
    assert f"run {run_id} was deleted in MLflow" in said[0]
    client(uri).restore_run(run_id)
    wait_for("the loss", lambda: history(uri, run_id, "loss") == [(1, 1.0)])
    assert tracker.finish("FINISHED")


def test_the_tracking_uri_is_the_explicit_one_or_the_environment_s_or_a_local_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("out") == f"sqlite:///{tmp_path}/out/mlflow.db"
    assert tracking_uri(Location.of(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri("out", "sqlite:///my.db") == f"sqlite:///{tmp_path}/my.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri("out") == "http://tracking:5000"
    assert tracking_uri("out", "http://other") == "http://other"


def test_a_folder_s_name_stays_as_it_is_in_mlflow(
    make: Callable[..., Tracker], uri: str, output: Path
) -> None:
    tracker = make()
    tracker.log_json({"a": 1}, "b%20?#.json")
    assert tracker.finish("FINISHED")
    assert database_file(uri) == str(output / "mlflow.db")
    assert database_file(tracking_uri("elsewhere", uri)) == str(output / "mlflow.db")
    assert list((output / "mlartifacts").rglob("b%20?#.json"))
    # Nothing lies in a folder of another name, which MLflow creates.
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert f"--backend-store-uri {shlex.quote(uri)}`" in tracker.describe()


def test_the_experiment_is_the_environment_s_and_that_of_a_sweep_for_its_runs(
    make: Callable[..., Tracker], uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert experiment_name() == "selfray"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "birds")
    assert experiment_name() == "birds"
    elsewhere = client(uri).create_experiment("of the sweep")
    parent = client(uri).create_run(elsewhere)
    child = make(parent_run_id=parent.info.run_id)
    assert child.finish("FINISHED")
    assert client(uri).get_run(str(child.run_id)).info.experiment_id == elsewhere


def test_passwords_in_a_uri_are_not_shown(make: Callable[..., Tracker], said: list[str]) -> None:
    tracker = make(store="http://user:secret@127.0.0.1:9")
    wait_for("a line", lambda: said)
    tracker.finish("FINISHED", seconds=0.1)
    assert "secret" not in "".join(said) + tracker.describe()
    assert "http://***@127.0.0.1:9" in said[0]


def test_environment_tags_name_code_packages_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*command: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(
            ["git", *who, *command], check=True, capture_output=True, cwd=tmp_path / "checkout"
        )

    file = tmp_path / "checkout/platform/environment.py"
    file.parent.mkdir(parents=True)
    file.write_text("1")
    monkeypatch.setattr(environment, "__file__", str(file))
    monkeypatch.chdir(tmp_path)  # wherever the command is started
    assert "selfray.git_commit" not in environment_tags()
    git("init")
    assert "selfray.git_commit" not in environment_tags()  # a package that lies in another's
    git("add", ".")
    git("commit", "-m", "one")
    commit = environment_tags()["selfray.git_commit"]
    assert len(commit) == 40
    file.write_text("2")
    tags = environment_tags()
    assert tags["selfray.git_commit"] == f"{commit}+dirty"
    assert tags["mlflow.source.git.commit"] == commit
    assert int(tags["machine.cpus"]) > 0
    assert tags["version.torch"].startswith("2.")
    assert json.dumps(tags)
    monkeypatch.setenv("PATH", "")
    assert "machine.cpus" in environment_tags()  # with neither git nor nvidia-smi


def test_a_run_is_one_of_model_training_with_its_data_set_and_description(
    make: Callable[..., Tracker], uri: str, two_drivers
) -> None:
    data_set = DataSetInput("scans", "0" * 40, "s3://KEY:SECRET@bucket/scans", {"images": 12})
    for text in ("what, on what", "what, on what, result"):
        tracker = make(data_set=data_set)
        tracker.describe_run(text)
        assert tracker.finish("FINISHED")
    run = run_of(tracker, uri)
    assert run.data.tags["mlflow.note.content"] == "what, on what, result"
    kind = client(uri).get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"
    assert run.inputs is not None
    (found,) = run.inputs.dataset_inputs  # once, though the run was opened twice
    assert (found.dataset.name, found.dataset.digest) == ("scans", "0" * 36)
    assert "SECRET" not in found.dataset.source
    assert json.loads(found.dataset.profile or "") == {"images": 12}
