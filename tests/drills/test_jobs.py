"""`ray job submit` of this checkout to a cluster that was started by hand."""

import json
from collections.abc import Collection
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from hand_made_cluster import HandMadeCluster
from helpers import wait_for
from selfray.runs import checkpoint
from selfray.storage import Location


def run_with_checkpoint(folder: Path, known: Collection[Path] = ()) -> Path | None:
    """The folder of a run that has written its first checkpoint and is in MLflow; not a known
    one."""
    for record in folder.glob("mae-digits-*/mlflow.json"):
        if record.parent not in known and checkpoint.all_of(Location.of(record.parent)):
            return record.parent
    return None


@pytest.mark.long
def test_jobs_are_followed_and_stopped_and_go_on_when_they_are_submitted_again(
    tmp_path: Path,
) -> None:
    with HandMadeCluster(tmp_path) as head:
        # The relative output is not in the copy of the checkout, which Ray removes.
        output = head.home / "selfray" / "runs"
        sweep_is_stopped_and_marks_all_its_runs(head, output)
        run_is_stopped_and_goes_on(head, output)


def run_is_stopped_and_goes_on(head: HandMadeCluster, output: Path) -> None:
    known = set(output.iterdir())
    flags = ["--epochs", "30", "--checkpoint.times", "30", "--probe.times", "1"]
    script = ("--", "python", "experiments/pretrain.py", "mae-digits", *flags)
    head.submit("--no-wait", "--submission-id", "first", *script)
    run = wait_for("a checkpoint", lambda: run_with_checkpoint(output, known))
    logs = head.job("logs", "first").stdout
    assert f"folder: {run}" in logs
    assert "Traceback" not in logs

    assert head.job("stop", "first").returncode == 0
    assert "STOPPED" in head.job("status", "first").stdout.upper()
    logs = head.job("logs", "first").stdout
    assert "interrupted: the same command continues from the last checkpoint" in logs
    assert "Traceback" not in logs
    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    assert client.get_run(run_id).info.status == "KILLED"

    said = head.submit(*script)
    assert "continuing from step" in said
    assert "succeeded" in said
    lines = said[said.index("Running entrypoint") :].splitlines()
    assert len(lines) < 30, said
    again = client.get_run(run_id)
    assert again.info.status == "FINISHED"
    assert [found.step for found in checkpoint.all_of(Location.of(run))][-1] == 30 * 18


def sweep_is_stopped_and_marks_all_its_runs(head: HandMadeCluster, output: Path) -> None:
    flags = ["--ratios", "0.5", "0.75", "--epochs", "60"]
    script = ("--", "python", "experiments/sweep_mae.py", *flags)
    head.submit("--no-wait", "--submission-id", "sweep", *script)
    run = wait_for("a checkpoint", lambda: run_with_checkpoint(output))
    assert head.job("stop", "sweep").returncode == 0
    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    tracked = client.get_experiment_by_name("selfray")
    assert tracked is not None
    runs = client.search_runs([tracked.experiment_id])
    assert len(runs) >= 2
    assert {each.info.status for each in runs} == {"KILLED"}
