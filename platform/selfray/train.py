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
from selfray.method import Batch, Method
from selfray.models.encoder import normalize
from selfray.models.vit import fit_positions
from selfray.optim import (
    clip_gradients,
    follow_schedules,
    group_as_saved,
    hold_encoder,
    learning_rate_at,
)
from selfray.pixels.augment import PARAMETERS_SUFFIX
from selfray.pixels.device import recolour
from selfray.schedules import Progress


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
        if experiment.accumulate > 1 and any(isinstance(m, _BatchNorm) for m in encoder.modules()):
            raise ValueError(
                f"accumulate {experiment.accumulate}: the batch norms of {experiment.encoder.name} "
                "would see micro-batches; give --accumulate 1 and more --workers"
            )
        method = experiment.method.build(encoder).to(device)
        if experiment.encoder.is_resnet:
            # Convolutions run about twice as fast with the channels innermost, on CPUs and GPUs.
            method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = experiment.optimizer.build(method, method.is_decayed)
        return cls(method, optimizer, Progress(0, total_images, 0))

    def state_dict(self) -> dict[str, Any]:
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
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
            self.optimizer.load_state_dict(state["optimizer"])
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
    method, optimizer, settings = state.method, state.optimizer, experiment.optimizer
    model = _for_all_ranks(method)
    method.train()
    while not state.progress.finished:
        progress, started, waited = state.progress, time.perf_counter(), 0.0
        learning_rate = learning_rate_at(settings, experiment.batch_size, progress)
        follow_schedules(optimizer, learning_rate, settings.weight_decay(progress))
        # What is random inside a step follows from the step alone, so a resumed run needs no
        # generator state and repeats it bit for bit.
        torch.manual_seed(_step_seed(experiment.seed, progress.step, distributed.rank()))

        losses: list[Tensor] = []
        for micro_batch in range(experiment.accumulate):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            batch = _prepare(batch, experiment, device)
            is_last = micro_batch == experiment.accumulate - 1
            with _without_sync(model, not is_last), _autocast(experiment.precision, device):
                loss, metrics = model(batch, progress)
            (loss / experiment.accumulate).backward()
            losses.append(loss.detach())

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
                torch.stack(losses).mean(),
                metrics,
                gradient_norm,
                learning_rate,
                _first_view(batch),
                time.perf_counter() - started,
                waited,
            )
        )


def _for_all_ranks(method: Method) -> nn.Module:
    if not distributed.is_distributed():
        return method
    device = next(method.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    # Our batch norm keeps its statistics equal on all ranks by itself; the plain one keeps each
    # rank's own, and rank 0's are those that are saved.
    return DistributedDataParallel(method, device_ids=ids, broadcast_buffers=False)


def _without_sync(model: nn.Module, skip: bool) -> contextlib.AbstractContextManager[Any]:
    if skip and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _prepare(batch: Batch, experiment: Experiment, device: torch.device) -> Batch:
    """Move a batch to the device, finish its views there where the data tasks have not, and
    normalise them: uint8 -> float32."""
    batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
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
