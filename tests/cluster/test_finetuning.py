"""Fine-tuning through Ray, by the command: its runs, its subsets and its row from scratch."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from helpers import experiment, start, train_for, wait_for
from selfray import config
from selfray.cluster import local_ray
from selfray.cluster.evaluation import Split
from selfray.cluster.finetuning import _copy, places_of
from selfray.cluster.launch import launch
from selfray.commands.evaluate import Evaluate
from selfray.commands.finetune_flags import FineTuneFlags
from selfray.console import Console
from selfray.contract import VIT
from selfray.data.reader import read_rows, sample_rows
from selfray.data.shard_set import open_shards
from selfray.data.writer import write_arrays
from selfray.experiment import DataConfig, Experiment
from selfray.methods.mae import MAEConfig
from selfray.probes.embedding import Contents, Embedding, Rows
from selfray.probes.feature_files import FeatureFiles
from selfray.probes.finetuning import FineTuning, Placing
from selfray.runs import checkpoint
from selfray.runs.spool import SpoolReader
from selfray.storage import Location


def picture(number: int) -> bytes:
    """Bright above, or below, with noise."""
    pixels = np.random.default_rng(number).integers(0, 80, (16, 16, 3))
    half = slice(0, 8) if number % 2 else slice(8, 16)
    pixels[half] += 150
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An encoder of two steps beside labelled images."""
    images = [picture(number) for number in range(56)]
    labels = [3 + 4 * (number % 2) for number in range(56)]
    write_arrays(tmp_path / "data" / "train", images[:40], labels[:40])
    write_arrays(tmp_path / "data" / "test", images[40:], labels[40:])
    wanted = experiment(
        MAEConfig(decoder_width=32, decoder_depth=1, decoder_heads=2),
        VIT,
        data=DataConfig(str(tmp_path / "data")),
    )
    state = start(wanted, steps=2)
    train_for(state, wanted, 2)
    checkpoint.save(state, wanted, Location.of(tmp_path / "runs" / "mae"), loss=1.0)
    return tmp_path / "runs" / "mae"


@pytest.mark.long
def test_fine_tuning_learns_beside_from_scratch_and_repeats_nothing(run, tmp_path, ray_session):
    command = Evaluate(
        (str(run),),
        (str(tmp_path / "data"),),
        by=("finetune",),
        finetune=FineTuneFlags(epochs=10, batch_size=8, learning_rate=0.03, flip=0.0),
        json=str(tmp_path / "found.json"),
        pictures=str(tmp_path / "pictures"),
        no_track=True,
    )
    said = io.StringIO()
    assert command.run(Console(said, None)) == 0
    found = Location.of(tmp_path / "found.json").read_json()["data"][0]["encoders"]
    tuned, scratch = found["mae"], found["from scratch"]
    assert tuned["protocols"]["finetune"]["value"] > 0.8
    assert "from_scratch True" in scratch["protocols"]["finetune"]["protocol"]
    ended = sorted(file.parent for file in (run / "finetune").glob("*/run.json"))
    assert len(ended) == 2
    times = [(folder / "run.json").stat().st_mtime_ns for folder in ended]

    again = io.StringIO()
    assert command.run(Console(again, None)) == 0
    assert [(folder / "run.json").stat().st_mtime_ns for folder in ended] == times
    repeated = Location.of(tmp_path / "found.json").read_json()["data"][0]["encoders"]
    for title in found:
        assert repeated[title]["protocols"] == found[title]["protocols"]


SCRIPT = """
import sys
from selfray import config
from selfray.cluster import runtime
from selfray.cluster.launch import launch
from selfray.console import Console
with runtime.session():
    launch(config.loads(open(sys.argv[1]).read()), Console(sys.stdout, None))
"""


@pytest.mark.long
def test_a_killed_fine_tuning_goes_on_to_the_same_losses_and_weights(run, tmp_path, ray_session):
    """What only fine-tuning has: labels in the stream, mixing and dropped paths."""

    def tuning(name: str) -> Experiment:
        kind = FineTuning(epochs=80, batch_size=8, mixup=0.8, cutmix=1.0, drop_path=0.2, erase=0.25)
        images = DataConfig(str(tmp_path / "data" / "train"))
        place = Placing(str(tmp_path / name))
        found = kind.experiment(VIT, images, (3, 7), 40, place, None)
        return config.override(found, **{"checkpoint.times": 10})

    def ended(wanted: Experiment) -> tuple[dict[str, torch.Tensor], list[float]]:
        said = io.StringIO()
        folder = launch(wanted, Console(said, None)).folder
        found = {}  # steps after the last checkpoint of a killed run are there twice
        for record in SpoolReader(Location.of(folder) / "spool").read({})[0]:
            if record["kind"] == "metrics" and "loss" in record["values"]:
                found[record["images_seen"]] = record["values"]["loss"]
        return checkpoint.Checkpoint.open(folder).state()["method"], list(found.values())

    wanted = tuning("killed")
    (tmp_path / "experiment.json").write_text(config.dumps(wanted))
    environment = {k: v for k, v in os.environ.items() if "RAY" not in k}
    with (tmp_path / "said").open("w") as file:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "experiment.json")]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    folder = Location.of(tmp_path / "killed" / wanted.run_name)

    def has_begun() -> bool:
        assert process.poll() is None, (tmp_path / "said").read_text()
        return bool(checkpoint.all_of(folder))

    wait_for("a checkpoint", has_begun, 0.02)
    process.kill()
    process.wait()
    local_ray.sweep_leftovers()
    reached = checkpoint.latest(folder)
    assert reached is not None
    assert 0 < reached.step < 400
    resumed, losses = ended(wanted)
    whole, unbroken = ended(tuning("whole"))
    assert losses == unbroken
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_a_subset_is_of_the_images_that_could_be_read(tmp_path):
    """Features leave broken images out, so their places are found by the images' keys."""
    images = [picture(0), b"broken", picture(1), picture(2)]
    table = pa.table({"image": [{"bytes": b, "path": ""} for b in images], "label": [5, 5, 6, 5]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = Rows.all_of(open_shards([str(tmp_path / "a.parquet")], str(tmp_path)))
    contents = Contents(key=True)
    job = Embedding(rows, None, 8, contents)
    (tmp_path / "features").mkdir()
    assert job.write(0, Location.of(tmp_path / "features")) == 3
    files = FeatureFiles(Location.of(tmp_path / "features"), job.blocks)
    split = Split(files, *files.labels_and_keys(), 1, "key")
    places = places_of(split, rows)
    assert places.tolist() == [0, 2, 3]
    written = _copy(rows, places[1:], np.array([1, 0]), 3, str(tmp_path / "copy"))
    copied = open_shards(written, "copy")
    assert copied.label_names == ("0", "1", "2")
    found, labels = read_rows(copied, *sample_rows(copied, 2))
    assert sorted(zip(labels.tolist(), found, strict=True)) == [(0, images[3]), (1, images[2])]
