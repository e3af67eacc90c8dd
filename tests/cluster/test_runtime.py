"""How Ray is started, joined and stopped."""

import os
import signal
from pathlib import Path

import pytest
import ray
import yaml

from selfray.cluster import runtime
from selfray.console import quiet_console


def test_a_session_inside_another_leaves_the_outer_one_running(ray_session) -> None:
    with runtime.session():
        assert ray.is_initialized()
    assert ray.is_initialized()
    with runtime.Starting().session():
        assert ray.is_initialized()
    assert ray.is_initialized()


def test_tune_does_not_take_ctrl_c_for_the_end_of_a_sweep(ray_session) -> None:
    from ray.tune import tune

    ours = signal.getsignal(signal.SIGINT)
    try:
        tune._setup_signal_catching()
        assert signal.getsignal(signal.SIGINT) is ours
    finally:
        signal.signal(signal.SIGINT, ours)


def test_a_cluster_that_does_not_answer_is_named_at_once() -> None:
    with pytest.raises(ConnectionError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
        runtime._require_cluster("127.0.0.1:9")


def test_what_is_said_after_the_command_has_ended_is_said_to_nobody(tmp_path: Path) -> None:
    with quiet_console(tmp_path / "log") as console:
        pass
    console.say("a probe that took its time")


def test_a_jobs_relative_output_outlives_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded = tmp_path / "working_dir_files" / "_ray_pkg_1"
    uploaded.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(uploaded)
    assert runtime.lasting("runs") == "runs"  # no job
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert runtime.lasting("runs") == str(tmp_path / "selfray" / "runs")
    for kept in ("s3://bucket/runs", "/data/runs", "~/runs"):
        assert runtime.lasting(kept) == kept
    monkeypatch.chdir(os.sep)  # a script of the machine's own, in its own folder
    assert runtime.lasting("runs") == "runs"


def test_a_job_takes_all_of_the_package_along() -> None:
    checkout = Path(runtime.__file__).parents[3]
    settings = yaml.safe_load((checkout / "experiments" / "runtime_env.yaml").read_text())
    # As in .gitignore, a name without a leading slash is left out wherever it stands.
    anywhere = {name for name in settings["excludes"] if not name.startswith(("/", "*"))}
    package = checkout / "platform" / "selfray"
    assert not [path for path in package.rglob("*") if path.name in anywhere]
