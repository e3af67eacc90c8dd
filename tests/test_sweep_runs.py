"""A sweep on a real Ray, with a real MLflow store."""

import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from selfray.cluster.sweep import sweep
from selfray.sweep import Axis, Question
from test_launch import Screen, experiment, shards  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("ray_session")

QUESTION = Question("sizes", (Axis.over("batch size", "batch_size", [16, 4096]),), metric="linear")


@pytest.mark.long
def test_a_sweep_ranks_its_runs_names_the_failed_and_is_not_run_twice(
    shards: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    base = experiment(shards, tmp_path, epochs=2)
    screen = Screen()
    result = sweep(base, QUESTION, "Which size?", screen)
    good, bad = result.outcomes
    assert good.failure is None
    assert good.linear is not None
    assert bad.failure is not None
    assert "batch_size 4096 is larger than the data set of 96 images" in bad.failure
    assert [score.label for score in result.scores] == ["batch size 16", "batch size 4096"]
    assert result.answer.startswith("Which size? Only batch size 16 was measured: linear")
    assert any("batch size 4096, seed 0 failed: batch_size 4096 is" in x for x in screen.lines)
    folder = Path(result.folder)
    assert "| batch size 4096 | - | - | 0, 1 failed |" in (folder / "table.md").read_text()
    assert (folder / "artifacts" / "sweep.png").exists()

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    tracked = client.get_experiment_by_name("selfray")
    assert tracked is not None
    runs = client.search_runs([tracked.experiment_id])
    (parent,) = [run for run in runs if "sweep.answer" in run.data.tags]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["sweep.answer"] == result.answer
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {
        "sweep.png",
        "table.md",
    }
    (child,) = children  # the other one was refused before it began
    assert child.data.params["sweep.batch size"] == "16"
    assert child.data.metrics["probe/linear"] == pytest.approx(good.linear)
    assert child.info.status == "FINISHED"

    # The same command: what is finished is not run again, what failed is tried again.
    before = (folder / "trials" / "0000.json").stat().st_mtime_ns
    again = Screen()
    assert sweep(base, QUESTION, "Which size?", again).outcomes == result.outcomes
    assert "1 of 2 runs were done before" in again.lines
    assert (folder / "trials" / "0000.json").stat().st_mtime_ns == before
    assert len(client.search_runs([tracked.experiment_id])) == len(runs)


@pytest.mark.long
def test_a_trial_whose_record_is_lost_is_finished_and_not_trained_again(
    shards: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    base = experiment(shards, tmp_path, epochs=2)
    question = Question("ratio", (Axis.over("ratio", "method.mask_ratio", [0.5]),))
    first = sweep(base, question, "Which ratio?", Screen())
    file = Path(first.folder) / "trials" / "0000.json"
    known = json.loads(file.read_text())
    file.unlink()
    assert sweep(base, question, "Which ratio?", Screen()).outcomes == first.outcomes
    assert json.loads(file.read_text()) == known
    log = (Path(first.folder) / "logs" / "0000.log").read_text()
    assert "this run is complete, nothing to do" in log


def test_a_sweep_refuses_what_no_run_could_do_before_any_is_begun(
    shards: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    base = experiment(shards, tmp_path)
    question = Question("ratio", (Axis.over("ratio", "method.mask_ratio", [0.5, 1.5]),))
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \(0, 1\), got 1.5"):
        sweep(base, question, "Which ratio?", Screen())
    assert not (tmp_path / "sweeps").exists()
