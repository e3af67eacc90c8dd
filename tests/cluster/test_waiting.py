"""What a run says while its cluster has no room for its workers."""

import io

from helpers import wait_for
from selfray.cluster import waiting
from selfray.console import Console


def test_a_run_says_what_it_waits_for_and_when_it_has_come(monkeypatch):
    nodes: list[dict] = []
    monkeypatch.setattr(waiting.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(waiting, "remove_orphaned_placement_groups", lambda: None)
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(waiting, "PATIENCE_SECONDS", 0.02)
    said = io.StringIO()
    with waiting.reporting({"CPU": 1.0, "trainer": 1.0}, 2, Console(said, None)):
        wait_for("the first line", lambda: "\n" in said.getvalue())
        nodes.append({"Alive": True, "Resources": {"CPU": 4.0, "trainer": 1.0}})
        wait_for("the second line", lambda: said.getvalue().count("\n") == 2)
        nodes.append({"Alive": True, "Resources": {"CPU": 4.0, "trainer": 1.0}})
        wait_for("the third line", lambda: said.getvalue().count("\n") == 3)
    wanted = "waiting for nodes: 2 train workers of CPU 1, trainer 1 each, but the cluster has room"
    assert said.getvalue().splitlines() == [
        f"{wanted} for 0",
        f"{wanted} for 1",
        "the nodes are available: the train workers start",
    ]
