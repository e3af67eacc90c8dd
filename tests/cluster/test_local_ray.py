"""A Ray that selfray starts is its user's alone, and ends with the command that started it."""

import os
import shutil
import stat
from pathlib import Path

import grpc
import psutil
import pytest
import ray

from selfray.cluster import local_ray, runtime

pytestmark = pytest.mark.skipif(
    bool(os.environ.get("RAY_ADDRESS")), reason="a cluster is named, so no Ray is started here"
)


def family() -> list[psutil.Process]:
    """This process, Ray's processes, and their workers."""
    here = psutil.Process()
    return [here, *here.children(recursive=True)]


@ray.remote
class Listener:
    """A worker, which listens as all of Ray's workers do."""

    def token(self) -> str:
        return os.environ["RAY_AUTH_TOKEN_PATH"]


def test_every_port_of_a_local_ray_is_on_loopback_and_its_token_is_the_users(ray_session) -> None:
    worker = Listener.remote()
    token = Path(ray.get(worker.token.remote()))
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    listening = [
        (process.name(), connection.laddr.ip)
        for process in family()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 5, "Ray's services, its agent and its workers listen"
    assert {ip.removeprefix("::ffff:") for _, ip in listening} == {"127.0.0.1"}, listening


def test_the_services_of_a_local_ray_answer_to_its_token_alone(ray_session) -> None:
    """All that joins Ray asks these two first; here as any program on this machine might."""
    (node,) = ray.nodes()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    for address, method in (
        (ray.get_runtime_context().gcs_address, "NodeInfoGcsService/GetAllNodeInfo"),
        (f"127.0.0.1:{node['NodeManagerPort']}", "NodeManagerService/GetNodeStats"),
    ):
        answers = {}
        for name, given in {"its": token, "a wrong": "0" * 64, "no": None}.items():
            metadata = () if given is None else (("authorization", f"Bearer {given}"),)
            with grpc.insecure_channel(address) as channel:
                ask = channel.unary_unary(f"/ray.rpc.{method}")
                try:
                    answers[name] = ask(b"", metadata=metadata, timeout=60) != b""
                except grpc.RpcError as error:
                    answers[name] = error.code().name  # type: ignore[attr-defined]
        refused = "UNAUTHENTICATED"
        assert answers == {"its": True, "a wrong": refused, "no": refused}, method


def test_the_dashboard_and_what_serves_it_do_not_run(ray_session) -> None:
    commands = [" ".join(process.cmdline()) for process in family()]
    for unneeded in ("dashboard.py", "log_monitor.py", "autoscaler/_private/monitor.py"):
        assert not [command for command in commands if unneeded in command], unneeded


def test_a_local_ray_keeps_idle_workers_while_no_cpu_is_free(ray_session) -> None:
    # By default Ray ends them a second later, and the next probe waits for a new process.
    assert int(os.environ[local_ray.IDLE_LIMIT]) >= local_ray.IDLE_WORKERS


def test_a_sessions_folder_is_short_enough_whatever_the_temporary_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    folder = local_ray._new_folder()
    try:
        assert len(str(folder)) <= local_ray.LONGEST_FOLDER
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        local_ray.sweep_leftovers()
        assert folder.exists(), "a session that runs keeps its folder"
        (folder / local_ray.OWNER).write_text(f"{os.getpid()} 1")  # an earlier process' number
        local_ray.sweep_leftovers()
        assert not folder.exists()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_settings_of_a_local_ray_are_not_left_to_a_cluster_that_is_joined_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(local_ray, "_before", {})
    if ray.is_initialized():
        pytest.skip("these are the settings of the Ray that runs")
    local_ray._set({"RAY_AUTH_MODE": "token"})
    assert os.environ["RAY_AUTH_MODE"] == "token"
    local_ray._restore()
    assert "RAY_AUTH_MODE" not in os.environ


def test_a_cluster_that_nobody_named_and_that_is_gone_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "ray_current_cluster"
    note.write_text("127.0.0.1:9")
    monkeypatch.setattr("ray._common.utils.get_ray_address_file", lambda _: str(note))
    from selfray.cluster import ray_internals

    assert ray_internals.current_cluster() == "127.0.0.1:9"
    assert runtime._join("127.0.0.1:9", {}, is_named=False, say=print) is False
    with pytest.raises(ConnectionError, match="no Ray cluster answers"):
        runtime._join("127.0.0.1:9", {}, is_named=True, say=print)


def test_an_empty_ray_address_names_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "ray_current_cluster"
    note.write_text("127.0.0.1:9")  # of a cluster that is gone
    monkeypatch.setattr("ray._common.utils.get_ray_address_file", lambda _: str(note))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "")
    started = []
    monkeypatch.setattr(local_ray, "start", lambda *_: started.append("here"))
    assert runtime.start() is True
    assert started == ["here"]
