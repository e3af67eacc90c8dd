"""The guard's judgement, and what the recorder of a run does by it: no poisoned checkpoint."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import MAE, SIMCLR, VIT, experiment, start, tiny, train_for
from selfray.cluster.endings import would_repeat
from selfray.data.plan import even_steps
from selfray.experiment import CheckpointConfig, ProbeConfig
from selfray.health import CollapsedError, CollapseGuard, GuardConfig
from selfray.methods.byol import BYOLConfig
from selfray.methods.dino import DINOConfig
from selfray.methods.moco import MoCoConfig
from selfray.methods.mocov3 import MoCoV3Config
from selfray.runs import checkpoint
from selfray.runs.checkpoint import Checkpoint
from selfray.runs.recorder import Recorder
from selfray.storage import Location
from selfray.train import TrainState

GOOD, DEAD = {"health/feature_std": 0.5}, {"health/feature_std": 0.0}


def judged(points: list[dict[str, float]], **settings: Any) -> CollapseGuard:
    guard = CollapseGuard(GuardConfig(**settings))
    for point in points:
        guard.see(point)
    return guard


def test_features_that_stay_alike_are_a_collapse():
    assert not judged([GOOD, DEAD, DEAD], patience=3).collapsed
    assert judged([GOOD, DEAD, DEAD, DEAD], patience=3).collapsed


def test_a_single_dip_is_suspect_and_then_forgotten():
    assert judged([GOOD, DEAD], patience=3).suspects
    guard = judged([DEAD, DEAD, GOOD, DEAD, DEAD], patience=3)
    assert guard.points == 2
    assert not guard.collapsed
    assert not judged([DEAD, DEAD, GOOD], patience=3).suspects


def test_a_guard_without_patience_sees_nothing():
    assert not judged([DEAD] * 100, patience=0).suspects


def test_projections_that_are_alike_are_a_collapse_of_live_features():
    guard = judged([GOOD | {"projection_std": 0.02}], patience=1)
    assert guard.collapsed
    assert guard.cause == "projection_std is 0.02, below 0.05"


def test_a_figure_that_is_missing_or_nan_is_no_collapse():
    assert not judged([{}, {"health/feature_std": math.nan}], patience=1).suspects


STUCK = GOOD | {"below_chance": 0.001}
UNIFORM = GOOD | {"below_uniform": 1e-5}


@pytest.mark.parametrize("point", [STUCK, UNIFORM])
def test_a_run_that_is_still_at_chance_after_its_beginning_is_ended(point):
    guard = CollapseGuard(GuardConfig(patience=3))
    for fraction in (0.0, 0.05, 0.09, 0.1, 0.11):
        guard.see(point, fraction)
        assert not guard.collapsed
    assert not guard.suspects, "what has learned nothing yet loses nothing by a checkpoint"
    guard.see(point, 0.12)
    assert guard.collapsed
    assert guard.verdict.startswith("nothing is learned: below_")
    guard.see(GOOD | {"below_chance": 0.6, "below_uniform": 0.3}, 0.13)
    assert not guard.collapsed


def test_an_untrained_contrast_is_near_chance_and_a_solved_one_far_below():
    wanted = experiment(SIMCLR)
    (step,) = train_for(start(wanted), wanted, 1)
    chance = math.log(2 * wanted.batch_size - 1)
    told = float(step.metrics["below_chance"])
    assert told == pytest.approx(chance - float(step.loss), abs=1e-5)
    for kind in (MoCoConfig, MoCoV3Config):
        wanted = experiment(tiny(kind))
        (step,) = train_for(start(wanted), wanted, 1)
        candidates = 25 if kind is MoCoConfig else 8
        scale = 1.0 if kind is MoCoConfig else 4 * 0.2  # two terms, each times 2 T
        expected = math.log(candidates) - float(step.loss) / scale
        assert float(step.metrics["below_chance"]) == pytest.approx(expected, abs=1e-5)


def test_a_uniform_teacher_is_seen():
    wanted = experiment(tiny(DINOConfig))
    state = start(wanted)
    head = state.method.get_parameter("teacher_head.prototypes.weight")
    head.data.copy_(head.data[:1].expand_as(head))  # all prototypes are one
    (step,) = train_for(state, wanted, 1)
    assert float(step.metrics["below_uniform"]) == pytest.approx(0.0, abs=1e-5)
    (step,) = train_for(start(wanted), wanted, 1)
    assert float(step.metrics["below_uniform"]) > 0.1


def test_byol_whose_projections_are_all_equal_is_seen_to_collapse():
    wanted = experiment(tiny(BYOLConfig))
    alive = start(wanted)
    (step,) = train_for(alive, wanted, 1)
    assert step.metrics["projection_std"] > 0.3
    dead = start(wanted)
    # The same row for every image, by the batch norm's bias alone.
    dead.method.get_parameter("target_projector.1.weight").data.zero_()
    dead.method.get_parameter("target_projector.1.bias").data.fill_(1.0)
    (step,) = train_for(dead, wanted, 1)
    assert step.metrics["projection_std"] < 1e-3


@pytest.mark.parametrize(
    "settings",
    [{"feature_floor": 1.0}, {"projection_floor": -0.1}, {"patience": -1}, {"learning_by": 2}],
)
def test_a_guards_settings_are_checked(settings):
    with pytest.raises(ValueError, match=rf"guard\.{next(iter(settings))} must"):
        GuardConfig(**settings)


def test_a_collapse_or_a_number_that_is_not_finite_is_not_tried_again():
    assert would_repeat(CollapsedError("x"))
    assert would_repeat(FloatingPointError("x"))


class Tape:
    """A recorder on a run of 100 steps that is told of steps of the test's making."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        settings: dict[str, Any] = {
            "checkpoint": CheckpointConfig(times=50),
            "probe": ProbeConfig(times=0),
            "log_every": 1,
        }
        wanted = experiment(MAE, VIT, **{**settings, **changes})
        self.run = Location.of(folder)
        self.state: TrainState = start(wanted)
        self.recorder = Recorder(wanted, self.run, even_steps(100, 50), writes=True)
        self.recorder.started(self.state, torch.device("cpu"))
        (self.step,) = train_for(self.state, wanted, 1)
        self.alive = self.norm.clone()
        self.recorder.on_step(self.state, self.step)

    @property
    def norm(self) -> torch.Tensor:
        return self.state.method.get_parameter("encoder.backbone.norm.weight").data

    def tell(self, **changes: Any) -> None:
        self.state.progress = self.state.progress.advance(8)
        self.recorder.on_step(
            self.state, replace(self.step, progress=self.state.progress, **changes)
        )

    def kill_features(self) -> None:
        self.norm.zero_()

    def revive_features(self) -> None:
        self.norm.copy_(self.alive)

    @property
    def saved(self) -> list[int]:
        return [found.step for found in checkpoint.all_of(self.run)]


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_checkpoint_is_written_after_a_step_that_was_not_finite(tmp_path, name, value):
    tape = Tape(tmp_path, log_every=100)
    tape.tell()
    tape.tell(**{name: torch.tensor(value)})
    words = name.replace("_", " ")
    message = rf"the {words} is {value} at step 3; the checkpoint of step 2 is kept: give a lower"
    with pytest.raises(FloatingPointError, match=message):
        tape.tell()  # step 4 itself is finite
    assert tape.saved == [2]
    assert checkpoint.latest(tape.run) is not None


