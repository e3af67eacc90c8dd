"""TrainState and the loop: the order of events of every run, in one place."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from selfray import distributed
from selfray.experiment import Experiment
from selfray.method import Batch, ComparingMethod, Method
from selfray.models.encoder import normalize
from selfray.models.vit import fit_positions
from selfray.optim import (
    clip_gradients,
    follow_schedules,
    group_as_saved,
    hold_encoder,
    learning_rate_at,
    load_optimizer,
)
from selfray.pixels.augment import PARAMETERS_SUFFIX
from selfray.pixels.device import recolour
from selfray.schedules import Progress
from selfray.step import compiled, devices, gradient_cache, memory, shard


@dataclass
class TrainState:
    """Everything that changes during training; a checkpoint saves exactly this."""

    method: Method
    optimizer: Optimizer
    progress: Progress

    @classmethod
    def start(
        cls, experiment: Experiment, total_images: int, device: torch.device | str = "cpu"
    ) -> "TrainState":
        """The state before the first step, the same for the same seed on every rank."""
        torch.manual_seed(experiment.seed)
        encoder = experiment.encoder.build()
        # Experiment refuses ResNets; other timm encoders show their batch norms only once built.
        has_norms = any(isinstance(module, _BatchNorm) for module in encoder.modules())
        if experiment.accumulate > 1 and has_norms and experiment.encoder.norm == "batch":
            raise ValueError(
                f"accumulate {experiment.accumulate}: the batch norms of {experiment.encoder.name} "
                "would see micro-batches; give --accumulate 1 and more --workers, or "
                "--encoder.norm ghost"
            )
        method = experiment.method.build(encoder).to(device)
        if experiment.encoder.is_resnet:
            # Convolutions run about twice as fast with the channels innermost, on CPUs and GPUs.
            method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if experiment.shard == "fsdp":
            shard.in_place(method, experiment.precision)
        optimizer = experiment.optimizer.build(method, method.is_decayed, method.rate_of)
        return cls(method, optimizer, Progress(0, total_images, 0))

    def state_dict(self) -> dict[str, Any]:
        """The state with full tensors. Collective if tensors are sharded: every rank must call
        it."""
        return {
            "method": distributed.gathered(self.method.state_dict()),
            "optimizer": distributed.gathered(self.optimizer.state_dict()),
            "progress": vars(self.progress),
        }

    def load_weights(self, state: dict[str, Any]) -> None:
        """Load only the weights of a saved method, to start a new run from the end of another, at
        the same or a different image size. Raises ValueError if they do not fit this method or
        encoder."""
        own, encoder = self.method.state_dict(), self.method.encoder
        # Extra state beside the weights, such as which tokenizer is used, stays this method's own.
        extra = {name: value for name, value in own.items() if name.endswith("_extra_state")}
        weights = state["method"] | extra
        if encoder.config.is_vit:
            weights = fit_positions(weights, own, encoder.backbone)
        self._load_method(weights)

    def _load_method(self, weights: dict[str, Tensor]) -> None:
        own = self.method.state_dict()
        weights = {
            name: distributed.shared_out(values, own[name]) if name in own else values
            for name, values in weights.items()
        }
        try:
            self.method.load_state_dict(weights)
        except RuntimeError as error:
            last = str(error).splitlines()[-1].strip()
            raise ValueError(
                f"the checkpoint does not fit {type(self.method).__name__}: {last}"
            ) from None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state. Raises ValueError if it does not fit this method or encoder."""
        self._load_method(state["method"])
        group_as_saved(self.optimizer, self.method, state["optimizer"]["param_groups"])
        try:
            load_optimizer(self.optimizer, state["optimizer"])
        except (ValueError, KeyError) as error:
            raise ValueError(f"the checkpoint's optimizer does not fit: {error}") from None
        self.progress = Progress(**state["progress"])


@dataclass(frozen=True)
class Step:
    """Results of one optimizer step. Tensors stay on the device until they are read."""

    progress: Progress
    loss: Tensor
    metrics: dict[str, Tensor]
    gradient_norm: Tensor
    learning_rate: float
    images: Tensor
    """float [b, 3, H, W]: the first view of the last micro-batch, for health metrics."""
    seconds: float
    waited_seconds: float
    """The part of `seconds` spent waiting for data."""


