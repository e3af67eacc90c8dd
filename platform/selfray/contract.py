"""The contract of a method, as checks that run on any method of any package.

`selfray check-method my_package.barlow` runs them on a user's method; the tests run them on each
file in methods/. An image here is a function of its position in the run, so a global batch is the
same for any split into ranks and micro-batches.
"""

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from selfray import config
from selfray.data.plan import Share
from selfray.experiment import DataConfig, Experiment
from selfray.method import Batch, Method, MethodConfig
from selfray.models.encoder import Encoder, EncoderConfig, export_weights, normalize
from selfray.optim import OptimizerConfig, follow_schedules
from selfray.runs import checkpoint
from selfray.runs.checkpoint import Checkpoint
from selfray.schedules import Constant, WarmupCosine
from selfray.storage import Location
from selfray.train import Step, TrainState, train
from selfray.views import View

RESNET = EncoderConfig(
    "resnet18", image_size=16, small_stem=True, layers=(1, 1, 1, 1), channels=(8, 16, 16, 16)
)
VIT = EncoderConfig(
    "vit_tiny_patch16_224",
    image_size=16,
    patch_size=4,
    width=32,
    depth=2,
    heads=2,
    position="sincos",
)
Config = TypeVar("Config", bound=MethodConfig)

SMALLER: dict[str, Any] = {
    "decoder_width": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "projector_hidden": 32,
    "projector_width": 16,
    "queue_size": 24,
    "prototypes": 24,
    "patch_prototypes": 20,
    "hidden": 32,
    "bottleneck": 16,
    "local_crops": 2,
    "local_view": View(size=8, crop_scale=(0.05, 0.4)),
    "codes": 16,
    "code_width": 8,
}
"""Small values for fields of a method's config, to keep the checks fast. A new method with a large
head adds the head's field here."""


def tiny(kind: type[Config]) -> Config:
    """A method's default settings, with small heads."""
    names = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in SMALLER.items() if name in names})


def encoder_for(method: MethodConfig) -> EncoderConfig:
    """The tiny ResNet, or the tiny ViT for a method that needs one."""
    try:
        method.views(RESNET)
    except ValueError:
        return VIT
    return RESNET


def experiment(
    method: MethodConfig, encoder: EncoderConfig | None = None, **changes: Any
) -> Experiment:
    """A tiny experiment without warm-up, so that the weights move from the first step on."""
    settings: dict[str, Any] = {
        "optimizer": OptimizerConfig(
            "adamw",
            base_learning_rate=1e-3,
            scaling="none",
            schedule=WarmupCosine(warmup_fraction=0.0, final=1.0),
            weight_decay=Constant(0.01),
        ),
        "data": DataConfig(path="nowhere"),
        "batch_size": 8,
    }
    return Experiment("test", method, encoder or encoder_for(method), **{**settings, **changes})


PLAIN_SGD = OptimizerConfig(
    "sgd",
    base_learning_rate=1.0,
    scaling="none",
    schedule=WarmupCosine(warmup_fraction=0.0, final=1.0),
    weight_decay=Constant(0.0),
    momentum=0.0,
)
"""SGD with learning rate 1: each step subtracts exactly the gradient."""


def positions(start: int, count: int, wanted: Experiment) -> Batch:
    """The batch at positions [start, start + count), as the data path gives it.

    Views are uint8 [count, V, 3, H, W], masks bool [count, V, N], labels int64 [count].
    """
    columns: dict[str, list[np.ndarray]] = {}
    for position in range(start, start + count):
        rng = np.random.default_rng((17, position))
        for name, group in wanted.views.items():
            images, masks = _draw(rng, group)
            columns.setdefault(name, []).append(images)
            if masks is not None:
                columns.setdefault(f"{name}_mask", []).append(masks)
    batch = {name: torch.from_numpy(np.stack(values)) for name, values in columns.items()}
    return batch | {"label": torch.arange(start, start + count) % 3}


