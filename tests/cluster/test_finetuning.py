"""Fine-tuning through Ray, by the command: its runs, its subsets and its row from scratch."""

import io
from pathlib import Path

import numpy as np
import pytest
from helpers import experiment, start, train_for
from PIL import Image

from selfray.commands.evaluate import Evaluate
from selfray.commands.finetune_flags import FineTuneFlags
from selfray.console import Console
from selfray.contract import VIT
from selfray.data.writer import write_arrays
from selfray.experiment import DataConfig
from selfray.methods.mae import MAEConfig
from selfray.runs import checkpoint
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
        by=("finetune", "low-shot"),
        shares=(0.5,),
        subsets=1,
        low_shot_by=("finetune",),
        finetune=FineTuneFlags(epochs=6, batch_size=8, learning_rate=0.03, flip=0.0),
        json=str(tmp_path / "found.json"),
        pictures=str(tmp_path / "pictures"),
        no_track=True,
    )
    said = io.StringIO()
    assert command.run(Console(said, None)) == 0
    found = Location.of(tmp_path / "found.json").read_json()["data"][0]["encoders"]
    tuned, scratch = found["mae-step-00000002"], found["from scratch"]
    assert list(tuned["protocols"]) == ["finetune", "low-shot-50%-finetune"]
    assert list(scratch["protocols"]) == ["finetune", "low-shot-50%-finetune"]
    assert tuned["protocols"]["finetune"]["value"] > 0.9
    assert tuned["protocols"]["low-shot-50%-finetune"]["labels"] == 20
    assert "from_scratch True" in scratch["protocols"]["finetune"]["protocol"]
    ended = sorted(file.parent for file in (run / "finetune").glob("*/run.json"))
    assert len(ended) == 4
    times = [(folder / "run.json").stat().st_mtime_ns for folder in ended]

    again = io.StringIO()
    assert command.run(Console(again, None)) == 0
    assert [(folder / "run.json").stat().st_mtime_ns for folder in ended] == times
    assert Location.of(tmp_path / "found.json").read_json()["data"][0]["encoders"] == found