def test_features_that_are_not_finite_end_a_run_whose_loss_still_is(tmp_path):
    tape = Tape(tmp_path)
    tape.tell()
    tape.norm[0] = math.nan
    message = "the features are not finite at step 3; the checkpoint of step 2 is kept"
    with pytest.raises(FloatingPointError, match=message):
        tape.tell()
    kept = Checkpoint.open(tape.run)
    assert kept.step == 2
    assert all(tensor.isfinite().all() for tensor in kept.state()["method"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    tape = Tape(tmp_path)
    tape.state.method.get_parameter("mask_token").data[0] = math.inf
    with pytest.raises(FloatingPointError, match="the weights are not finite at step 2; there is"):
        tape.tell()
    assert tape.saved == []


def test_a_checkpoint_is_held_back_until_the_features_are_alive_again(tmp_path):
    tape = Tape(tmp_path)
    tape.tell()
    tape.kill_features()
    for _ in range(4):  # steps 3 to 6; 4 and 6 would be saved
        tape.tell()
    assert tape.saved == [2]
    tape.revive_features()
    tape.tell()
    assert tape.saved == [2, 7]
    tape.tell()
    tape.tell()
    assert tape.saved == [2, 7, 8]


def test_a_collapse_ends_a_run_and_names_figure_step_checkpoint_and_way_out(tmp_path):
    tape = Tape(tmp_path, guard=GuardConfig(patience=3))
    tape.tell()
    tape.kill_features()
    tape.tell()
    tape.tell()
    message = (
        r"the features have collapsed: health/feature_std is 0, below 0\.001 at step 5; the "
        r"checkpoint of step 2 is kept: give a lower --optimizer\.base-learning-rate"
    )
    with pytest.raises(CollapsedError, match=message):
        tape.tell()


def test_a_run_does_not_end_well_with_features_that_are_dead(tmp_path):
    tape = Tape(tmp_path, log_every=200, guard=GuardConfig(patience=1000))
    for _ in range(98):
        tape.tell()
    tape.kill_features()
    with pytest.raises(CollapsedError, match="at step 100; the checkpoint of step 98 is kept"):
        tape.tell()


def test_a_run_without_a_guard_goes_on_with_dead_features(tmp_path):
    tape = Tape(tmp_path, guard=GuardConfig(patience=0))
    tape.kill_features()
    for _ in range(20):
        tape.tell()
    assert tape.saved[-1] == 20
