"""Whole runs on a real Ray, with real images, checkpoints and a real MLflow store."""

import io
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from PIL import Image

from helpers import MAE, RESNET, SIMCLR, VIT, wait_for
from selfray import config
from selfray.cluster import local_ray
from selfray.cluster.endings import RunFailed
from selfray.cluster.launch import PartOf, launch
from selfray.cluster.placement import Placement, place
from selfray.cluster.runtime import Resources
from selfray.cluster.waiting import room_for
from selfray.commands.config_file import read_config
from selfray.console import Console
from selfray.data.writer import write_arrays
from selfray.experiment import CheckpointConfig, DataConfig, Experiment, ProbeConfig
from selfray.optim import OptimizerConfig
from selfray.pixels import augment
from selfray.runs import checkpoint
from selfray.runs.checkpoint import Checkpoint
from selfray.runs.spool import SpoolReader
from selfray.storage import Location
from selfray.train import TrainState

pytestmark = pytest.mark.usefixtures("ray_session")

IMAGES = 96


def images(count: int = IMAGES, size: int = 16) -> list[bytes]:
    """Noisy PNGs of two kinds, dark and light: the label is the kind."""
    rng = np.random.default_rng(0)
    encoded = []
    for index in range(count):
        values = rng.integers(0, 120, (size, size, 3)) + 120 * (index % 2)
        file = io.BytesIO()
        Image.fromarray(values.astype(np.uint8)).save(file, format="PNG")
        encoded.append(file.getvalue())
    return encoded


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    labels = [index % 2 for index in range(IMAGES)]
    write_arrays(str(folder / "two"), images(), labels, label_names=["dark", "light"])
    return str(folder / "two")


def experiment(shards: str, output: Path, **changes) -> Experiment:
    base = Experiment(
        name="tiny-mae",
        method=MAE,
        encoder=VIT,
        data=DataConfig(path=shards),
        optimizer=OptimizerConfig(base_learning_rate=1e-2),
        epochs=6,
        batch_size=32,
        probe=ProbeConfig(times=1),
        checkpoint=CheckpointConfig(times=3),
        output=str(output),
        log_every=1,
    )
    return config.override(base, **changes)


class Screen(Console):
    """A console whose lines a test can read."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        super().__init__(self.text, None)

    @property
    def lines(self) -> list[str]:
        return self.text.getvalue().splitlines()


def records(run: str) -> list[dict]:
    return SpoolReader(Location.of(run) / "spool").read({})[0]


def test_two_workers_leave_checkpoints_probes_pictures_an_mlflow_run_and_name_a_broken_image(
    tmp_path,
) -> None:
    rows = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images())]
    rows[7]["bytes"] = rows[7]["bytes"][:40]
    labels = [index % 2 for index in range(IMAGES)]
    (tmp_path / "two").mkdir()
    pq.write_table(pa.table({"image": rows, "label": labels}), tmp_path / "two" / "a.parquet")
    wanted = experiment(str(tmp_path / "two"), tmp_path, workers=2)
    screen = Screen()
    result = launch(wanted, screen)
    assert "a.parquet row 7" in screen.text.getvalue()

    newest = Checkpoint.open(result.folder)
    assert newest.step == 18
    assert newest.experiment() == wanted
    assert set(result.probes) == {0, 18}
    assert (result.probes[18].knn or 0) > 0.9  # dark and light images are easily told apart
    assert "knn-v1" in result.probes[18].protocols["knn"]

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    tracked = client.get_experiment_by_name("selfray")
    assert tracked is not None
    (run,) = client.search_runs([tracked.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["method.mask_ratio"] == "0.75"
    assert run.data.tags["augmentation.backend"] == augment.BACKEND
    assert run.data.tags["probe.knn.protocol"].startswith("knn-v1")
    for name in ("version.torch", "machine.cpus", "selfray.git_commit", "mlflow.source.name"):
        assert name in run.data.tags
    for name in (
        "loss",
        "learning_rate",
        "gradient_norm",
        "throughput/images_per_second",
        "throughput/data_wait_seconds",
        "health/feature_std",
        "health/effective_rank",
    ):
        history = client.get_metric_history(run.info.run_id, name)
        assert [point.step for point in history] == [32 * step for step in range(1, 19)], name
    assert [p.step for p in client.get_metric_history(run.info.run_id, "probe/knn")] == [0, 576]
    pictures = {info.path for info in client.list_artifacts(run.info.run_id, "pictures")}
    assert pictures == {
        f"pictures/{name}.png"
        for name in ("views", "reconstructions", "neighbours", "embedding", "thumbnails", "curves")
    } | {"pictures/embedding.json"}
    assert "Result: kNN " in run.data.tags["mlflow.note.content"]
    assert run.inputs is not None
    assert [one.dataset.name for one in run.inputs.dataset_inputs] == ["two"]
    assert len(screen.lines) < 25

    kept = f"{result.folder}/experiment.yaml"
    assert read_config(kept, None, {}) == wanted
    assert any(line.endswith(f"pretrain --config {kept} --seed 1") for line in screen.lines)

    again = Screen()
    assert launch(wanted, again) == result
    assert any("complete, nothing to do" in line for line in again.lines)


@pytest.mark.long
def test_two_workers_that_accumulate_or_shard_train_what_one_worker_trains(
    shards, tmp_path
) -> None:
    ends = {}
    for name, changes in {
        "one": {},
        "accumulated": {"workers": 2, "accumulate": 2},
        "sharded": {"workers": 2, "shard": "fsdp"},
    }.items():
        changes = {"probe.times": 0, "epochs": 2, **changes}
        ends[name] = weights(
            launch(experiment(shards, tmp_path / name, **changes), Screen()).folder
        )
    # Float rounding is all that may differ: means of ranks and of micro-batches.
    for key, tensor in ends["one"].items():
        for other in ("accumulated", "sharded"):
            torch.testing.assert_close(ends[other][key], tensor, rtol=1e-3, atol=1e-4)


def forget_what_was_read() -> None:
    """End this Ray's idle workers: they hold small shards in memory, and would go on with them."""
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("ray::IDLE"):
            process.kill()


