import time
from dataclasses import replace

import pytest
import torch

from helpers import (
    BEIT,
    MAE,
    PLAIN_SGD,
    RESNET,
    SIMCLR,
    VIT,
    Enough,
    batches,
    differing,
    experiment,
    positions,
    reseeded,
    start,
    tiny,
    train_for,
    weights,
)
from selfray.method import Method
from selfray.methods.dinov2 import DINOv2Config
from selfray.models.encoder import normalize
from selfray.runs import checkpoint
from selfray.runs.checkpoint import Checkpoint
from selfray.schedules import Progress
from selfray.storage import Location
from selfray.train import TrainState, train

DROPPING = experiment(MAE, replace(VIT, drop_path=0.2))


class Witness(Method):
    """A method that writes down when it is called, and with what."""

    def __init__(self, inner: Method) -> None:
        super().__init__()
        self.inner = inner
        self.encoder = inner.encoder
        self.events: list[tuple[str, int]] = []

    def forward(self, batch, progress):
        self.events.append(("forward", progress.step))
        return self.inner(batch, progress)

    def before_step(self, progress):
        assert all(p.grad is not None for p in self.parameters() if p.requires_grad)
        self.events.append(("before_step", progress.step))
        self.weights_before = weights_of(self)

    def after_step(self, progress):
        assert all(p.grad is None for p in self.parameters())
        assert differing(self.weights_before, weights_of(self)), "the optimizer has not moved yet"
        self.events.append(("after_step", progress.step))


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def witnessed(wanted, steps: int) -> tuple[TrainState, Witness]:
    witness = Witness(start(wanted).method)
    optimizer = wanted.optimizer.build(witness)
    return TrainState(witness, optimizer, Progress(0, steps * wanted.batch_size, 0)), witness


def test_the_events_of_a_step_come_in_their_order():
    wanted = experiment(MAE, accumulate=2)
    state, witness = witnessed(wanted, steps=2)
    train(
        state,
        batches(wanted),
        wanted,
        lambda step: witness.events.append(("on_step", step.progress.step)),
    )
    one = ["forward", "forward", "before_step", "after_step", "on_step"]
    assert [name for name, _ in witness.events] == one * 2
    # All of a step see where it began; on_step hears where it ended.
    assert [number for _, number in witness.events] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]


def test_training_ends_when_all_images_are_seen():
    wanted = experiment(MAE, batch_size=8)
    state = start(wanted, steps=3)
    told = train_for(state, wanted, steps=100)
    assert [step.progress.images_seen for step in told] == [8, 16, 24]
    assert state.progress.finished
    assert train_for(state, wanted, steps=100) == [], "a finished run does nothing"


def test_the_state_is_up_to_date_when_on_step_is_called_and_survives_its_error():
    wanted = experiment(MAE)
    state = start(wanted)

    def on_step(step):
        assert state.progress == step.progress
        raise Enough

    with pytest.raises(Enough):
        train(state, batches(wanted), wanted, on_step)
    assert state.progress.step == 1
    expected = start(wanted)
    train_for(expected, wanted, 1)
    assert differing(weights(state), weights(expected)) == []


def test_a_step_takes_exactly_the_micro_batches_that_it_needs():
    wanted = experiment(MAE, accumulate=4)
    taken = []

    def counted():
        for batch in batches(wanted):
            taken.append(len(batch["global"]))
            yield batch

    train_for(start(wanted), wanted, 3, counted())
    assert taken == [2] * 12


def test_the_loss_that_is_told_is_the_mean_over_the_micro_batches():
    whole, parts = experiment(MAE, optimizer=PLAIN_SGD), experiment(MAE, accumulate=4)
    (expected,) = train_for(start(whole), whole, 1)
    (found,) = train_for(start(parts), parts, 1)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)


def test_waiting_for_data_is_counted_apart_and_within_the_step():
    wanted = experiment(MAE, accumulate=2)

    def slow():
        for batch in batches(wanted):
            time.sleep(0.03)
            yield batch

    (step,) = train_for(start(wanted), wanted, 1, slow())
    assert step.waited_seconds >= 0.06
    assert step.seconds > step.waited_seconds


def test_computing_is_not_waiting():
    wanted = experiment(MAE)
    ready = iter([positions(0, 8, wanted)] * 5)
    steps = train_for(start(wanted), wanted, 5, ready)
    assert sum(step.waited_seconds for step in steps) < 0.5 * sum(step.seconds for step in steps)


def test_a_step_shows_the_first_views_normalised():
    wanted = experiment(SIMCLR)
    (step,) = train_for(start(wanted), wanted, 1)
    expected = positions(0, 8, wanted)["global"][:, 0]
    torch.testing.assert_close(step.images, normalize(expected, wanted.data.mean, wanted.data.std))


