"""The contract of a pretraining method: MethodConfig declares, Method computes."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from selfray.check import require
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.pixels.augment import MASK_SUFFIX
from selfray.schedules import Progress
from selfray.views import View, Views

if TYPE_CHECKING:
    from PIL.Image import Image

Batch = dict[str, Tensor]
"""Views as float [B, V, 3, H, W] under their group's name, their masks as bool [B, V, N] under
`<group>_mask`, `label` int64 [B] where there are labels (never for a method's eyes)."""

HIDDEN_SUFFIX = "_hidden"
"""`<group>_hidden`, int64 [M]: the places of the hidden patches in the flattened mask, where the
host has counted them."""


Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, std) by channel, in 0..1: how the images that a method sees are normalised."""


@dataclass(frozen=True)
class MethodConfig(ABC):
    """The hyper-parameters of a method, and what it asks to see."""

    why_not_accumulate: ClassVar[str | None] = None
    """Why summing the gradients of micro-batches would change this loss; None where it does not."""

    compares: ClassVar[bool] = False
    """Whether its method is a ComparingMethod: micro-batches are embedded one by one and compared
    together."""

    judged_by: ClassVar[Literal["knn", "linear"]] = "knn"
    """The probe that tells how good this method's encoder is."""

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def check_batch_size(self, batch_size: int) -> None:  # noqa: B027 - most methods take any
        """Raises ValueError for a global batch size that the method cannot use."""

    def provenance(self, encoder: EncoderConfig, normalization: Normalization) -> Mapping[str, str]:
        """Tags that name what the method reads besides the images, such as a tokenizer. ValueError
        or FileNotFoundError where that is missing or does not fit; asked before a run starts."""
        return {}

    def located(self) -> "MethodConfig":
        """The same with absolute paths: a worker has another current folder than its driver."""
        return self

    @abstractmethod
    def views(self, encoder: EncoderConfig) -> Views:
        """The views of each image. Raises ValueError for an encoder that the method cannot use."""

    @abstractmethod
    def build(self, encoder: Encoder) -> "Method":
        """The module that is trained."""


class Method(nn.Module, ABC):
    """A pretraining method as a module whose forward is its loss, so that DDP and FSDP wrap it.

    Frozen parameters are teachers and must move; fixed targets are buffers; every trainable
    parameter gets a gradient in every step.
    """

    encoder: Encoder
    """What probes and users receive: the teacher's in self-distillation, else the trained one."""

    @abstractmethod
    def forward(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics): the rank's mean loss over its micro-batch, and scalars to show.

        Where equal projections of all images would win, `projection_std` tells the collapse guard
        their `health.deviation`; a contrastive loss tells `health.below_chance`, a teacher of
        prototypes `health.below_uniform`.
        """

    def is_decayed(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies to a trainable parameter, by its name in this module. By
        default to all but vectors: biases, norms and tokens (SimCLR, BYOL)."""
        return max(parameter.shape, default=1) < parameter.numel()

    def rate_of(self, name: str) -> float:
        """Factor on the learning rate of a trainable parameter, by its name in this module."""
        return 1.0

    def before_step(self, progress: Progress) -> None:
        """Called when gradients are complete, before the optimizer moves."""

    def after_step(self, progress: Progress) -> None:
        """Called when the optimizer has moved: teachers follow, queues move."""

    def pictures(
        self, images: np.ndarray, views: Views, normalization: Normalization
    ) -> Mapping[str, "Image"]:
        """What only this method can show, by file name without suffix; called on a CPU, in eval
        mode. `images` are test images, uint8 [n, 3, H, W]; `views` what the method asks to see."""
        return {}


Embedded = dict[str, Tensor]
"""What networks say of a micro-batch; the rows of all micro-batches are put one after another."""


class ComparingMethod(Method):
    """A method whose loss compares the images of the whole batch. Its forward has two parts:
    networks that see each image by itself, and what compares what they say of all.

    Between the two the gradient is cached, so that a step may take a batch in micro-batches and
    have the loss and the gradients of the whole (selfray.step.gradient_cache).
    """

    @abstractmethod
    def embed(self, batch: Batch, progress: Progress) -> Embedded:
        """The trained encoder's features of a micro-batch: its rows depend on no other image, but
        for an encoder's batch norms."""

    def targets(self, batch: Batch, progress: Progress) -> Embedded:
        """What needs no gradient, such as a teacher's features; called under no_grad."""
        return {}

    @abstractmethod
    def compare(
        self, embedded: Embedded, targets: Embedded, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of the rank's whole batch, through heads, which may have batch norms."""

    def forward(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            targets = self.targets(batch, progress)
        return self.compare(self.embed(batch, progress), targets, progress)


def hidden_places(batch: Batch, group: str) -> Tensor:
    """The places int64 [M] of the patches that a group's masks hide, among all [B * V * N]."""
    places = batch.get(group + HIDDEN_SUFFIX)
    if places is None:  # on a GPU, counting them would wait for it
        places = batch[group + MASK_SUFFIX].flatten().nonzero().squeeze(1)
    return places


def fitted(view: View, encoder: EncoderConfig, name: str = "a view's size", **changes: Any) -> View:
    """A view with its size and patch grid filled in from the encoder where it has none. ValueError
    for a size that the encoder cannot take."""
    size = view.size or encoder.image_size
    require(
        not encoder.is_vit or size % encoder.patch == 0,
        f"{name} {size} is no multiple of the encoder's patches of {encoder.patch} pixels: give "
        "another",
    )
    require(
        not encoder.is_beit or size == encoder.image_size,
        f"{name} {size} is not encoder.image_size {encoder.image_size}, and the relative positions "
        f"of {encoder.name} are for one size: leave it out, or give another --encoder.name",
    )
    grid = size // encoder.patch if encoder.is_vit else None
    return replace(view, size=size, grid=grid, **changes)


def whole(view: View, encoder: EncoderConfig, **changes: Any) -> View:
    """A view, fitted, for methods that need all of the encoder's patches in it."""
    require(
        view.size in (None, encoder.image_size),
        f"method.view.size {view.size} is not encoder.image_size {encoder.image_size}: leave it "
        "out",
    )
    return fitted(view, encoder, **changes)


Module = TypeVar("Module", bound=nn.Module)


def teacher_of(student: Module) -> Module:
    """A frozen copy, which is to follow the student. It skips no block: stochastic depth is there
    to regularise the student, and a target that skips some would be noise."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return teacher


def as_constants(module: nn.Module) -> None:
    """Turn all tensors of a module into buffers that no checkpoint holds: they are fixed, and move
    to a device with the rest."""
    for part in module.modules():
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in tensors:
            delattr(part, name)
            part.register_buffer(name, tensor.detach(), persistent=False)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, for every parameter. Buffers, such
    as the running statistics of batch norms, stay the teacher's own."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
