"""Runs that start from public weights, and whether they made these better: on a real Ray."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_launch import Screen, shards  # noqa: F401 - a fixture
from test_weights import LEARNED, ROTARY, dino, dinov3, images, published, saved

from helpers import VIT, all_methods, batches, experiment, start, tiny, train_for, weights
from selfray.cluster.launch import launch
from selfray.commands.start_flags import with_encoder_of_start
from selfray.experiment import CheckpointConfig, DataConfig, Experiment, ProbeConfig
from selfray.health import GuardConfig
from selfray.methods.dino import DINOConfig
from selfray.methods.mae import MAEConfig
from selfray.models.encoder import Encoder
from selfray.probes.features import ProbeResult
from selfray.probes.verdict import surely_worse, verdict, without_labels
from selfray.recipes import every
from selfray.runs import checkpoint, starting
from selfray.runs.checkpoint import Checkpoint
from selfray.storage import Location
from selfray.train import TrainState


def public(folder: Path, config: Any = LEARNED, layout: Any = dino) -> str:
    return saved(layout(published(config).state_dict()), folder)


def kept(wanted: Experiment, folder: Path) -> Location:
    run = Location.of(folder / "run")
    run.make_folder()
    starting.keep(wanted, run, lambda line: None)
    return run


# Starts


@pytest.mark.parametrize("method", all_methods(), ids=lambda method: method.name)
def test_teacher_and_student_of_every_method_start_as_the_public_encoder(method, tmp_path):
    config, layout = (ROTARY, dinov3) if method.name in ("dino", "dinov2") else (LEARNED, dino)
    wanted = experiment(method, config, init_from=public(tmp_path, config, layout))
    state = starting.state(wanted, kept(wanted, tmp_path), 100)
    model = published(config)
    found = [part for part in state.method.modules() if isinstance(part, Encoder)]
    trained = [part for part in found if next(part.parameters(), None) is not None]
    assert len(trained) == 1 + (method.name in ("dino", "dinov2", "byol", "moco", "mocov3"))
    with torch.no_grad():
        for encoder in trained:
            expected = model(images())
            torch.testing.assert_close(encoder.eval()(images()).cls, expected, rtol=1e-5, atol=1e-5)
    (step,) = train_for(state, wanted, 1)
    assert torch.isfinite(step.loss)


def test_what_was_taken_is_said_once_and_kept_for_workers_without_the_file(tmp_path):
    wanted = experiment(tiny(DINOConfig), LEARNED, init_from=public(tmp_path))
    run = Location.of(tmp_path / "run")
    run.make_folder()
    lines: list[str] = []
    tags = starting.keep(wanted, run, lines.append)
    assert lines[0].startswith(f"starting from {wanted.init_from} (ViT layout): 30 of 30 tensors")
    assert tags["start.share"] == "1.0000"
    assert len(tags["start.sha256"]) == 64
    (tmp_path / "weights.pth").unlink()
    assert starting.keep(wanted, run, lines.append) == tags
    starting.state(wanted, run, 100)


def test_an_encoder_stands_still_while_its_head_warms_up_and_its_teacher_with_it():
    wanted = experiment(tiny(DINOConfig), VIT, warm_up_head=0.03, batch_size=8)
    state = start(wanted)  # of 100 steps
    before = weights(state)
    train_for(state, wanted, 3)
    moved = {
        name for name, tensor in weights(state).items() if not torch.equal(tensor, before[name])
    }
    assert moved
    assert not [name for name in moved if ".backbone." in name]
    train_for(state, wanted, 1, batches(wanted, 3))
    after = weights(state)
    assert not torch.equal(
        after["student.backbone.norm.weight"], before["student.backbone.norm.weight"]
    )


def test_an_optimizer_remembers_nothing_of_the_time_when_the_encoder_stood_still():
    wanted = experiment(MAEConfig(decoder_width=32, decoder_depth=1, decoder_heads=2), VIT)
    wanted = replace(wanted, warm_up_head=0.02)
    state = start(wanted)
    train_for(state, wanted, 2)
    parameters = dict(state.method.named_parameters())
    known = {name for name, p in parameters.items() if p in state.optimizer.state}
    assert known == {name for name in parameters if ".backbone." not in name}


# Flags


def test_the_encoder_is_that_of_the_weights_unless_one_is_named(tmp_path):
    recipes = every()
    file = saved({"patch_embed.proj.weight": torch.zeros(1)}, tmp_path)
    flags = ["dinov2-adapt", "--init-from=timm:vit_base_patch16_dinov3.lvd1689m"]
    changed = with_encoder_of_start(recipes, flags)
    encoder = changed["dinov2-adapt"].encoder
    assert (encoder.name, encoder.position) == ("vit_base_patch16_dinov3", "rotary")
    assert (encoder.image_size, encoder.drop_path) == (224, 0.1)
    assert changed["dino-adapt"] is recipes["dino-adapt"]
    assert changed["dinov2-adapt"].views
    named = ["dino-adapt", "--init-from", file, "--encoder.name", "vit_tiny_patch16_224"]
    assert with_encoder_of_start(recipes, named) is recipes
    with pytest.raises(FileNotFoundError, match=r"gone.pth: there is no such file"):
        with_encoder_of_start(recipes, ["dino-adapt", "--init-from", "gone.pth"])


# Verdicts


def result(right: int, of: int = 400, seed: int = 0) -> ProbeResult:
    hits = np.zeros(of, np.uint8)
    hits[np.random.default_rng(seed).permutation(of)[:right]] = 1
    packed = np.packbits(hits).tobytes().hex()
    return ProbeResult(right / of, right / of, 9, of, {}, hits={"knn": packed, "linear": packed})


def test_a_verdict_says_by_how_much_and_how_sure():
    better = verdict({0: result(200), 10: result(290), 20: result(280)}, "knn")
    assert better is not None
    assert (better.step, better.probes) == (10, 2)
    assert better.described.startswith("better than the weights it started from by 22.5 ± ")
    assert "kNN 72.5% at step 10, 50.0% at the start; 95 % bootstrap over 400" in better.described
    same = verdict({0: result(200), 10: result(204, seed=1)}, "linear")
    assert same is not None
    assert same.described.startswith(
        "no better than the weights it started from: a difference of +1"
    )
    worse = verdict({0: result(300), 10: result(200)}, "knn")
    assert worse is not None
    assert worse.described.startswith("worse than the weights it started from by 25.0 ± ")
    assert worse.described.endswith("keep those")


def test_there_is_no_verdict_without_a_start_or_labels():
    assert verdict({10: result(200)}, "knn") is None
    assert verdict({0: result(200)}, "knn") is None
    bare = ProbeResult(None, None, 0, 9, {}, rankme=5.0, alignment=0.2)
    assert verdict({0: bare, 10: bare}, "knn") is None
    line = without_labels({0: bare, 10: replace(bare, rankme=8.0)})
    assert line is not None
    assert "selfray cannot say" in line
    assert "RankMe 5 -> 8, alignment 0.2 -> 0.2" in line


# Whole runs


def adapting(shards: str, folder: Path, **changes: Any) -> Experiment:  # noqa: F811
    wanted = experiment(
        tiny(DINOConfig),
        LEARNED,
        init_from=public(folder),
        data=DataConfig(path=shards),
        batch_size=32,
        epochs=2,
        warm_up_head=0.2,
        probe=ProbeConfig(times=2),
        checkpoint=CheckpointConfig(times=2),
        output=str(folder / "runs"),
        log_every=1,
    )
    return replace(wanted, **changes)


@pytest.mark.usefixtures("ray_session")
def test_a_run_starts_from_public_weights_probes_them_first_and_ends_with_its_verdict(
    shards,  # noqa: F811
    tmp_path,
):
    wanted = adapting(shards, tmp_path)
    screen = Screen()
    found = launch(wanted, screen)
    assert any("30 of 30 tensors, 100.0% of the encoder's" in line for line in screen.lines)
    assert any("(starting weights)" in line for line in screen.lines)
    assert "than the weights it started from" in screen.lines[-1]
    run = Location.of(found.folder)
    best = checkpoint.best(run)
    assert best is not None
    by_knn = {step: p.knn or 0.0 for step, p in found.probes.items() if step > 0}
    assert by_knn[best.step] == max(by_knn.values())
    # The first probe was of the public encoder itself.
    start_of = starting.state(wanted, run, 1).method.encoder.eval()
    untrained = TrainState.start(wanted, 1).method.encoder.eval()
    model = published(LEARNED)
    with torch.no_grad():
        torch.testing.assert_close(start_of(images()).cls, model(images()), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(untrained(images()).cls, model(images()), atol=1e-2)
    assert Checkpoint.open(run).experiment().init_from == wanted.init_from
    again = Screen()
    assert launch(wanted, again).probes == found.probes


@pytest.mark.usefixtures("ray_session")
def test_weights_of_another_encoder_are_refused_before_any_worker_starts(shards, tmp_path):  # noqa: F811
    wanted = adapting(shards, tmp_path, encoder=replace(LEARNED, depth=6))
    with pytest.raises(
        ValueError, match=r"fits .* of the weights of encoder.name vit_tiny_patch16_2"
    ):
        launch(wanted, Screen())


def test_the_guard_counts_probes_that_are_surely_worse():
    start, worse, same = result(300), result(200, seed=1), result(296, seed=2)
    assert surely_worse({0: start, 10: worse, 20: worse}, "knn", 2)
    assert surely_worse({0: start, 10: same, 20: worse, 30: worse}, "linear", 2)
    assert not surely_worse({0: start, 10: worse, 20: same, 30: worse}, "knn", 2)
    assert not surely_worse({0: start, 10: worse}, "knn", 2)  # one bad probe is no trend
    assert not surely_worse({10: start, 20: worse, 30: worse}, "knn", 2)
    assert not surely_worse({0: start, 10: worse, 20: worse}, "knn", 0)  # switched off
    with pytest.raises(ValueError, match=r"guard.worse_than_start must be at least 0, got -1"):
        GuardConfig(worse_than_start=-1)
