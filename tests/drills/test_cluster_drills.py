"""Clusters that shrink and grow under a run, on one machine: real nodes of `ray start`.

Nodes are told apart by a custom resource, as a machine without GPUs has none to tell them by. Each
drill prints its timeline; the assertions read what the run itself wrote down.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray.util.state

from hand_made_cluster import CHECKOUT, HandMadeCluster, events
from helpers import wait_for
from selfray.runs.checkpoint import Checkpoint

pytestmark = pytest.mark.long

INSTALLED = {"PYTHONPATH": str(CHECKOUT / "platform")}
"""On all nodes, as if this checkout were installed there."""
STEPS_PER_EPOCH, BATCH = 18, 64
"""Of mae-digits."""


def pretrain(cluster: HandMadeCluster, *flags: str) -> subprocess.Popen[bytes]:
    output = ("--output", str(cluster.home / "runs"), "--probe.times", "0")
    return cluster.command("experiments/pretrain.py", "mae-digits", *output, *flags)


def run_of(cluster: HandMadeCluster) -> Path:
    return next((cluster.home / "runs").glob("mae-digits-*"), cluster.home / "none yet")


def wait_for_event(cluster: HandMadeCluster, kind: str, count: int, **wanted: Any) -> list[dict]:
    """All events of a kind, once `count` of them have the wanted fields."""

    def found() -> list[dict]:
        assert cluster.process.poll() in (None, 0), cluster.said.read_text()
        all_of_kind = events(run_of(cluster), kind)
        fitting = [e for e in all_of_kind if all(e[k] == v for k, v in wanted.items())]
        return all_of_kind if len(fitting) >= count else []

    answer = wait_for(f"{count} x {kind} {wanted}", found)
    last = answer[-1]
    what = ", ".join(f"{k} {last[k]}" for k in ("world_size", "step") if k in last)
    cluster.note(f"{kind}: {what}")
    return answer


def finish(process: subprocess.Popen[bytes], cluster: HandMadeCluster) -> str:
    process.wait(600)
    said = cluster.said.read_text()
    cluster.note(f"the command ended with {process.returncode}")
    assert process.returncode == 0, said
    return said


def assert_every_image_counts_once(run: Path, steps: int) -> None:
    """What the checkpoint is made of: an unbroken chain of steps, each of one global batch."""
    starts = events(run, "started")
    points = {record["step"]: record["images_seen"] for record in events(run, "progress")}
    assert all(images == BATCH * step for step, images in points.items())
    saved = {0} | {record["step"] for record in events(run, "checkpoint")}
    for start in starts:
        assert start["step"] in saved, "every start begins where a checkpoint ends"
        assert start["images_seen"] == BATCH * start["step"]
    newest = Checkpoint.open(str(run))
    assert newest.step == steps
    assert newest.manifest["images_seen"] == BATCH * steps


def test_an_elastic_run_loses_its_nodes_is_waited_for_and_grows_back(tmp_path: Path) -> None:
    with HandMadeCluster(tmp_path, ("--num-cpus", "0"), INSTALLED) as cluster:
        cluster.add_node("data", cpus=2)
        for name in ("one", "two"):
            cluster.add_node(name, cpus=1, trainer=1)
        flags = ("--workers", "1:2", "--worker-resources", "trainer=1", "--cpus-per-worker", "1")
        length = ("--epochs", "60", "--checkpoint.times", "120", "--log-every", "1")
        process = pretrain(cluster, *flags, *length, "--data-cpus", "1")
        wait_for_event(cluster, "started", 1, world_size=2)
        wait_for_event(cluster, "checkpoint", 2)
        assert_trainers_and_data_tasks_have_nodes_of_their_own(cluster)

        cluster.kill_node("two")
        wait_for_event(cluster, "started", 1, world_size=1)
        cluster.kill_node("one")  # the last one
        wait_for("the cluster to notice", lambda: trainer_nodes(cluster) == 0)
        cluster.note("the cluster knows it")
        cluster.add_node("three", cpus=1, trainer=1)
        wait_for_event(cluster, "started", 2, world_size=1)
        cluster.add_node("four", cpus=1, trainer=1)
        starts = wait_for_event(cluster, "started", 2, world_size=2)
        assert [start["world_size"] for start in starts] == [2, 1, 1, 2]
        said = finish(process, cluster)
        assert "1 worker now, 2 before" in said
        assert "a worker died: restarted from step" in said
        assert "2 workers now, 1 before" in said
        # Growing waited for a checkpoint: next to nothing was trained twice.
        points = events(run_of(cluster), "progress")
        reached = max(r["step"] for r in points if r["time"] < starts[-1]["time"])
        cluster.note(f"{reached - starts[-1]['step']} steps were trained again after growing")
        assert_every_image_counts_once(run_of(cluster), 60 * STEPS_PER_EPOCH)


def assert_trainers_and_data_tasks_have_nodes_of_their_own(cluster: HandMadeCluster) -> None:
    nodes: list[Any] = ray.util.state.list_nodes(cluster.dashboard)
    with_trainer = {n.node_id for n in nodes if "trainer" in n.resources_total}
    actors: list[Any] = ray.util.state.list_actors(cluster.dashboard, limit=1000)
    trainers = {a.node_id for a in actors if "TrainWorker" in a.class_name}
    tasks: list[Any] = ray.util.state.list_tasks(cluster.dashboard, limit=10_000)
    data = {t.node_id for t in tasks if "draw" in t.name and t.node_id}
    assert trainers == with_trainer
    assert data, {t.name for t in tasks}
    assert not data & with_trainer
    cluster.note(f"{len(trainers)} nodes trained, {len(data)} other read the data")


def trainer_nodes(cluster: HandMadeCluster) -> int:
    nodes: list[Any] = ray.util.state.list_nodes(cluster.dashboard)
    return sum(n.state == "ALIVE" and "trainer" in n.resources_total for n in nodes)


AUTOSCALER = {
    "cluster_name": "drill",
    "max_workers": 3,
    "idle_timeout_minutes": 0.15,
    "upscaling_speed": 1.0,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "head_node_id": "f" * 51 + "00000",
    },
    "auth": {},
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpu-worker": {
            "resources": {"CPU": 1, "trainer": 1},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
        "cpu-worker": {
            "resources": {"CPU": 2},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 1,
        },
    },
    "docker": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}
"""Ray's fake provider: its autoscaler decides, and a node is a process on this machine."""


