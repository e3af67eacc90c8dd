"""The contract of a pretraining method: MethodConfig holds settings and views, Method the loss."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from selfray.check import require
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.pixels.augment import MASK_SUFFIX
from selfray.schedules import Progress
from selfray.views import View, Views

if TYPE_CHECKING:
    from PIL.Image import Image

Batch = dict[str, Tensor]
"""Views as float [B, V, 3, H, W] under their group's name; their masks as bool [B, V, N] under
`<group>_mask`; `label` int64 [B] if there are labels (a method must not use them)."""

HIDDEN_SUFFIX = "_hidden"
"""`<group>_hidden`, int64 [M]: the indices of the hidden patches in the flattened mask, if the host
has computed them."""


Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, std) of each channel, in 0..1, by which a method's images are normalised."""


@dataclass(frozen=True)
class MethodConfig(ABC):
    """The hyper-parameters of a method, and the views that it needs."""

    why_not_accumulate: ClassVar[str | None] = None
    """Why summing the gradients of micro-batches would change this loss; None if it does not."""

    compares: ClassVar[bool] = False
    """Whether the method is a ComparingMethod: micro-batches are embedded one by one and compared
    together."""

    judged_by: ClassVar[Literal["knn", "linear"]] = "knn"
    """The probe by which encoders of this method are ranked."""

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def check_batch_size(self, batch_size: int) -> None:  # noqa: B027 - most methods take any
        """Raises ValueError for a global batch size that the method cannot use."""

    def provenance(self, encoder: EncoderConfig, normalization: Normalization) -> Mapping[str, str]:
        """Tags that name other inputs than the images, such as a tokenizer. Called before a run
        starts; raises ValueError or FileNotFoundError if such an input is missing or does not fit.
        """
        return {}

    def located(self) -> "MethodConfig":
        """The same config with absolute paths: a worker's current folder is not its driver's."""
        return self

    @abstractmethod
    def views(self, encoder: EncoderConfig) -> Views:
        """The views of each image. Raises ValueError for an encoder that the method cannot use."""

    @abstractmethod
    def build(self, encoder: Encoder) -> "Method":
        """The module to train."""


class Method(nn.Module, ABC):
    """A pretraining method as a module whose forward is its loss, so that DDP and FSDP wrap it.

    Frozen parameters are teachers and must change; fixed targets must be buffers; every trainable
    parameter must get a gradient in every step.
    """

    encoder: Encoder
    """The encoder that is probed and exported: in self-distillation the teacher's."""

    @abstractmethod
    def forward(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics): this rank's mean loss over its micro-batch, and scalars to show.

        Metrics read by the collapse guard: `projection_std` (`health.deviation`) if equal
        projections of all images would minimise the loss, `below_chance` for contrastive losses,
        `below_uniform` for teachers over prototypes.
        """

    def is_decayed(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies to a trainable parameter, given its name in this module. By
        default it applies to all but vectors, which are biases, norms and tokens (SimCLR, BYOL)."""
        return max(parameter.shape, default=1) < parameter.numel()

    def rate_of(self, name: str) -> float:
        """Factor on the learning rate of a trainable parameter, by its name in this module."""
        return 1.0

    def before_step(self, progress: Progress) -> None:
        """Called when the gradients are complete, before the optimizer's step."""

    def after_step(self, progress: Progress) -> None:
        """Called after the optimizer's step: updates teachers and queues."""

    def pictures(
        self, images: np.ndarray, views: Views, normalization: Normalization
    ) -> Mapping[str, "Image"]:
        """Pictures specific to this method, by file name without suffix.

        Called on a CPU in eval mode. `images` are test images, uint8 [n, 3, H, W]; `views` are the
        method's views.
        """
        return {}


Embedded = dict[str, Tensor]
"""Outputs of the networks for a micro-batch; rows of all micro-batches are concatenated."""


class ComparingMethod(Method):
    """A method whose loss compares the images of the whole batch. Its forward has two parts:
    `embed` and `targets` process each image by itself; `compare` computes the loss of all outputs.

    Gradients are cached between the two, so a step can process a batch in micro-batches with the
    loss and the gradients of the whole batch (selfray.step.gradient_cache).
    """

    @abstractmethod
    def embed(self, batch: Batch, progress: Progress) -> Embedded:
        """The trained encoder's features of a micro-batch. Each row depends on its own image only,
        except through an encoder's batch norms."""

    def targets(self, batch: Batch, progress: Progress) -> Embedded:
        """Outputs without gradient, such as a teacher's features; called under no_grad."""
        return {}

    @abstractmethod
    def compare(
        self, embedded: Embedded, targets: Embedded, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of this rank's whole batch. Heads run here; they may have batch norms."""

    def forward(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            targets = self.targets(batch, progress)
        return self.compare(self.embed(batch, progress), targets, progress)


def of_both_views(encoder: Encoder, batch: Batch, order: Sequence[str]) -> Embedded:
    """Features [b, D] of the two global views of each image, `first` and `second`, in an order. One
    view after the other: batch norm must not mix their statistics."""
    first, second = batch["global"].unbind(1)  # [b, 3, H, W] each
    views = {"first": first, "second": second}
    return {name: encoder(views[name]).cls for name in order}


def hidden_places(batch: Batch, group: str) -> Tensor:
    """Indices int64 [M], into B * V * N patches, of those that a group's masks hide."""
    places = batch.get(group + HIDDEN_SUFFIX)
    if places is None:  # on a GPU, nonzero would make the host wait
        places = batch[group + MASK_SUFFIX].flatten().nonzero().squeeze(1)
    return places


def fitted(view: View, encoder: EncoderConfig, name: str = "a view's size", **changes: Any) -> View:
    """A view whose missing size and patch grid are filled in from the encoder. Raises ValueError
    for a size that the encoder cannot take."""
    size = view.size or encoder.image_size
    require(
        not encoder.is_vit or size % encoder.patch == 0,
        f"{name} {size} is not a multiple of the encoder's patch size of {encoder.patch} pixels: "
        "give a multiple",
    )
    require(
        not encoder.is_beit or size == encoder.image_size,
        f"{name} {size} is not encoder.image_size {encoder.image_size}, but the relative positions "
        f"of {encoder.name} are for one size: leave it out, or give another --encoder.name",
    )
    grid = size // encoder.patch if encoder.is_vit else None
    return replace(view, size=size, grid=grid, **changes)


def whole(view: View, encoder: EncoderConfig, **changes: Any) -> View:
    """`fitted`, for methods whose views must have the encoder's image size. Raises ValueError for
    any other size."""
    require(
        view.size in (None, encoder.image_size),
        f"method.view.size {view.size} is not encoder.image_size {encoder.image_size}: leave it "
        "out",
    )
    return fitted(view, encoder, **changes)


Module = TypeVar("Module", bound=nn.Module)


def teacher_of(student: Module) -> Module:
    """A frozen copy of the student, to be updated by `follow`. Stochastic depth is off in it: it
    regularises the student, but in a target it would only add noise."""
    from timm.layers import DropPath

    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return teacher


def as_constants(module: nn.Module) -> None:
    """Turn all tensors of a module into non-persistent buffers: they are fixed, they are not saved
    in checkpoints, and they move to a device with the module."""
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
