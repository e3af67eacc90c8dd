"""A sweep on a real Ray, with a real MLflow store."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient
from test_launch import Screen, experiment, images, shards  # noqa: F401 - shards is a fixture

from helpers import RESNET, tiny, wait_for, write
from selfray.cluster.launch import launch
from selfray.cluster.sweep.run import _identity, _probed_at_every_checkpoint, _with_metrics, sweep
from selfray.data.writer import write_arrays
from selfray.experiment import Experiment
from selfray.methods.byol import BYOLConfig
from selfray.runs.checkpoint import MANIFEST, Checkpoint
from selfray.schedules import Piecewise
from selfray.sweeps.question import Axis, Halving, Question, Range

pytestmark = pytest.mark.usefixtures("ray_session")

RATIO = Axis.over("ratio", "method.mask_ratio", [0.5])
QUESTION = Question("sizes", (Axis.over("batch size", "batch_size", [16, 4096]),), metric="linear")


@pytest.mark.long
def test_a_sweep_ranks_its_runs_names_the_failed_and_does_nothing_twice(
    shards: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    base = experiment(shards, tmp_path, epochs=2)
    sizes = Axis.over("batch size", "batch_size", [16, 32, 4096])
    question = Question("sizes", (sizes,), metric="linear")
    screen = Screen()
    result = sweep(base, question, "Which size?", screen)
    *good, bad = result.outcomes
    assert [outcome.failure for outcome in good] == [None, None]
    assert bad.failure is not None
    assert "batch_size 4096 is larger than the data set of 96 images" in bad.failure
    assert {score.label for score in result.scores} == {f"batch size {n}" for n in (16, 32, 4096)}
    assert result.scores[-1].label == "batch size 4096"
    finals = [outcome.final("linear") or 0.0 for outcome in good]
    best = [16, 32][finals.index(max(finals))]
    assert result.scores[0].label == f"batch size {best}" or finals[0] == finals[1] > 0
    assert result.answer.startswith("Which size? ")
    assert any("batch size 4096, seed 0 failed: batch_size 4096 is" in x for x in screen.lines)
    folder = Path(result.folder)
    assert "| batch size 4096 | - | - | 0, 1 failed |" in (folder / "table.md").read_text()
    assert (folder / "artifacts" / "sweep.png").exists()

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    tracked = client.get_experiment_by_name("selfray")
    assert tracked is not None
    runs = client.search_runs([tracked.experiment_id])
    (parent,) = [run for run in runs if "sweep.answer" in run.data.tags]
    children = {
        run.data.params["sweep.batch size"]: run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["sweep.answer"] == result.answer
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {
        "comparison.html",
        "curves.png",
        "sweep.png",
        "table.md",
    }
    assert children.keys() == {"16", "32"}  # the third was refused before it began
    assert children["16"].data.metrics["probe/linear"] == pytest.approx(finals[0])
    assert {run.info.status for run in children.values()} == {"FINISHED"}

    # The same command: what is finished is not run again, what failed is tried again, and a run
    # whose record is lost is looked at and not trained again.
    kept, lost = (folder / "trials" / f"000{n}.json" for n in (0, 1))
    before, known = kept.stat().st_mtime_ns, json.loads(lost.read_text())
    lost.unlink()
    again = Screen()
    outcomes = sweep(base, question, "Which size?", again).outcomes
    assert [replace(o, seconds=0.0) for o in outcomes] == [
        replace(o, seconds=0.0) for o in result.outcomes
    ]
    assert "1 of 3 runs were already done" in again.lines
    assert kept.stat().st_mtime_ns == before
    assert json.loads(lost.read_text())["probes"] == known["probes"]
    log = (folder / "logs" / "0001.log").read_text()
    assert "this run is complete, nothing to do" in log
    assert len(client.search_runs([tracked.experiment_id])) == len(runs)


def test_a_sweep_refuses_what_does_not_fit_the_cluster_before_any_run_is_begun(
    shards: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    base = experiment(shards, tmp_path)
    with pytest.raises(ValueError, match=r"--at-once 500 is more than the cluster holds: give \d"):
        sweep(base, QUESTION, "Which size?", Screen(), at_once=500)
    crowd = experiment(shards, tmp_path, workers=32, batch_size=32)
    with pytest.raises(ValueError, match="--workers 32 need 32 CPUs and the cluster has"):
        sweep(crowd, Question("ratio", (RATIO,)), "Which ratio?", Screen())
    assert not list(tmp_path.glob("sweeps/*/trials/*"))


def test_a_sweep_refuses_what_no_run_could_do_before_any_is_begun(
    shards: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    base = experiment(shards, tmp_path)
    question = Question("ratio", (Axis.over("ratio", "method.mask_ratio", [0.5, 1.5]),))
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \(0, 1\), got 1.5"):
        sweep(base, question, "Which ratio?", Screen())
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.long
def test_a_run_that_is_not_among_the_best_is_stopped_with_a_checkpoint_and_stays_so(
    shards: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    base = experiment(shards, tmp_path, epochs=1200, log_every=5, **{"probe.times": 4})
    ratio = Axis.over("ratio", "method.mask_ratio", [0.5])
    question = Question("ratio", (ratio,), halving=Halving("knn", 0.25, 2.0))
    # An earlier driver saw a run that none can come up to: what it knew is still known.
    asked = _with_metrics(question, base, labelled=True)
    identity = _identity(_probed_at_every_checkpoint(base), asked)
    folder = tmp_path / "sweeps" / f"ratio-{identity}"
    folder.mkdir(parents=True)
    better = {"number": 9, "images_seen": 96 * 300, "value": 2.0, "stop": False}
    (folder / "rungs.json").write_text(json.dumps([better]))

    screen = Screen()
    result = sweep(base, question, "Which ratio?", screen)
    (outcome,) = result.outcomes
    assert outcome.stopped == "not among the best by kNN at 28,800 images"
    assert 96 * 300 < outcome.images_seen < 96 * 1200
    assert outcome.run is not None
    newest = Checkpoint.open(outcome.run)
    assert newest.images_seen == outcome.images_seen
    assert result.answer == "Which ratio? No run finished, so there is no answer."
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs(["1"], "tags.stopped LIKE 'not among%'")
    assert run.info.status == "FINISHED"

    # Without its outcome, it is neither trained on nor judged anew.
    (folder / "trials" / "0000.json").unlink()
    again = sweep(base, question, "Which ratio?", Screen())
    assert again.outcomes[0].images_seen == outcome.images_seen
    assert Checkpoint.open(outcome.run).digest == newest.digest

    # By itself, the same run goes on to its end from there.
    alone = Screen()
    whole = launch(_placed_like(outcome.run), alone)
    assert whole.images_seen == 96 * 1200
    assert any(f"continuing from step {newest.step:,}" in line for line in alone.lines)


def _placed_like(run: str) -> Experiment:
    """The experiment of a run, as its checkpoint has it."""
    return Checkpoint.open(run).experiment()


@pytest.mark.long
def test_a_population_on_a_folder_without_labels_takes_over_from_its_best_and_finds_a_schedule(
    tmp_path: Path,
) -> None:
    files = {f"{index}.png": data for index, data in enumerate(images())}
    photos = str(write(tmp_path / "photos", {**files, "broken.png": b"not a png"}))
    byol = {"method": tiny(BYOLConfig), "encoder": RESNET, "probe.times": 2}
    base = experiment(photos, tmp_path, epochs=4, **byol)
    momentum = Range("momentum", "method.momentum", 0.5, 0.99, "to_one", is_schedule=True)
    question = Question("momentum", (momentum,), search="population", samples=2, generations=2)
    screen = Screen()
    result = sweep(base, question, "Which momentum?", screen)
    folder = Path(result.folder)
    record = json.loads((folder / "population.json").read_text())
    ((generation, loser, winner),) = record["copied"]
    assert generation == 0
    first = [json.loads((folder / "generations/0" / f"000{n}.json").read_text()) for n in (0, 1)]
    assert first[winner]["probes"][-1]["rankme"] >= first[loser]["probes"][-1]["rankme"]
    # The loser went on from the winner's weights, under a momentum of its own.
    runs = [folder / "members" / f"member-0{n}" for n in (0, 1)]
    own = Checkpoint.open(str(runs[loser])).experiment().method.momentum  # type: ignore[attr-defined]
    theirs = Checkpoint.open(str(runs[winner])).experiment().method.momentum  # type: ignore[attr-defined]
    assert isinstance(own, Piecewise)
    assert own.values[0] == theirs.values[0]
    assert own.values[1] != theirs.values[1]
    assert all(Checkpoint.open(str(run)).images_seen == 4 * 96 for run in runs)
    assert any(f"member {loser} continues from member {winner}" in line for line in screen.lines)
    assert result.answer.startswith("Which momentum? The best of 2 members reached RankMe")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    children = [r for r in client.search_runs(["1"]) if "mlflow.parentRunId" in r.data.tags]
    assert len(children) == 2  # one for each member, over all generations

    assert "1 files left out" in screen.text.getvalue()
    assert any("ranked by RankMe" in line for line in screen.lines)
    assert "the data has no labels" in next(folder.glob("**/logs/*0000.log")).read_text()
    assert (folder / "artifacts" / "curves.png").exists()
    for outcome in result.outcomes:
        assert outcome.failure is None
        assert outcome.final("knn") is outcome.final("linear") is None
        assert (outcome.final("rankme") or 0) >= 1
        assert outcome.final("rankme") != outcome.untrained("rankme")


def test_a_sweep_of_images_without_labels_refuses_what_they_cannot_tell(tmp_path: Path) -> None:
    write_arrays(str(tmp_path / "plain"), images())
    mae = experiment("", tmp_path, **{"data.path": str(tmp_path / "plain")})
    ratio = Question("ratio", (RATIO,))
    with pytest.raises(ValueError, match="the images have no labels, and RankMe is unreliable for"):
        sweep(mae, ratio, "Which ratio?", Screen())
    by_linear = replace(ratio, metric="linear")
    with pytest.raises(ValueError, match="--rank-by linear needs labels, but the images have none"):
        sweep(mae, by_linear, "Which ratio?", Screen())


def test_a_sweep_goes_on_by_the_data_that_it_started_with(
    shards: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the generations of a population, and ASHA's rungs, would end where its runs never do."""
    data = shutil.copytree(shards, tmp_path / "data")
    steps = []

    def interrupted(plan, read_plan, at_once, console):
        steps.append(read_plan.total_steps)
        raise KeyboardInterrupt

    monkeypatch.setattr("selfray.cluster.sweep.run._run", interrupted)
    ratio = Axis.over("ratio", "method.mask_ratio", (0.5, 0.75))
    base = experiment(str(data), tmp_path)
    said = []
    for _ in range(2):
        screen = Screen()
        with pytest.raises(KeyboardInterrupt):
            sweep(base, Question("mask", (ratio,)), "Which ratio?", screen)
        said.append([line for line in screen.lines if "1 shard was added after this run" in line])
        shutil.copytree(shards, data / "more", dirs_exist_ok=True)
    assert steps[0] == steps[1] > 0
    assert [len(lines) for lines in said] == [0, 1]