@pytest.mark.long
def test_two_workers_go_on_without_a_shard_that_was_lost_and_without_one_that_came(
    tmp_path,
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images(64))]
    for part in range(4):
        table = pa.table({"image": rows[16 * part : 16 * part + 16]})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=8)
    changes = {"workers": 2, "data.max_broken_fraction": 0.4}
    wanted = experiment(str(folder), tmp_path / "runs", **changes)
    wanted = replace(wanted, method=SIMCLR, encoder=RESNET)
    first = launch(wanted, Screen(), part_of=PartOf(None, {}, until_step=5))
    assert first.images_seen == 5 * 32
    forget_what_was_read()
    (folder / "1.parquet").unlink()
    pq.write_table(pa.table({"image": rows[:8]}), folder / "0-more.parquet")
    screen = Screen()
    result = launch(wanted, screen)
    text = screen.text.getvalue()
    assert result.images_seen == 6 * 64, "as many as planned"
    assert "1 of the 4 shards at the start is gone, the first is 1.parquet: their 16" in text
    assert "1 shard was added after this run started, the first is 0-more.parquet" in text
    assert f"{folder}/1.parquet: the file is gone" in text

    table = pa.table({"image": rows[:16]})
    pq.write_table(table, folder / "2.parquet", row_group_size=4)
    with pytest.raises(ValueError, match=r"2\.parquet is not the file that .* started with"):
        launch(wanted, Screen())


def tracked_run(output: Path) -> Run:
    client = MlflowClient(f"sqlite:///{output}/mlflow.db")
    tracked = client.get_experiment_by_name("selfray")
    assert tracked is not None
    (run,) = client.search_runs([tracked.experiment_id])
    return run


@pytest.mark.long
def test_two_workers_whose_features_collapse_end_at_once_and_can_go_on(shards, tmp_path) -> None:
    # The features of this tiny MAE grow alike, as MAE's do at first (from 0.75 to 0.6 in ten
    # steps): a floor between them sees what a collapse would show.
    changes = {"workers": 2, "probe.times": 0, "checkpoint.times": 9, "guard.feature_floor": 0.65}
    wanted = experiment(shards, tmp_path, **{**changes, "guard.patience": 4})
    cause = r"collapsed: health/feature_std is 0\.\d+, below 0\.65 at step"
    with pytest.raises(RunFailed, match=cause) as failed:
        launch(wanted, Screen())
    found = re.search(r"at step (\d+); the checkpoint of step (\d+) is kept", str(failed.value))
    assert found
    ended, last_good = int(found[1]), int(found[2])
    assert last_good <= ended - 4, "nothing is saved while the guard suspects"
    told = records(str(tmp_path / wanted.run_name))
    assert sum(r["kind"] == "started" for r in told) == 1, "it is not tried again"
    progress = [r for r in told if r["kind"] == "progress"]
    assert [r["step"] for r in progress] == list(range(1, ended + 1))
    (last,) = [r for r in told if r["kind"] == "tags" and r["values"].get("failure")]
    assert last["values"] == {"failure": str(failed.value)}
    # Gloo would wait for half an hour for a rank that has left.
    assert last["time"] - progress[-1]["time"] < 300_000
    run = tracked_run(tmp_path)
    assert run.info.status == "FAILED"
    assert run.data.tags["failure"] == str(failed.value)
    kept = Checkpoint.open(str(tmp_path / wanted.run_name))
    assert kept.step == last_good
    assert kept.encoder()(torch.zeros(1, 3, 16, 16)).cls.isfinite().all()

    screen = Screen()
    launch(config.override(wanted, **{"guard.patience": 0}), screen)
    assert any(f"continuing from step {last_good} of 18" in line for line in screen.lines)
    run = tracked_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.tags["failure"] == ""