def _draw(
    rng: np.random.Generator, group: tuple[View, ...]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Views of one coarse picture with different noise: uint8 [V, 3, size, size], masks bool [V,
    N].
    """
    size = group[0].size
    assert size is not None
    coarse = rng.integers(20, 236, (3, 4, 4))
    picture = coarse.repeat(-(-size // 4), 1).repeat(-(-size // 4), 2)[:, :size, :size]
    images = np.stack([picture + rng.integers(-20, 20, picture.shape) for _ in group])
    masks = [view.mask.draw(rng, view.grid or 0) for view in group if view.mask is not None]
    return images.astype(np.uint8), np.stack(masks) if masks else None


def batches(
    wanted: Experiment, first_step: int = 0, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """One rank's micro-batches from step `first_step` on, endlessly."""
    share = Share(rank, ranks, wanted.accumulate)
    size = share.micro_batch(wanted.batch_size)
    position = first_step * wanted.batch_size + rank * wanted.accumulate * size
    while True:
        for micro_batch in range(wanted.accumulate):
            yield positions(position + micro_batch * size, size, wanted)
        position += wanted.batch_size


def prepared(batch: Batch, wanted: Experiment) -> Batch:
    """A batch as a method receives it: views normalised to float32."""
    return {
        name: normalize(values, wanted.data.mean, wanted.data.std)
        if name in wanted.views
        else values
        for name, values in batch.items()
    }


class Enough(Exception):  # noqa: N818 - a signal, not an error
    """Raised by on_step to leave the training loop."""


def train_for(
    state: TrainState, wanted: Experiment, steps: int, data: Iterator[Batch] | None = None
) -> list[Step]:
    """Train `steps` steps from the given state and return what each step reported."""
    told: list[Step] = []

    def on_step(step: Step) -> None:
        told.append(step)
        if len(told) == steps:
            raise Enough

    with contextlib.suppress(Enough):
        train(state, data or batches(wanted, state.progress.step), wanted, on_step)
    return told


def start(wanted: Experiment, steps: int = 100) -> TrainState:
    """The first state of a run of 100 steps, the same for the same seed."""
    return TrainState.start(wanted, steps * wanted.batch_size)


def weights(state: TrainState) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in state.method.state_dict().items()}


def first_move(wanted: Experiment) -> dict[str, Tensor]:
    """How much the first step of a run lowers each tensor: with PLAIN_SGD, its gradient."""
    state = start(wanted)
    before = weights(state)
    train_for(state, wanted, 1)
    after = weights(state)
    return {name: before[name] - after[name] for name in before}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """The names under which two sets of tensors differ in any bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, or |found| if expected is zero."""
    norm = expected.double().norm()
    error = (found.double() - expected.double()).norm()
    return float((error / norm if norm > 0 else error).detach())


def reseeded(wanted: Experiment) -> Experiment:
    """The same experiment with different initial weights."""
    return replace(wanted, seed=wanted.seed + 1)


# The checks. Each raises AssertionError with a sentence that says what the method must do.

Check = Callable[[MethodConfig], None]


def _owes(condition: object, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def the_loss_falls_on_a_fixed_batch(method: MethodConfig) -> None:
    # Without the loop's hooks: while teachers and queues move, the loss need not fall.
    wanted = experiment(method)
    state = start(wanted)
    batch = prepared(positions(0, wanted.batch_size, wanted), wanted)
    follow_schedules(state.optimizer, 1e-3, 0.0)
    losses = []
    for _ in range(40):
        loss, _ = state.method.train()(batch, state.progress)
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        losses.append(float(loss.detach()))
    _owes(
        sum(losses[-5:]) < 0.85 * sum(losses[:5]),
        f"40 steps on one batch do not lower the loss by 15 %: {losses[0]:.3g} to {losses[-1]:.3g}",
    )


def every_trainable_parameter_gets_a_gradient_and_every_parameter_moves(
    method: MethodConfig,
) -> None:
    wanted = experiment(method)
    state = start(wanted)
    _owes(isinstance(state.method, Method), "build does not return a selfray.method.Method")
    batch = prepared(positions(0, wanted.batch_size, wanted), wanted)
    loss, _ = state.method.train()(batch, state.progress)
    loss.backward()
    parameters = dict(state.method.named_parameters())
    unused = [name for name, p in parameters.items() if p.requires_grad and p.grad is None]
    _owes(not unused, f"an unused parameter breaks DDP: {', '.join(unused[:5])}")
    frozen = [name for name, p in parameters.items() if not p.requires_grad and p.grad is not None]
    _owes(not frozen, f"frozen parameters get a gradient: {', '.join(frozen[:5])}")

    state = start(wanted)
    before = weights(state)
    train_for(state, wanted, 3)
    moved = differing(before, weights(state))
    # Frozen teachers must move as well; a tensor that never moves should be a buffer.
    still = [name for name in parameters if name not in moved]
    _owes(not still, f"parameters never move, make them buffers: {', '.join(still[:5])}")


def the_loss_and_its_metrics_are_float32_scalars(method: MethodConfig) -> None:
    wanted = experiment(method)
    (step,) = train_for(start(wanted), wanted, 1)
    _owes(
        (step.loss.shape, step.loss.dtype) == (torch.Size([]), torch.float32),
        f"the loss is {step.loss.dtype} of shape {tuple(step.loss.shape)}",
    )
    wide = [name for name, value in step.metrics.items() if value.numel() != 1]
    _owes(not wide, f"metrics are not scalars: {', '.join(wide)}")


def labels_are_never_for_a_methods_eyes(method: MethodConfig) -> None:
    wanted = experiment(method)
    state = start(wanted)
    batch = prepared(positions(0, wanted.batch_size, wanted), wanted)
    with_labels, _ = state.method(batch, state.progress)
    del batch["label"]
    torch.manual_seed(0)
    without, _ = start(wanted).method(batch, state.progress)
    _owes(torch.isfinite(with_labels) and torch.isfinite(without), "the loss is not finite")


def a_method_and_its_run_survive_json(method: MethodConfig) -> None:
    _owes(config.loads(config.dumps(method)) == method, "its config changes when read from JSON")
    run = experiment(method)
    _owes(config.loads(config.dumps(run)) == run, "its experiment changes when read from JSON")


def a_resumed_run_has_the_same_weights_bit_for_bit(method: MethodConfig) -> None:
    wanted = experiment(method)
    straight = start(wanted)
    train_for(straight, wanted, 6)

    first = start(wanted)
    train_for(first, wanted, 3)
    with tempfile.TemporaryDirectory() as folder:
        run = Location.of(folder)
        checkpoint.save(first, wanted, run, loss=1.0)
        resumed = start(reseeded(wanted))  # different weights: all of them must be loaded
        _owes(differing(weights(resumed), weights(first)), "the seed does not change the weights")
        resumed.load_state_dict(Checkpoint.open(run).state())
    told = train_for(resumed, wanted, 3)
    _owes(told[-1].progress == straight.progress, "its progress differs after a resume")
    others = differing(weights(resumed), weights(straight))
    _owes(not others, f"weights differ after a resume: {', '.join(others[:5])}")


def the_encoder_goes_home_into_plain_timm(method: MethodConfig) -> None:
    wanted = experiment(method)
    state = start(wanted)
    train_for(state, wanted, 3)
    encoder = state.method.encoder
    _owes(isinstance(encoder, Encoder), "method.encoder is not a selfray.models.encoder.Encoder")
    data = safetensors.torch.save(export_weights(encoder))
    plain: Any = timm.create_model(wanted.encoder.name, **wanted.encoder.options)
    plain.load_state_dict(safetensors.torch.load(data), strict=True)
    if wanted.encoder.small_stem:
        plain.conv1.stride, plain.maxpool = (1, 1), nn.Identity()
    images = prepared(positions(0, 4, wanted), wanted)["global"][:, 0]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), encoder.eval()(images).cls)