@pytest.mark.long
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "experiments" / "sweep_mae.py"
    command = [sys.executable, str(script), "--epochs", "10", "--ratios", "0.5", "0.9"]
    command += ["--output", str(tmp_path)]
    with started(command, tmp_path / "first.txt") as first:
        wait_for("a first result", lambda: list(tmp_path.glob("sweeps/*/trials/0000.json")))
        # Both runs have folders by now, or soon: the second has none of the first's checkpoints.
        wait_for("two runs", lambda: len({f.parts[-4] for f in tmp_path.glob(CHECKPOINTS)}) == 2)
        first.kill()
    (folder,) = (tmp_path / "sweeps").iterdir()
    done = (folder / "trials" / "0000.json").stat().st_mtime_ns
    assert not (folder / "trials" / "0001.json").exists()
    # A second death, this time as a terminal's Ctrl-C has it.
    with started(command, tmp_path / "second.txt") as second:
        log = folder / "logs" / "0001.log"
        wait_for("it to go on", lambda: "continuing from step" in log.read_text())
        family = psutil.Process(second.pid).children(recursive=True)
        os.killpg(second.pid, signal.SIGINT)
        assert second.wait(timeout=600) == 130, "as a shell reports Ctrl-C"
        _, alive = psutil.wait_procs(family, timeout=60)
        assert alive == []
    assert "interrupted: the same command continues" in (tmp_path / "second.txt").read_text()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    statuses = sorted(run.info.status for run in client.search_runs(["1"]))
    assert statuses == ["FINISHED", "KILLED", "KILLED"]

    third = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert third.returncode == 0, third.stdout + third.stderr
    assert "1 of 2 runs were already done" in third.stdout
    assert (folder / "trials" / "0000.json").stat().st_mtime_ns == done
    runs = client.search_runs(["1"])
    assert len(runs) == 3  # the sweep and its two runs, over three drivers
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len({run.data.tags["run.folder"] for run in runs}) == 3
    assert "failed" not in third.stdout


CHECKPOINTS = f"mae-digits-*/checkpoints/*/{MANIFEST}"


@contextmanager
def started(command: list[str], output: Path) -> Iterator[subprocess.Popen]:
    """A command whose output goes to a file; killed at the end if it is still there."""
    with output.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell starts what runs in its background with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
