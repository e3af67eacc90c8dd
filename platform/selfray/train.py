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
    """All that changes while training: the unit of checkpointing."""

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
        # A ResNet's name says so at the door; other names of timm do not.
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
        optimizer = experiment.optimizer.build(method, method.is_decayed)
        return cls(method, optimizer, Progress(0, total_images, 0))

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, also where ranks hold shares of them: then all ranks must ask."""
        return {
            "method": distributed.gathered(self.method.state_dict()),
            "optimizer": distributed.gathered(self.optimizer.state_dict()),
            "progress": vars(self.progress),
        }

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take over a saved method's weights alone: a new run from another's end, at the same image
        size or at another. ValueError where they are of another method or encoder."""
        own, encoder = self.method.state_dict(), self.method.encoder
        # What a method keeps beside its weights, such as which tokenizer it has, is its own here.
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
        """Take over a saved state. ValueError where it is of another method or encoder."""
        self._load_method(state["method"])
        group_as_saved(self.optimizer, self.method, state["optimizer"]["param_groups"])
        try:
            load_optimizer(self.optimizer, state["optimizer"])
        except (ValueError, KeyError) as error:
            raise ValueError(f"the checkpoint's optimizer does not fit: {error}") from None
        self.progress = Progress(**state["progress"])


@dataclass(frozen=True)
class Step:
    """What one optimizer step tells. Tensors stay on the device until somebody reads them."""

    progress: Progress
    loss: Tensor
    metrics: dict[str, Tensor]
    gradient_norm: Tensor
    learning_rate: float
    images: Tensor
    """float [b, 3, H, W]: the first view of the last micro-batch, for health metrics."""
    seconds: float
    waited_seconds: float
    """How much of `seconds` the trainer waited for data."""


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
            position on; images as uint8.
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
    """What forward and backward of one step leave behind, beside the gradients."""

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
    """Forward and backward of one micro-batch after the other."""
    # What is random inside a step follows from the step alone, so a resumed run needs no
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
    """Forward and backward of all micro-batches as of one."""
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
"""Between the seeds of a step's micro-batches: odd, so that no two of them are the same."""


def _for_all_ranks(method: Method) -> nn.Module:
    if not distributed.is_distributed() or shard.is_sharded(method):
        return method
    device = next(method.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    # Our batch norm keeps its statistics equal on all ranks by itself; the plain one keeps each
    # rank's own, and rank 0's are those that are saved.
    return DistributedDataParallel(method, device_ids=ids, broadcast_buffers=False)


def _without_sync(model: nn.Module, skip: bool) -> contextlib.AbstractContextManager[Any]:
    if shard.is_sharded(model):
        shard.sync(model, not skip)
    if skip and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def _prepare(batch: Batch, experiment: Experiment) -> Batch:
    """Finish a batch's views on the device where the data tasks have not, and normalise them:
    uint8 -> float32."""
    prepared: Batch = {}
    for name, values in batch.items():
        if name.endswith(PARAMETERS_SUFFIX):
            continue
        if name in experiment.views:
            rows = batch.get(name + PARAMETERS_SUFFIX)
            if rows is not None:
                values = recolour(values, rows, experiment.views[name])
            values = normalize(values, *experiment.data.normalization)
        prepared[name] = values
    return prepared


def _first_view(batch: Batch) -> Tensor:
    return cast(Tensor, batch["global"])[:, 0]


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 4_099 + rank
