"""What the studies vary, without running them."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers import MAE, VIT, experiment
from selfray.commands.evaluation_text import label_efficiency_of
from selfray.commands.studies import StudyBatch, StudyData, StudyLabels, _is_in
from selfray.console import Console
from selfray.data.data_sets import open_data
from selfray.data.reader import read_rows
from selfray.data.writer import write_arrays
from selfray.experiment import DataConfig, Experiment
from selfray.pixels.augment import encode_png
from selfray.probes.embedding import Rows
from selfray.probes.judgement import Judgement
from selfray.probes.subsets import ranks
from selfray.storage import Location
from selfray.sweeps.question import Axis


@pytest.fixture
def base(tmp_path: Path) -> Experiment:
    rng = np.random.default_rng(0)
    images = [encode_png(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(60)]
    names = ["a", "b"]
    for part, chosen in (("train", slice(0, 40)), ("test", slice(40, 60))):
        labels = [i % 2 for i in range(60)][chosen]
        write_arrays(tmp_path / "data" / part, images[chosen], labels, label_names=names)
    data = DataConfig(str(tmp_path / "data"))
    return experiment(MAE, VIT, data=data, epochs=3, output=str(tmp_path / "runs"))


def images_of(wanted: DataConfig, output: str) -> tuple[set[bytes], set[bytes]]:
    opened = open_data(wanted, Location.of(output), print, None, describe=False)  # type: ignore[arg-type]
    assert opened.test is not None
    assert opened.train.label_names == ("a", "b")
    found = []
    for shards in (opened.train, opened.test):
        rows = Rows.all_of(shards)
        found.append(set(read_rows(shards, rows.groups, rows.rows)[0]))
    return found[0], found[1]


def labelled_of(wanted: DataConfig, output: str) -> set[bytes]:
    """The train images that probes learn from."""
    opened = open_data(wanted, Location.of(output), print, None, describe=False)  # type: ignore[arg-type]
    shards = opened.train.labelled
    rows = Rows.all_of(shards)
    return set(read_rows(shards, rows.groups, rows.rows)[0])


def test_shares_of_the_images_are_nested_and_judged_by_the_same_ones(base):
    axis = StudyData(shares=(0.3, 1.0, 0.1), recipe="mae-digits").axis(base)
    assert isinstance(axis, Axis)
    labels = [option.label for option in axis.options]
    assert labels == [
        "10%, 3 epochs",
        "10%, equal images seen",
        "30%, 3 epochs",
        "30%, equal images seen",
        "100%, 3 epochs",
    ]
    assert [option.changes.get("epochs", 3) for option in axis.options] == [3, 30, 3, 10, 3]
    sets = [images_of(option.changes["data"], base.output) for option in axis.options]
    tenth, third, whole = sets[0][0], sets[2][0], sets[4][0]
    assert tenth < third < whole
    assert len(whole) == 40
    probed = [labelled_of(option.changes["data"], base.output) for option in axis.options]
    assert probed == [tenth] * 5
    assert all(test == sets[0][1] and len(test) == 20 for _, test in sets)


def test_a_share_of_random_numbers_is_that_large():
    order = ranks(np.arange(20_000, dtype=np.uint64), 0)
    assert _is_in(order, 0.1).mean() == pytest.approx(0.1, abs=0.01)
    assert _is_in(order, 1.0).all()


def test_data_without_test_images_is_refused_by_the_flag(base):
    alone = replace(base, data=DataConfig(base.data.path + "/train"))
    with pytest.raises(ValueError, match="give --test-data"):
        StudyData().axis(alone)


def test_batch_sizes_are_varied_at_equal_images_seen(base):
    axis = StudyBatch(sizes=(8, 16)).axis(base)
    assert isinstance(axis, Axis)
    assert [dict(option.changes) for option in axis.options] == [
        {"batch_size": 8},
        {"batch_size": 16},
    ]


def test_a_recipe_that_does_not_exist_is_one_line():
    with pytest.raises(ValueError, match="--recipe mae-digit does not exist"):
        StudyLabels(recipe="mae-digit").check_early()


@pytest.mark.parametrize("name", ["batch", "data", "labels"])
def test_every_study_has_help(name):
    script = Path(__file__).parents[2] / "experiments" / f"study_{name}.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python experiments/study_{name}.py" in done.stdout


class Found:
    """A judged encoder, as far as the sentence looks at it."""

    def __init__(self, title: str, accuracies: dict[int, float], protocol: str) -> None:
        self.subject = self
        self.title = title
        self.judgements = [
            Judgement(
                f"labels-{labels}-finetune",
                protocol,
                "accuracy",
                (np.arange(200) < 200 * accuracy).astype(float)[None],
                more={"labels": labels},
            )
            for labels, accuracy in accuracies.items()
        ]


def test_the_sentence_says_up_to_how_many_labels_pretraining_pays():
    tuned = Found("mae", {20: 0.8, 50: 0.9, 100: 0.95}, "finetune-v1 (epochs 1)")
    scratch = Found("s", {20: 0.4, 50: 0.7, 100: 0.99}, "finetune-v1 (from_scratch True)")
    (line,) = label_efficiency_of([tuned, scratch])  # type: ignore[list-item]
    assert line.startswith(
        "mae, fine-tuned: pretraining pays up to 50 of the tried numbers of labels"
    )
    assert "there by 20.0 points [" in line
    assert line.endswith("; from scratch is better at 100")
    (line,) = label_efficiency_of([scratch, Found("mae", {20: 0.4}, "finetune-v1")])  # type: ignore[list-item]
    assert "no gain of pretraining over training from scratch" in line


@pytest.mark.long
def test_a_study_of_labels_has_one_parent_with_the_answer_in_mlflow(tmp_path, ray_session):
    from mlflow import MlflowClient

    output = tmp_path / "runs"
    study = StudyLabels(epochs=1, labels=(20, 40), subsets=1, finetune_epochs=2, output=str(output))
    said = io.StringIO()
    assert study.run(Console(said, None)) == 0
    client = MlflowClient(tracking_uri=f"sqlite:///{output}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "selfray")
    runs = client.search_runs([experiment.experiment_id])
    parents = {run.info.run_id: run.data.tags.get("mlflow.parentRunId") for run in runs}
    (study_run,) = (run for run in runs if parents[run.info.run_id] is None)
    assert str(study_run.info.run_name).startswith("study-labels-")
    assert study_run.info.status == "FINISHED"
    assert "fine-tuned: " in study_run.data.tags["sweep.answer"]
    assert study_run.data.tags["sweep.answer"] in said.getvalue()
    (pretraining,) = (run for run in runs if parents[run.info.run_id] == study_run.info.run_id)
    assert str(pretraining.info.run_name).startswith("mae-digits-")
    names = {name for name in pretraining.data.metrics if name.count("/") == 2}
    assert "eval/digits/labels-20-finetune-from-scratch" in names
    tuned = [run for run in runs if parents[run.info.run_id] == pretraining.info.run_id]
    assert len(tuned) == 4  # two numbers of labels, pretrained and from scratch
    pictures = client.list_artifacts(study_run.info.run_id, "pictures")
    assert [picture.path for picture in pictures] == ["pictures/labels.png"]