def micro_batches_give_the_gradient_of_the_batch_or_are_refused(method: MethodConfig) -> None:
    if method.why_not_accumulate:
        try:
            experiment(method, accumulate=2)
        except ValueError as error:
            text = str(error)
            _owes(method.why_not_accumulate in text, f"the refusal gives no reason: {text}")
            _owes("give --accumulate 1" in text, f"the refusal names no remedy: {text}")
            return
        raise AssertionError("why_not_accumulate is set, but micro-batches are not refused")
    moves = []
    for accumulate in (1, 2):
        moves.append(
            first_move(experiment(method, VIT, accumulate=accumulate, optimizer=PLAIN_SGD))
        )
    for name, whole in moves[0].items():
        if torch.is_floating_point(whole):
            _owes(
                torch.allclose(moves[1][name], whole, rtol=1e-3, atol=2e-6),
                f"two micro-batches give {name} a gradient that differs from the batch's: set "
                "why_not_accumulate to the reason",
            )


def bf16_autocast_gives_a_finite_loss_near_that_of_float32(method: MethodConfig) -> None:
    losses = []
    for precision in ("float32", "bf16"):
        wanted = experiment(method, precision=precision)
        state = start(wanted)
        losses.append([float(step.loss) for step in train_for(state, wanted, 3)])
        _owes(all(map(math.isfinite, losses[-1])), f"the loss in {precision} is not finite")
        wide = all(p.dtype == torch.float32 for p in state.method.parameters())
        _owes(wide, "weights are not float32 under autocast")
    near = abs(losses[1][0] - losses[0][0]) <= 0.05 * abs(losses[0][0])
    _owes(near, f"the loss is {losses[0][0]:.4g} in float32 and {losses[1][0]:.4g} in bf16")
    _owes(losses[0] != losses[1], "bf16 computed in float32")


def views_are_filled_in_with_a_size_and_a_grid(method: MethodConfig) -> None:
    for name, group in experiment(method).views.items():
        for view in group:
            _owes(view.size is not None, f"the {name} views have no size: use method.fitted")
            _owes(view.mask is None or view.grid is not None, f"the {name} masks have no grid")


CHECKS: tuple[Check, ...] = (
    views_are_filled_in_with_a_size_and_a_grid,
    a_method_and_its_run_survive_json,
    the_loss_and_its_metrics_are_float32_scalars,
    every_trainable_parameter_gets_a_gradient_and_every_parameter_moves,
    the_loss_falls_on_a_fixed_batch,
    labels_are_never_for_a_methods_eyes,
    micro_batches_give_the_gradient_of_the_batch_or_are_refused,
    bf16_autocast_gives_a_finite_loss_near_that_of_float32,
    a_resumed_run_has_the_same_weights_bit_for_bit,
    the_encoder_goes_home_into_plain_timm,
)
