"""The CIFAR-10 benchmark on a CPU, with images that a test can make."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_layout import belongs_to, imported

import cifar10_gpu
from cifar10_gpu import Benchmark
from selfray.pixels.codecs import encode_png
from selfray.runs.checkpoint import Checkpoint

pytestmark = pytest.mark.bench

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images of two classes, red ones and blue ones, laid out as CIFAR-10 is."""
    folder = tmp_path_factory.mktemp("cifar10")
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("test", 10)):
        labels = np.arange(count) % 2
        pixels = rng.integers(0, 120, (count, 32, 32, 3), dtype=np.uint8)
        pixels[np.arange(count), :, :, labels * 2] += 120
        images = [{"bytes": encode_png(image), "path": None} for image in pixels]
        table = pa.table({"image": images, "label": labels})
        pq.write_table(table, folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture
def settings(data: str, tmp_path: Path) -> Benchmark:
    """Four steps of SimCLR."""
    return Benchmark(
        data=data,
        methods=("simclr",),
        epochs=2,
        batch_size=16,
        encoder="small",
        precision="float32",
        probes=1,
        device="cpu",
        output=tmp_path / "bench",
    )


def last_state(output: Path) -> dict[str, bytes]:
    """The files of the newest checkpoint."""
    (run,) = (path for path in output.iterdir() if path.is_dir())
    folder = Path(Checkpoint.open(str(run)).location.path)
    return {file.name: file.read_bytes() for file in folder.glob("*state.*")}


@pytest.mark.parametrize("method", ["simclr", "mocov2"])
def test_a_run_in_many_calls_ends_in_the_very_weights_of_one_call(settings, method, tmp_path):
    settings = replace(settings, methods=(method,))
    (whole,) = cifar10_gpu.run(settings)
    pieces = replace(settings, output=tmp_path / "pieces", minutes=0.0)
    for step in range(1, 5):  # no time at all: each call takes one step
        (result,) = cifar10_gpu.run(pieces)
        assert (result["steps"], result["total_steps"]) == (step, 4)
    assert result["probes"] == whole["probes"]
    assert last_state(pieces.output) == last_state(settings.output)


def test_a_finished_benchmark_is_shown_again_without_training(settings, capsys):
    first = cifar10_gpu.run(settings)
    before = last_state(settings.output)
    assert cifar10_gpu.run(settings) == first
    assert last_state(settings.output) == before
    assert "continuing from step 4 of 4" in capsys.readouterr().out


def test_the_result_is_a_table_beside_lightlys_and_json_beside_the_checkpoints(settings, capsys):
    (result,) = cifar10_gpu.run(settings)
    assert result["probes"]["4"] == {"ours": 1.0, "theirs": 1.0}
    assert result["lightly_knn"] == 0.847
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("simclr  ")]
    assert row.split()[:7] == ["simclr", "2", "of", "2", "100.0%", "100.0%", "84.7%"]
    assert json.loads((settings.output / "results.json").read_text()) == [result]
    (beside,) = settings.output.glob("simclr-cifar10-*-40/result.json")
    assert json.loads(beside.read_text()) == result


def test_the_time_being_over_leaves_later_methods_for_the_next_call(settings):
    several = replace(settings, methods=("simclr", "mocov2"), minutes=0.0)
    assert [result["method"] for result in cifar10_gpu.run(several)] == ["simclr"]


@pytest.mark.parametrize("method", ["simclr", "mocov2", "byol", "dino"])
def test_every_method_has_its_recipe_at_the_benchmarks_size(settings, method):
    experiment = cifar10_gpu.experiment_of(settings, method)
    assert experiment.name == f"{method}-cifar10"
    assert (experiment.epochs, experiment.batch_size) == (2, 16)
    assert experiment.method.name == method.removesuffix("v2")
    full = cifar10_gpu.experiment_of(replace(settings, encoder="resnet18"), method)
    assert full.encoder.layers is None
    assert full.encoder.small_stem