def test_a_run_on_a_cluster_of_no_workers_gets_its_nodes_and_gives_them_back(
    tmp_path: Path,
) -> None:
    environment = {
        **INSTALLED,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "0",  # the wheel of 2.60 lacks a file of its fake provider
    }
    file = tmp_path / "autoscaler.json"
    flags = ("--num-cpus", "0", "--autoscaling-config", str(file))
    made = HandMadeCluster(tmp_path, flags, environment)
    AUTOSCALER["provider"]["gcs_address"] = made.address
    file.write_text(json.dumps(AUTOSCALER))
    with made as cluster:
        assert trainer_nodes(cluster) == 0
        flags = ("--workers", "2", "--worker-resources", "trainer=1", "--cpus-per-worker", "1")
        process = pretrain(cluster, *flags, "--data-cpus", "1", "--epochs", "10")
        wait_for("two nodes for trainers", lambda: trainer_nodes(cluster) == 2)
        cluster.note("two nodes for trainers")
        wait_for_event(cluster, "started", 1, world_size=2)
        finish(process, cluster)
        assert_every_image_counts_once(run_of(cluster), 10 * STEPS_PER_EPOCH)
        wait_for("the nodes to go", lambda: trainer_nodes(cluster) == 0)
        cluster.note("no node for trainers is left")
