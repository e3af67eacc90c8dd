"""The contract of a method, as checks that any method of any package can be put through.

`selfray check-method my_package.barlow` runs them on a user's method; tests/test_methods.py runs
them on each file in methods/. An image here is a function of its position in the run, so a global
batch is the same however it is shared out among ranks and micro-batches.
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
"""What the contract tests change in a method's config where it has such a field, to be fast. A
new method with a large head adds the head's field here."""


def tiny(kind: type[Config]) -> Config:
    """A method's own settings, with its heads made small."""
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
    """A run of a few steps that moves from its first step on (no warm-up)."""
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
"""Weights move by exactly the gradient."""


def positions(start: int, count: int, wanted: Experiment) -> Batch:
    """The images at positions [start, start + count) as the data path gives them: uint8."""
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
    """uint8 [V, 3, size, size], bool [V, N]: one coarse picture, with other noise in each view."""
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
    """One rank's micro-batches from a step on, without end."""
    share = Share(rank, ranks, wanted.accumulate)
    size = share.micro_batch(wanted.batch_size)
    position = first_step * wanted.batch_size + rank * wanted.accumulate * size
    while True:
        for micro_batch in range(wanted.accumulate):
            yield positions(position + micro_batch * size, size, wanted)
        position += wanted.batch_size


def prepared(batch: Batch, wanted: Experiment) -> Batch:
    """A batch as a method sees it: views as float, normalised."""
    return {
        name: normalize(values, *wanted.data.normalization) if name in wanted.views else values
        for name, values in batch.items()
    }


class Enough(Exception):  # noqa: N818 - it is no error
    """Raised by on_step to leave the loop."""


def train_for(
    state: TrainState, wanted: Experiment, steps: int, data: Iterator[Batch] | None = None
) -> list[Step]:
    """Some steps of a run that goes on, from where its state stands."""
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
    """By how much the first step of a run changes each tensor: the gradient, where PLAIN_SGD is its
    optimizer."""
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
    """|found - expected| / |expected|, and |found| where nothing was expected."""
    norm = expected.double().norm()
    error = (found.double() - expected.double()).norm()
    return float((error / norm if norm > 0 else error).detach())


def reseeded(wanted: Experiment) -> Experiment:
    """The same experiment from other first weights."""
    return replace(wanted, seed=wanted.seed + 1)


# The checks. Each raises AssertionError with a sentence that says what a method owes.

Check = Callable[[MethodConfig], None]


def _owes(condition: object, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def the_loss_falls_on_a_fixed_batch(method: MethodConfig) -> None:
    # Without the loop's hooks: where teachers and queues move, no loss has to fall.
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
    _owes(isinstance(state.method, Method), "build gives no selfray.method.Method")
    batch = prepared(positions(0, wanted.batch_size, wanted), wanted)
    loss, _ = state.method.train()(batch, state.progress)
    loss.backward()
    parameters = dict(state.method.named_parameters())
    unused = [name for name, p in parameters.items() if p.requires_grad and p.grad is None]
    _owes(not unused, f"an unused parameter breaks DDP: {', '.join(unused[:5])}")
    frozen = [name for name, p in parameters.items() if not p.requires_grad and p.grad is not None]
    _owes(not frozen, f"frozen, and with a gradient: {', '.join(frozen[:5])}")

    state = start(wanted)
    before = weights(state)
    train_for(state, wanted, 3)
    moved = differing(before, weights(state))
    # Teachers, which are frozen, have to move as well; what never moves is to be a buffer.
    still = [name for name in parameters if name not in moved]
    _owes(not still, f"never moves, so it is to be a buffer: {', '.join(still[:5])}")


def the_loss_and_its_metrics_are_float32_scalars(method: MethodConfig) -> None:
    wanted = experiment(method)
    (step,) = train_for(start(wanted), wanted, 1)
    _owes(
        (step.loss.shape, step.loss.dtype) == (torch.Size([]), torch.float32),
        f"the loss is {step.loss.dtype} of shape {tuple(step.loss.shape)}",
    )
    wide = [name for name, value in step.metrics.items() if value.numel() != 1]
    _owes(not wide, f"metrics that are no scalars: {', '.join(wide)}")


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
    _owes(config.loads(config.dumps(method)) == method, "its config comes back otherwise")
    run = experiment(method)
    _owes(config.loads(config.dumps(run)) == run, "its run's config comes back otherwise")


def a_resumed_run_has_the_same_weights_bit_for_bit(method: MethodConfig) -> None:
    wanted = experiment(method)
    straight = start(wanted)
    train_for(straight, wanted, 6)

    first = start(wanted)
    train_for(first, wanted, 3)
    with tempfile.TemporaryDirectory() as folder:
        run = Location.of(folder)
        checkpoint.save(first, wanted, run, loss=1.0)
        resumed = start(reseeded(wanted))  # other weights, so that all of them have to be loaded
        _owes(differing(weights(resumed), weights(first)), "the seed decides nothing")
        resumed.load_state_dict(Checkpoint.open(run).state())
    told = train_for(resumed, wanted, 3)
    _owes(told[-1].progress == straight.progress, "its progress is another one")
    others = differing(weights(resumed), weights(straight))
    _owes(not others, f"other weights after a resume: {', '.join(others[:5])}")


def the_encoder_goes_home_into_plain_timm(method: MethodConfig) -> None:
    wanted = experiment(method)
    state = start(wanted)
    train_for(state, wanted, 3)
    encoder = state.method.encoder
    _owes(isinstance(encoder, Encoder), "method.encoder is no selfray.models.encoder.Encoder")
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
            _owes("give --accumulate 1" in text, f"the refusal names no way out: {text}")
            return
        raise AssertionError("why_not_accumulate is set, and micro-batches are not refused")
    moves = []
    for accumulate in (1, 2):
        moves.append(
            first_move(experiment(method, VIT, accumulate=accumulate, optimizer=PLAIN_SGD))
        )
    for name, whole in moves[0].items():
        if torch.is_floating_point(whole):
            _owes(
                torch.allclose(moves[1][name], whole, rtol=1e-3, atol=2e-6),
                f"two micro-batches give {name} another gradient than the batch: set "
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
