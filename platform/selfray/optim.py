"""Optimizers, parameter groups, gradient clipping, and settings that follow the schedules."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from selfray import distributed
from selfray.check import require, require_one_of
from selfray.schedules import Constant, Progress, Schedule, Steps, WarmupCosine

IsDecayed = Callable[[str, Tensor], bool]
"""(a parameter's name in the method, the parameter) -> whether weight decay applies to it."""


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """AdamW, SGD with momentum, or LARS (layer-wise adaptive rates, for large batches)."""
    base_learning_rate: float = 1.5e-4
    """Learning rate from which `scaling` computes the peak learning rate."""
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How the peak learning rate depends on the batch size B. linear: base * B / 256; sqrt: base *
    sqrt(B), SimCLR's rule for short runs; none: base."""
    schedule: WarmupCosine | Steps = field(default_factory=WarmupCosine)
    """Factor on the peak learning rate over the run."""
    weight_decay: Schedule = field(default_factory=lambda: Constant(0.05))
    """Weight decay over the run. It applies to the parameters that the method's authors decay:
    mostly all but biases and norms; with LARS only to matrices."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's running mean and of its square's."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    trust_coefficient: float = 0.001
    """LARS's eta: the norm of a matrix's step relative to the matrix, at learning rate 1."""
    clip_norm: float | None = None
    """Largest norm of a gradient; None for no clipping."""
    clip_each: Literal["all", "module", "parameter"] = "all"
    """What is clipped to that norm: all gradients together, each of the method's modules (DINOv2),
    or each parameter (DINO)."""
    layer_decay: float = 1.0
    """Ratio of a ViT block's learning rate to that of the block above (DINOv2); 1 for one rate."""
    patch_embed_rate: float = 1.0
    """Factor on the learning rate of a ViT's patch embedding (DINOv2)."""

    def __post_init__(self) -> None:
        require_one_of("optimizer.name", self.name, ("adamw", "sgd", "lars"))
        require_one_of("optimizer.scaling", self.scaling, ("linear", "sqrt", "none"))
        require(
            self.base_learning_rate > 0,
            f"optimizer.base_learning_rate must be positive, got {self.base_learning_rate}",
        )
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimizer.clip_norm must be positive, got {self.clip_norm}",
        )
        require_one_of("optimizer.clip_each", self.clip_each, ("all", "module", "parameter"))
        require(
            0 < self.layer_decay <= 1,
            f"optimizer.layer_decay must lie in (0, 1], got {self.layer_decay}",
        )
        require(
            self.patch_embed_rate >= 0,
            f"optimizer.patch_embed_rate must be at least 0, got {self.patch_embed_rate}",
        )
        require(
            0 <= self.momentum < 1, f"optimizer.momentum must lie in [0, 1), got {self.momentum}"
        )

    def peak_learning_rate(self, batch_size: int) -> float:
        factor = {"linear": batch_size / 256, "sqrt": batch_size**0.5, "none": 1.0}[self.scaling]
        return self.base_learning_rate * factor

    def build(
        self,
        module: nn.Module,
        is_decayed: IsDecayed | None = None,
        rate_of: Callable[[str], float] = lambda name: 1.0,
    ) -> Optimizer:
        """The optimizer of a module's trainable parameters; `is_decayed` and `rate_of` come
        from the method."""
        if self.name == "lars":
            is_decayed = None  # LARS in SimCLR and MoCo v3 never decays vectors
        rates = self.layer_decay, self.patch_embed_rate
        groups = parameter_groups(module, *rates, is_decayed, rate_of)
        # On a GPU one kernel updates all weights. None lets torch choose: no fusing on a CPU.
        fused = True if next(module.parameters()).is_cuda else None
        if self.name == "adamw":
            return AdamW(groups, lr=0.0, betas=self.betas, fused=fused)
        if self.name == "sgd":
            return SGD(groups, lr=0.0, momentum=self.momentum, fused=fused)
        return LARS(groups, momentum=self.momentum, trust_coefficient=self.trust_coefficient)


