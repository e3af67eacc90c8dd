"""The mean and deviation of a run: measured by the build of its data, or given."""

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from helpers import experiment, tiny
from selfray import config
from selfray.commands.script import parse
from selfray.data.data_sets import open_data
from selfray.data.writer import write_arrays
from selfray.experiment import IMAGENET_MEAN, DataConfig, Experiment
from selfray.methods.mae import MAEConfig
from selfray.models.encoder import EncoderConfig
from selfray.pixels.codecs import encode_channels
from selfray.recipes import every
from selfray.runs import checkpoint, starting
from selfray.storage import Location
from selfray.train import TrainState


def images(channels: int, bright: int) -> list[bytes]:
    values = np.random.default_rng(0).integers(bright - 20, bright + 20, (6, 8, 8, channels))
    return [encode_channels(value.astype(np.uint8)) for value in values]


def shards(folder: Path, channels: int = 3, bright: int = 200) -> str:
    write_arrays(folder, images(channels, bright))
    return str(folder)


def resolved(wanted: Experiment, run: Path) -> tuple[Experiment, list[str]]:
    lines: list[str] = []
    data = open_data(wanted.data, Location.of(run), lambda _: None, _no_build)
    found = starting.normalized(wanted, data.statistics, Location.of(run), lines.append)
    return found, lines


def _no_build(*_: object) -> NoReturn:
    raise AssertionError("shards need no conversion")


def with_data(path: str, **changes) -> Experiment:
    wanted = experiment()
    return replace(wanted, data=replace(wanted.data, path=path, **changes))


def test_a_run_takes_what_its_shards_measured_and_keeps_its_name(tmp_path):
    wanted = with_data(shards(tmp_path / "set"))
    found, lines = resolved(wanted, tmp_path / "run")
    mean, std = found.data.normalization
    assert all(abs(value - 200 / 255) < 0.02 for value in mean)
    assert all(abs(value - 40 / 255 / 12**0.5) < 0.01 for value in std)
    assert found.run_name == wanted.run_name
    assert lines == [
        f"images are normalised by their own mean {mean[0]:.3f} {mean[1]:.3f} {mean[2]:.3f} and "
        f"std {std[0]:.3f} {std[1]:.3f} {std[2]:.3f}, as the build of the shards measured them "
        "(--data.mean and --data.std win)"
    ]
    assert config.loads(config.dumps(found)) == found


def test_given_values_win_and_make_another_run(tmp_path):
    wanted = with_data(shards(tmp_path / "set"), statistics="given")
    found, lines = resolved(wanted, tmp_path / "run")
    assert (found.data.mean, found.data.normalization[0]) == (wanted.data.mean, wanted.data.mean)
    assert not lines
    assert found.run_name != with_data(wanted.data.path).run_name


def test_a_flag_asks_for_its_own_values(tmp_path):
    words = ["simclr-imagenet", "--data.path", "there"]
    assert parse(every(), words, "", "pretrain").data.statistics == "measured"
    flags = ["--data.mean", "0.1", "0.2", "0.3"]
    given = parse(every(), [*words, *flags], "", "pretrain").data
    assert (given.mean, given.statistics) == ((0.1, 0.2, 0.3), "given")


def test_a_run_that_goes_on_keeps_what_it_started_with(tmp_path):
    wanted = with_data(shards(tmp_path / "set"))
    started, _ = resolved(wanted, tmp_path / "run")
    run = Location.of(tmp_path / "run")
    checkpoint.save(TrainState.start(started, 8), started, run, loss=1.0)
    darker = with_data(shards(tmp_path / "other", bright=50))
    again, lines = resolved(darker, tmp_path / "run")
    assert again.data.normalization == started.data.normalization
    assert not lines
    before = replace(wanted, data=replace(wanted.data, statistics="measured"))
    old = Location.of(tmp_path / "old")
    checkpoint.save(TrainState.start(before, 8), before, old, loss=1.0)
    assert resolved(darker, tmp_path / "old")[0].data.normalization[0] == wanted.data.mean


def test_first_weights_keep_the_values_that_they_were_trained_with(tmp_path):
    first, _ = resolved(with_data(shards(tmp_path / "set")), tmp_path / "run")
    run = Location.of(tmp_path / "run")
    checkpoint.save(TrainState.start(first, 8), first, run, loss=1.0)
    start = checkpoint.latest(run)
    assert start is not None
    other = shards(tmp_path / "other", bright=50)
    further = replace(with_data(other), init_from=start.location.uri)
    assert resolved(further, tmp_path / "next")[0].data.normalization == first.data.normalization
    public = replace(with_data(other, mean=IMAGENET_MEAN), init_from="timm:resnet18.a1_in1k")
    assert resolved(public, tmp_path / "next")[0].data.normalization[0] == IMAGENET_MEAN


def test_many_channels_need_no_numbers_of_the_user(tmp_path):
    encoder = EncoderConfig(
        "vit_tiny_patch16_224", image_size=16, patch_size=8, width=24, depth=1, heads=2,
        in_channels=13,
    )  # fmt: skip
    wanted = experiment(
        tiny(MAEConfig), encoder, data=DataConfig(shards(tmp_path / "set", 13), channels=13)
    )
    assert len(resolved(wanted, tmp_path / "run")[0].data.normalization[0]) == 13


def test_channels_that_the_data_does_not_have_are_refused_by_the_flag(tmp_path):
    path = shards(tmp_path / "set", 13)
    with pytest.raises(ValueError, match=r"images of 13 channels, and data.channels is 3: give --"):
        resolved(with_data(path), tmp_path / "run")
    gray = shards(tmp_path / "gray", 1)
    found, _ = resolved(with_data(gray), tmp_path / "run")  # gray images can be read as colours
    assert len(found.data.normalization[0]) == 3
