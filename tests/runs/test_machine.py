"""What a run's machines do is written beside its metrics, under MLflow's names."""

import time

from selfray.runs.machine import watched
from selfray.runs.spool import SpoolReader, SpoolWriter
from selfray.storage import Location


def points(folder: Location) -> list[dict]:
    return [r for r in SpoolReader(folder).read({})[0] if r["kind"] == "metrics"]


def test_a_run_shorter_than_an_interval_has_a_point_too(tmp_path):
    folder = Location.of(tmp_path)
    with watched(SpoolWriter(folder, "train-1"), lambda: 640):
        pass
    (point,) = points(folder)
    assert point["images_seen"] == 640
    assert set(point["values"]) == {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_megabytes",
        "system/system_memory_usage_percentage",
    }
    assert 0 < point["values"]["system/system_memory_usage_percentage"] <= 100


def test_points_go_on_while_it_lasts_and_name_the_node(tmp_path):
    folder = Location.of(tmp_path)
    with watched(SpoolWriter(folder, "train-1"), lambda: 1, node="b", seconds=0.01):
        while len(points(folder)) < 2:
            time.sleep(0.01)
    assert all(name.startswith("system/b/") for p in points(folder) for name in p["values"])


def test_a_second_worker_of_a_machine_without_gpu_writes_nothing(tmp_path):
    folder = Location.of(tmp_path)
    with watched(SpoolWriter(folder, "train-2"), lambda: 1, with_cpu=False):
        pass
    assert points(folder) == []


def test_a_figure_that_cannot_be_had_does_not_end_the_run(tmp_path, monkeypatch):
    import psutil

    with watched(SpoolWriter(Location.of(tmp_path), "train-3"), lambda: 1):
        monkeypatch.delattr(psutil, "virtual_memory")