def parameter_groups(
    module: nn.Module,
    layer_decay: float = 1.0,
    patch_embed_rate: float = 1.0,
    is_decayed: IsDecayed | None = None,
    rate_of: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """The trainable parameters in groups for an optimizer.

    A group has `is_vector` (biases, norms, tokens: without LARS adaptation), `decays` (whether
    weight decay applies; without `is_decayed`, to all but vectors) and `rate` (the factor on the
    learning rate).
    """
    blocks = [int(found[1]) for name, _ in module.named_parameters() if (found := _block_of(name))]
    groups: dict[tuple[bool, bool, float], list[Tensor]] = {
        (False, True, 1.0): [],
        (True, False, 1.0): [],
    }
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_vector = is_vector_like(parameter)
        decays = not is_vector if is_decayed is None else is_decayed(name, parameter)
        rate = layer_decay ** _layers_above(name, 1 + max(blocks, default=-1)) * rate_of(name)
        if ".patch_embed." in name:
            rate *= patch_embed_rate
        groups.setdefault((is_vector, decays, rate), []).append(parameter)
    return [
        {"params": parameters, "is_vector": is_vector, "decays": decays, "rate": rate}
        for (is_vector, decays, rate), parameters in groups.items()
    ]


def is_vector_like(parameter: Tensor) -> bool:
    """Whether a parameter has at most one axis longer than 1."""
    return max(parameter.shape, default=1) == parameter.numel()


def group_as_saved(
    optimizer: Optimizer, module: nn.Module, saved: Sequence[Mapping[str, Any]]
) -> None:
    """Regroup an optimizer's parameters as in a checkpoint's `saved` groups, so that it loads.

    The first version of selfray decayed all but vectors in every method, and its groups have no
    `decays`. A run of that version continues in the same way: its vectors are not decayed.
    """
    if all("decays" in group for group in saved):
        return
    settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups: dict[tuple[bool, float], list[Tensor]] = {(False, 1.0): [], (True, 1.0): []}
    for parameter in module.parameters():
        own = settings.get(id(parameter))
        if own is not None:
            groups.setdefault((own["is_vector"], own["rate"]), []).append(parameter)
    options = {
        name: value
        for name, value in optimizer.param_groups[0].items()
        if name not in ("params", "is_vector", "decays", "rate")
    }
    optimizer.param_groups[:] = [
        {"params": parameters, "is_vector": is_vector, "rate": rate, **options}
        for (is_vector, rate), parameters in groups.items()
    ]


def _block_of(name: str) -> re.Match[str] | None:
    return re.search(r"\.backbone\.blocks\.(\d+)\.", name)


_INPUT = re.compile(r"(\.backbone\.(patch_embed|pos_embed|cls_token|reg_token)|^mask_token)\b")


def _layers_above(name: str, depth: int) -> int:
    """The number of a ViT's layers above a parameter: 0 for its last norm and for heads, 1 for its
    last block, depth + 1 for its patch embedding, tokens and positions."""
    block = _block_of(name)
    if block is not None:
        return depth - int(block[1])
    return depth + 1 if _INPUT.search(name) else 0


def follow_schedules(optimizer: Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Write this step's learning rate and weight decay into the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]
        # Groups of the first version have no `decays`: see group_as_saved.
        decays = group.get("decays", not group["is_vector"])
        group["weight_decay"] = weight_decay if decays else 0.0


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load a saved state, except for settings of how a device computes the update (such as fused
    kernels), which the optimizer keeps. Raises ValueError or KeyError if the state does not fit."""
    own = optimizer.param_groups
    if len(own) != len(saved["param_groups"]):
        raise ValueError(f"it has {len(saved['param_groups'])} groups, not {len(own)}")
    groups = [
        theirs | {name: ours[name] for name in HOW_COMPUTED if name in ours}
        for ours, theirs in zip(own, saved["param_groups"], strict=True)
    ]
    parameters = [parameter for group in own for parameter in group["params"]]
    state = {
        place: {
            name: distributed.shared_out(values, parameters[place])
            if isinstance(values, Tensor)
            else values
            for name, values in of_one.items()
        }
        for place, of_one in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


HOW_COMPUTED = ("foreach", "fused", "capturable")
"""Settings of torch's optimizers that change results only by rounding."""


def hold_encoder(module: nn.Module) -> None:
    """Freeze the encoder for this step while the heads learn. Without a gradient, an optimizer
    neither moves nor decays a parameter, and does not update its state."""
    for name, parameter in module.named_parameters():
        if ".backbone." in name:
            parameter.grad = None


def clip_gradients(module: nn.Module, settings: OptimizerConfig) -> Tensor:
    """Clip gradients in place and return the norm of all gradients together, before clipping: a
    scalar."""
    if settings.clip_norm is None or settings.clip_each == "all":
        norm = nn.utils.clip_grad_norm_(module.parameters(), settings.clip_norm or float("inf"))
        return distributed.whole(norm)
    if settings.clip_each == "module":
        # Parameters outside of submodules, such as a mask token, form one more part.
        parts = [list(child.parameters()) for child in module.children()]
        parts.append(list(module.parameters(recurse=False)))
        parts = [part for part in parts if any(p.grad is not None for p in part)]
        norms = [nn.utils.clip_grad_norm_(part, settings.clip_norm) for part in parts]
    else:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norms = list(torch._foreach_norm(gradients))
        factors = [(settings.clip_norm / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
        torch._foreach_mul_(gradients, factors)
    return torch.stack([distributed.whole(norm) for norm in norms]).norm()


def learning_rate_at(config: OptimizerConfig, batch_size: int, progress: Progress) -> float:
    return config.peak_learning_rate(batch_size) * config.schedule(progress)


class LARS(Optimizer):
    """SGD with momentum whose step for each matrix is scaled by |w| / |gradient|.

    You et al., "Large Batch Training of Convolutional Networks", arXiv:1708.03888, in SimCLR's
    form: weight decay is added to the gradient before the ratio is taken; vectors are not scaled.
    """

    def __init__(
        self, params: Iterable[Any], momentum: float = 0.9, trust_coefficient: float = 0.001
    ) -> None:
        defaults = {
            "lr": 0.0,
            "weight_decay": 0.0,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
            "is_vector": False,
            "decays": True,
            "rate": 1.0,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [cast(Tensor, p.grad) for p in parameters]
            updates = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
            if not group["is_vector"]:
                ratios = _trust_ratios(parameters, updates, group["trust_coefficient"])
                torch._foreach_mul_(updates, ratios)
            velocities = [self._velocity(p) for p in parameters]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, updates)
            torch._foreach_add_(parameters, velocities, alpha=-group["lr"])

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _trust_ratios(
    parameters: list[Tensor], updates: tuple[Tensor, ...], coefficient: float
) -> list[Tensor]:
    """coefficient * |w| / |update| of each parameter, as scalars on its device; 1 if a norm is
    zero.
    """
    weights, steps = torch._foreach_norm(parameters), torch._foreach_norm(updates)
    return [
        torch.where((weight > 0) & (step > 0), coefficient * weight / step, 1.0)
        for weight, step in zip(weights, steps, strict=True)
    ]