# --- bad input


def test_a_missing_data_path_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--data\.path /no/such/folder does not exist"):
        launch(experiment("/no/such/folder", tmp_path), Screen())


def test_a_folder_without_images_is_named(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--data\.path.*empty"):
        launch(experiment(str(tmp_path / "empty"), tmp_path / "runs"), Screen())


def test_a_parquet_file_without_images_shows_its_columns(tmp_path) -> None:
    pq.write_table(pa.table({"text": ["a"], "number": [1]}), tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=r"no image column.*text: string, number: int64"):
        launch(experiment(str(tmp_path / "table.parquet"), tmp_path / "runs"), Screen())


def test_a_batch_larger_than_the_data_set_is_refused(shards, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"batch_size 128 is larger than the data set of 96"):
        launch(experiment(shards, tmp_path, batch_size=128), Screen())


def test_an_unwritable_output_folder_is_named(shards, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"--output: .*cannot be written"):
        launch(experiment(shards, tmp_path / "file" / "runs"), Screen())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 4}, r"--workers 4 need 4 CPUs and the cluster has 2: give --workers 2"),
        ({"gpus_per_worker": 1.0}, r"need 1 GPUs and the cluster has 0"),
        ({"cpus_per_worker": 2.0}, r"leave 0 of the cluster's 2 CPUs to read the data"),
        ({"data_cpus": 3}, r"--data-cpus 3 is more than the 0\.8 CPUs"),
    ],
)
def test_more_than_the_cluster_has_is_refused_with_what_is_missing(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        place(experiment("x", Path("y"), **changes), Resources(cpus=2, gpus=0))


def test_as_many_workers_as_cpus_leave_some_cpu_for_the_data() -> None:
    placement = place(experiment("x", Path("y"), workers=2), Resources(cpus=2, gpus=0))
    assert placement.cpus_per_worker * 2 + placement.data_cpus < 2
    assert placement.data_cpus >= 0.5


AWS = Resources(640, 32, {"trainer": 4}, grows=True)
"""What cluster.yaml may grow to."""


def test_a_run_on_a_growing_cluster_asks_for_some_cpus_for_its_data_and_not_for_all() -> None:
    wanted = experiment("x", Path("y"), workers=8)
    assert place(wanted, AWS) == Placement(8, 1, 1, 64)
    assert place(replace(wanted, data_cpus=500), AWS).data_cpus == 500
    with pytest.raises(ValueError, match="--workers 32 x --gpus-per-worker 2 need 64 GPUs"):
        place(replace(wanted, workers=32, gpus_per_worker=2), AWS)


def test_what_a_silent_cluster_can_add_is_believed_and_asked_for_where_it_is_not_said() -> None:
    silent = Resources(0, 0, is_unknown=True)
    wanted = experiment("x", Path("y"), workers=4)
    with pytest.raises(ValueError, match="does not say what it can add: give --gpus-per-worker"):
        place(wanted, silent)
    told = replace(wanted, gpus_per_worker=1, data_cpus=6)
    assert place(told, silent) == Placement(4, 1, 1, 6)


def test_an_elastic_run_is_placed_at_the_size_that_the_cluster_has_room_for() -> None:
    wanted = experiment("x", Path("y"), workers="2:8")
    assert place(wanted, Resources(32, 4)).workers == 4
    assert place(wanted, Resources(64, 16)).workers == 8
    with pytest.raises(ValueError, match="--workers 2:8 x --gpus-per-worker 1 need 2 GPUs"):
        place(wanted, Resources(8, 1))


def test_what_a_trainers_node_must_have_is_reserved_and_missed_by_name() -> None:
    wanted = experiment("x", Path("y"), workers=4, worker_resources="trainer=1")
    placement = place(wanted, AWS)
    assert placement.resources(wanted) == {"CPU": 1, "GPU": 1, "trainer": 1}
    with pytest.raises(ValueError, match="need 8 of trainer and the cluster has 4"):
        place(replace(wanted, workers=8), AWS)


def test_a_worker_never_wants_more_cpus_than_a_node_has() -> None:
    wanted = experiment("x", Path("y"), workers=2)
    assert place(wanted, Resources(32, 0, largest_node_cpus=4)).cpus_per_worker == 4


def test_nodes_have_room_for_whole_workers_only() -> None:
    nodes = [{"CPU": 3.0}, {"CPU": 1.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}]
    assert room_for({"CPU": 2}, iter(nodes)) == 1 + 0 + 4
    assert room_for({"CPU": 0.1}, iter(nodes[1:2])) == 10  # 1.0 // 0.1 is 9
    assert room_for({"CPU": 1, "GPU": 1}, iter(nodes)) == 0 + 1 + 2


def test_a_checkpoint_of_another_method_or_encoder_is_refused(shards, tmp_path) -> None:
    other = replace(experiment(shards, tmp_path), method=SIMCLR, encoder=RESNET)
    saved = checkpoint.save(
        TrainState.start(other, 32), other, Location.of(tmp_path / "other"), 1.0
    )
    wanted = experiment(shards, tmp_path, init_from=saved.location.uri)
    with pytest.raises(ValueError, match=r"--init-from .* is a checkpoint of simclr, but this"):
        launch(wanted, Screen())
    mine = replace(wanted, init_from=None)
    saved = checkpoint.save(TrainState.start(mine, 32), mine, Location.of(tmp_path / "mine"), 1.0)
    deeper = replace(mine, init_from=saved.location.uri, encoder=replace(VIT, depth=3))
    with pytest.raises(ValueError, match=r"another encoder: encoder\.depth: 3, was 2"):
        launch(deeper, Screen())


# --- faults

SCRIPT = """
import sys
from selfray.cluster import runtime
from selfray.cluster.launch import launch
from selfray.console import Console
from selfray import config
from selfray.cluster import local_ray
with runtime.session():
    launch(config.loads(open(sys.argv[1]).read()), Console(sys.stdout, None))
"""


def weights(run: str) -> dict[str, torch.Tensor]:
    return Checkpoint.open(run).state()["method"]


@pytest.mark.long
def test_a_killed_worker_and_then_a_killed_command_cost_no_weight_and_leave_nothing_of_ray(
    shards, tmp_path
) -> None:
    """The unbroken run that they are compared with has a tracking server that is dead."""
    changes = {"epochs": 100, "checkpoint.times": 50, "probe.times": 0}
    wanted = experiment(shards, tmp_path / "killed", **changes)
    (tmp_path / "experiment.json").write_text(config.dumps(wanted))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "experiment.json")]
    environment = {k: v for k, v in os.environ.items() if "RAY" not in k}
    run = Location.of(tmp_path / "killed" / wanted.run_name)
    with (tmp_path / "said").open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def starts() -> list[dict]:
        assert process.poll() is None, (tmp_path / "said").read_text()
        spool = records(run.uri) if (run / "spool").exists() else []
        return [r for r in spool if r["kind"] == "started"]

    wait_for("a checkpoint", lambda: starts() and checkpoint.all_of(run))
    os.kill(starts()[0]["process"], signal.SIGKILL)
    wait_for("a second start", lambda: len(starts()) == 2)
    again = starts()[1]["step"]
    assert again > 0
    wait_for("a later checkpoint", lambda: starts() and checkpoint.all_of(run)[-1].step > again)
    wait_for("a run in MLflow", (run / "mlflow.json").exists)
    children = psutil.Process(process.pid).children(recursive=True)
    (folder,) = {
        Path(word.partition("=")[2])
        for child in children
        for word in child.cmdline()
        if word.startswith("--temp_dir=")
    }
    process.kill()
    process.wait()
    assert "a worker died: restarted from step" in (tmp_path / "said").read_text()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
    local_ray.sweep_leftovers()
    assert not folder.exists()
    stopped_at = checkpoint.latest(run)
    assert stopped_at is not None
    assert stopped_at.step < 300
    first_id = (run / "mlflow.json").read_json()["run_id"]

    screen = Screen()
    result = launch(wanted, screen)
    assert any("continuing from step" in line for line in screen.lines)
    assert (run / "mlflow.json").read_json()["run_id"] == first_id
    screen = Screen()
    unbroken = replace(wanted, output=str(tmp_path / "whole"))
    whole = launch(unbroken, screen, tracking="http://127.0.0.1:9")
    for name, tensor in weights(whole.folder).items():
        assert torch.equal(weights(result.folder)[name], tensor), name
    assert sum("cannot be reached" in line for line in screen.lines) == 1
    kept = [r for r in records(whole.folder) if r["kind"] == "metrics" and "loss" in r["values"]]
    assert len(kept) == 300