def train(
    state: TrainState,
    batches: Iterator[Batch],
    experiment: Experiment,
    on_step: Callable[[Step], None],
    device: torch.device | str = "cpu",
) -> None:
    """Train until the state's progress is finished, or until on_step raises.

    Args:
        batches: this rank's micro-batches, `experiment.accumulate` for each step, from the state's
            position on; views as uint8 [b, V, 3, H, W].
        on_step: called after each optimizer step on every rank.
    """
    device = torch.device(device)
    devices.settle(device, experiment.precision)
    method, optimizer, settings = state.method, state.optimizer, experiment.optimizer
    if experiment.compile:
        compiled.in_place(method, device)
    backward = _cached if experiment.caches_gradients else _summed
    model = method if experiment.caches_gradients else _for_all_ranks(method)
    method.train()
    arriving = devices.on_device(batches, device)
    with contextlib.closing(arriving), memory.explained(experiment, device):
        while not state.progress.finished:
            progress, started = state.progress, time.perf_counter()
            learning_rate = learning_rate_at(settings, experiment.batch_size, progress)
            follow_schedules(optimizer, learning_rate, settings.weight_decay(progress))

            done = backward(model, arriving, experiment, progress, device)

            if progress.fraction < experiment.warm_up_head:
                hold_encoder(method)
            gradient_norm = clip_gradients(method, settings)
            method.before_step(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.progress = progress.advance(experiment.batch_size)
            method.after_step(progress)
            on_step(
                Step(
                    state.progress,
                    done.loss,
                    done.metrics,
                    gradient_norm,
                    learning_rate,
                    done.images,
                    time.perf_counter() - started,
                    done.waited_seconds,
                )
            )


@dataclass(frozen=True)
class Done:
    """Results of forward and backward of one step, beside the gradients; fields as in Step."""

    loss: Tensor
    metrics: dict[str, Tensor]
    images: Tensor
    waited_seconds: float


def _summed(
    model: nn.Module,
    batches: Iterator[Batch],
    experiment: Experiment,
    progress: Progress,
    device: torch.device,
) -> Done:
    """Forward and backward of the micro-batches one by one; gradients add up."""
    # Randomness inside a step follows from the step's number alone, so a resumed run needs no
    # generator state and repeats it bit for bit.
    torch.manual_seed(_step_seed(experiment.seed, progress.step, distributed.rank()))
    losses, metrics, waited, batch = [], {}, 0.0, {}
    for micro_batch in range(experiment.accumulate):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        batch = _prepare(batch, experiment)
        is_last = micro_batch == experiment.accumulate - 1
        with _without_sync(model, not is_last), devices.autocast(experiment.precision, device):
            loss, metrics = model(batch, progress)
        (loss / experiment.accumulate).backward()
        losses.append(loss.detach())
    return Done(torch.stack(losses).mean(), metrics, _first_view(batch), waited)


def _cached(
    model: nn.Module,
    batches: Iterator[Batch],
    experiment: Experiment,
    progress: Progress,
    device: torch.device,
) -> Done:
    """Forward and backward of all micro-batches with the loss of the whole batch."""
    asked = time.perf_counter()
    step_batches = [next(batches) for _ in range(experiment.accumulate)]
    waited = time.perf_counter() - asked
    first = _step_seed(experiment.seed, progress.step, distributed.rank())
    loss, metrics = gradient_cache.backward(
        cast(ComparingMethod, model),
        step_batches,
        progress,
        seed=lambda number: torch.manual_seed((first + number * SEED_STRIDE) % 2**64),
        prepare=lambda batch: _prepare(batch, experiment),
        autocast=lambda: devices.autocast(experiment.precision, device),
    )
    if not shard.is_sharded(model):
        distributed.average_gradients(model.parameters())
    return Done(loss, metrics, _first_view(_prepare(step_batches[-1], experiment)), waited)


SEED_STRIDE = 0x9E3779B97F4A7C15
"""Distance between the seeds of a step's micro-batches: odd, so that no two seeds are equal."""


def _for_all_ranks(method: Method) -> nn.Module:
    if not distributed.is_distributed() or shard.is_sharded(method):
        return method
    device = next(method.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    # GlobalBatchNorm has equal statistics on all ranks already; plain batch norms keep each rank's
    # own, and checkpoints hold those of rank 0.
    return DistributedDataParallel(method, device_ids=ids, broadcast_buffers=False)


def _without_sync(model: nn.Module, skip: bool) -> contextlib.AbstractContextManager[Any]:
    if shard.is_sharded(model):
        shard.sync(model, not skip)
    if skip and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def _prepare(batch: Batch, experiment: Experiment) -> Batch:
    """Finish a batch on the device: apply photometric operations that the data tasks left out, and
    normalise views from uint8 to float32 [b, V, 3, H, W]."""
    prepared: Batch = {}
    for name, values in batch.items():
        if name.endswith(PARAMETERS_SUFFIX):
            continue
        if name in experiment.views:
            rows = batch.get(name + PARAMETERS_SUFFIX)
            if rows is not None:
                values = recolour(values, rows, experiment.views[name])
            values = normalize(values, experiment.data.mean, experiment.data.std)
        prepared[name] = values
    return prepared


def _first_view(batch: Batch) -> Tensor:
    return cast(Tensor, batch["global"])[:, 0]


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 4_099 + rank