def test_an_epoch_shows_every_image_once(settings):
    experiment = cifar10_gpu.experiment_of(replace(settings, batch_size=8), "simclr")
    images = cifar10_gpu.load(settings.data, None, 32)
    plan = cifar10_gpu.plan_of(experiment, images)
    seen = [plan.read(step * 8, 8).rows for step in range(plan.steps_per_epoch)]
    assert sorted(np.concatenate(seen)) == list(range(40))


def test_the_epochs_that_fit_into_some_minutes_are_trained_to_their_end(settings, monkeypatch):
    monkeypatch.setattr(cifar10_gpu, "TRIAL_SECONDS", 0.1)
    (result,) = cifar10_gpu.run(replace(settings, epochs=3, fit_minutes=5.0))
    assert (result["epochs"], result["steps"]) == (3, result["total_steps"])
    (short,) = cifar10_gpu.run(replace(settings, epochs=3, fit_minutes=0.0))
    assert (short["epochs"], short["steps"]) == (1, short["total_steps"])


def test_lightlys_optimizer_is_that_of_their_table(settings):
    theirs = replace(settings, optimizer="lightly", batch_size=128)
    optimizer = cifar10_gpu.experiment_of(theirs, "simclr").optimizer
    assert (optimizer.name, optimizer.peak_learning_rate(128)) == ("sgd", 0.06)


def test_a_compiled_run_learns_what_an_eager_one_does(settings, tmp_path):
    (eager,) = cifar10_gpu.run(settings)
    (compiled,) = cifar10_gpu.run(replace(settings, compile=True, output=tmp_path / "compiled"))
    assert compiled["probes"]["4"]["ours"] == eager["probes"]["4"]["ours"]
    torch.compiler.reset()


def test_a_throughput_trial_has_five_windows(settings):
    experiment = cifar10_gpu.experiment_of(replace(settings, epochs=1000), "simclr")
    images = cifar10_gpu.load(settings.data, None, 32)
    device = torch.device("cpu")
    rates = cifar10_gpu.training_rates(experiment, images, device, False, True, 0.0)
    alone = cifar10_gpu.views_alone(experiment, images, device, False, 0.0)
    assert len(rates) == len(alone) == 5
    assert min(alone) > 0


def test_a_trial_that_cannot_run_is_shown_with_its_cause(capsys):
    def fail() -> list[float]:
        raise RuntimeError("no compiler\nat all")

    cause = cifar10_gpu._attempt(fail)
    trial = cifar10_gpu._trial("simclr", True, "bf16", "last", cause)
    assert trial["failure"] == "no compiler"
    assert trial["images_per_second"] is None
    assert "failed: no compiler" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "holds no Parquet file"), ("train-*.parquet", "names no test files")],
)
def test_data_that_cannot_be_used_is_refused_by_name(settings, path, message):
    with pytest.raises(ValueError, match=message):
        cifar10_gpu.load(f"{settings.data}/{path}", None, 32)


@pytest.mark.parametrize(
    "file", ["benchmarks/cifar10_gpu.py", "platform/selfray/recipes/cifar10.py"]
)
def test_the_benchmark_needs_neither_ray_nor_mlflow(file):
    names = imported(ROOT / file)
    assert "selfray.experiment.Experiment" in names
    assert not [n for n in names if belongs_to(n, ("ray", "mlflow", "selfray.cluster"))]


def test_a_killed_run_goes_on_and_ends_in_the_very_weights_of_one_that_was_not(settings, tmp_path):
    command = [sys.executable, "benchmarks/cifar10_gpu.py", "--data", settings.data]
    command += ["--methods", "simclr", "--epochs", "8", "--batch-size", "16", "--device", "cpu"]
    command += ["--encoder", "small", "--checkpoint-minutes", "0", "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, check=True)
    process = subprocess.Popen(
        [*command, str(tmp_path / "killed")], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    while not list((tmp_path / "killed").glob("*/checkpoints/step-00000005/MANIFEST.json")):
        assert process.poll() is None
    process.kill()
    assert process.wait() == -9
    subprocess.run([*command, str(tmp_path / "killed")], cwd=ROOT, check=True)
    assert last_state(tmp_path / "killed") == last_state(tmp_path / "whole")