def test_gradients_longer_than_the_limit_are_cut_to_it():
    free = experiment(MAE, optimizer=PLAIN_SGD)
    limit = 0.01
    clipped = replace(free, optimizer=replace(PLAIN_SGD, clip_norm=limit))
    moves = []
    for wanted in (free, clipped):
        state = start(wanted)
        before = weights_of(state.method)
        (step,) = train_for(state, wanted, 1)
        after = weights_of(state.method)
        move = torch.cat([(before[name] - after[name]).flatten() for name in before])
        moves.append(move)
        assert float(step.gradient_norm) == pytest.approx(float(moves[0].norm()), rel=1e-3)
    assert float(moves[0].norm()) > 2 * limit
    assert float(moves[1].norm()) == pytest.approx(limit, rel=1e-2)
    assert float(torch.cosine_similarity(moves[0], moves[1], dim=0)) > 0.999


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    runs = []
    for wanted in (DROPPING, DROPPING, reseeded(DROPPING)):
        state = start(wanted)
        train_for(state, wanted, 2)
        runs.append(weights(state))
    assert differing(runs[0], runs[1]) == []
    assert differing(runs[0], runs[2])


def test_the_first_weights_do_not_depend_on_what_was_drawn_before():
    torch.manual_seed(1)
    first = weights(start(DROPPING))
    torch.manual_seed(2)
    assert differing(first, weights(start(DROPPING))) == []


def test_a_run_with_dropped_paths_resumes_bit_for_bit(tmp_path):
    straight = start(DROPPING)
    train_for(straight, DROPPING, 4)
    first = start(DROPPING)
    train_for(first, DROPPING, 2)
    run = Location.of(tmp_path)
    checkpoint.save(first, DROPPING, run, loss=0.0)
    resumed = start(reseeded(DROPPING))
    resumed.load_state_dict(Checkpoint.open(run).state())
    torch.manual_seed(99)  # whatever else the process has drawn
    train_for(resumed, DROPPING, 2)
    assert differing(weights(resumed), weights(straight)) == []


def test_steps_drop_different_paths():
    # The same batch in both steps and no learning: only what is random differs.
    still = replace(PLAIN_SGD, base_learning_rate=1e-12)
    wanted = replace(DROPPING, optimizer=still, encoder=replace(VIT, drop_path=0.5))
    fixed = positions(0, 8, wanted)
    first, second = train_for(start(wanted), wanted, 2, iter([fixed] * 2))
    assert float(first.loss) != float(second.loss)


def test_a_large_seed_trains():
    wanted = experiment(MAE, seed=2**31 - 1)
    train_for(start(wanted), wanted, 1)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (experiment(SIMCLR), experiment(MAE)),
        (experiment(MAE), experiment(SIMCLR, VIT)),
        (experiment(MAE), experiment(MAE, replace(VIT, depth=1))),
        (experiment(SIMCLR), experiment(SIMCLR, replace(RESNET, channels=(8, 16, 16, 32)))),
    ],
)
def test_a_state_of_another_method_or_encoder_is_refused(theirs, ours):
    with pytest.raises(ValueError, match="the checkpoint does not fit"):
        start(ours).load_state_dict(start(theirs).state_dict())


# From another run's end


LARGER = {"image_size": 32}


@pytest.mark.parametrize(
    ("method", "encoder"),
    [
        (tiny(DINOv2Config), replace(VIT, position="learned", registers=4)),
        (tiny(DINOv2Config), VIT),
        (replace(tiny(DINOv2Config), local_crops=0), BEIT),
        (MAE, VIT),
        (SIMCLR, RESNET),
    ],
    ids=["learned", "sincos", "relative", "mae", "resnet"],
)
def test_a_run_goes_on_from_anothers_weights_at_a_larger_image_size(method, encoder):
    first = start(experiment(method, encoder))
    train_for(first, experiment(method, encoder), 2)
    wanted = experiment(method, replace(encoder, **LARGER))
    second = start(reseeded(wanted))
    second.load_weights(first.state_dict())
    theirs, ours = weights(first), weights(second)
    positions = {n for n in ours if ours[n].shape != theirs[n].shape}
    assert len(positions) == {"mae": 1, "simclr": 0}.get(method.name, 2)  # student's and teacher's
    assert [n for n in ours if n not in positions and not torch.equal(ours[n], theirs[n])] == []
    assert second.progress.images_seen == 0
    assert all(torch.isfinite(step.loss) for step in train_for(second, wanted, 2))


def test_interpolated_positions_keep_their_layout():
    small = replace(VIT, position="learned", registers=4)
    first = start(experiment(SIMCLR, small))
    own = weights(first)["encoder.backbone.pos_embed"]  # [1, 5 + 16, 32]
    with torch.no_grad():
        ramp = torch.arange(4.0)
        positions = first.method.encoder.get_parameter("backbone.pos_embed")
        positions[0, 5:] = (ramp[:, None] * 10 + ramp[None]).reshape(16, 1)
    second = start(experiment(SIMCLR, replace(small, **LARGER)))
    second.load_weights(first.state_dict())
    large = weights(second)["encoder.backbone.pos_embed"]
    assert torch.equal(large[:, :5], own[:, :5])
    grid = large[0, 5:, 0].reshape(8, 8)
    assert (grid.diff(dim=0) > 0).all()
    assert (grid.diff(dim=1) > 0).all()
    assert float(grid.mean()) == pytest.approx(16.5, rel=0.02)


def test_weights_of_another_method_are_refused():
    with pytest.raises(ValueError, match="the checkpoint does not fit MAE"):
        start(experiment(MAE)).load_weights(start(experiment(SIMCLR, VIT)).state_dict())
