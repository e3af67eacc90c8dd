"""EncoderConfig and Encoder: a timm backbone that answers with Features."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from selfray import distributed
from selfray.check import require, require_one_of
from selfray.config import added
from selfray.models import names, resnet, vit
from selfray.views import MOST_CHANNELS


class Features(NamedTuple):
    """The one output of every encoder."""

    cls: Tensor
    """[B, D]: the image's feature: the class token, or the pooled map."""
    patches: Tensor
    """[B, N, D]: a feature for each patch (under a mask: for each visible one)."""


Position = Literal["learned", "sincos", "relative", "relative_each", "rotary"]


@dataclass(frozen=True)
class EncoderConfig:
    """A timm backbone by name, with the few changes that pretraining needs.

    Fields left at None keep timm's own value.
    """

    name: str = "vit_small_patch16_224"
    """Name of a timm model that is like a ViT or a ResNet."""
    image_size: int = 224
    """Side of the square images in pixels."""
    patch_size: int | None = None
    """Side of a ViT's patches in pixels; None keeps the one in the name."""
    width: int | None = None
    """A ViT's embedding dimension."""
    depth: int | None = None
    """A ViT's number of blocks."""
    heads: int | None = None
    """A ViT's number of attention heads."""
    position: Position = "learned"
    """A ViT's position embedding; `sincos` is fixed (MAE, MoCo v3), `relative` is a bias on the
    attention that all blocks share (BEiT; for the names beit_*), `relative_each` one of each block
    (fine-tuned BEiT), `rotary` turns queries and keys by their place (DINOv3, EVA-02)."""
    layer_scale: float | None = None
    """Start of a ViT's factors on the channels of each residual branch (BEiT, DINOv2)."""
    registers: int = 0
    """A ViT's tokens beside the class token that stand for nothing (arXiv:2309.16588)."""
    swiglu: bool = False
    """A ViT's feed-forward layers are gated, with two thirds of the hidden width, rounded up to a
    multiple of 8 (DINOv2: 2736 at ViT-L, not 2730)."""
    drop_path: float = 0.0
    """Stochastic depth: the probability that the last block is skipped; earlier ones, less."""
    drop_path_uniform: bool = False
    """Skip every block of a ViT with the probability `drop_path` (DINOv2)."""
    small_stem: bool = False
    """A ResNet's stem for small images: 3 x 3, stride 1, no max-pool (SimCLR, appendix B.9)."""
    layers: tuple[int, ...] | None = None
    """A ResNet's number of blocks in each stage."""
    channels: tuple[int, ...] | None = None
    """A ResNet's channels in each stage."""
    norm: Literal["batch", "ghost", "group"] = added("batch")
    """A ResNet's norms: statistics of the batch, which refuses --accumulate; of each micro-batch
    (ghost); or of groups of 32 channels of each image (GroupNorm, arXiv:1803.08494)."""
    recompute: bool = added(False)
    """A ViT's blocks keep their inputs alone and are computed again in the backward pass: a third
    more time, a fraction of the memory, the same numbers."""
    in_channels: int = added(3)
    """Channels of the images: those of data.channels."""

    def __post_init__(self) -> None:
        if not names.is_model(self.name):
            close = names.similar(self.name)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"encoder.name {self.name!r} is no timm model{hint}")
        require(self.image_size > 0, f"encoder.image_size must be positive, got {self.image_size}")
        require(
            0 <= self.drop_path < 1, f"encoder.drop_path must lie in [0, 1), got {self.drop_path}"
        )
        require_one_of("encoder.position", self.position, get_args(Position))
        require(
            1 <= self.in_channels <= MOST_CHANNELS,
            f"encoder.in_channels must lie in [1, {MOST_CHANNELS}], got {self.in_channels}",
        )
        require(self.registers >= 0, f"encoder.registers must be at least 0, got {self.registers}")
        require(
            self.layer_scale is None or self.layer_scale > 0,
            f"encoder.layer_scale must be positive, got {self.layer_scale}",
        )
        for name, wanted in self._vit_choices().items():
            require(
                self.is_vit or not wanted,
                f"encoder.{name} {getattr(self, name)} is for ViTs, not for {self.name}: take a "
                f"ViT, such as vit_small_patch16_224, or leave --encoder.{name.replace('_', '-')} "
                "out",
            )
        fitting = positions_of(self.name)
        require(
            self.position in fitting,
            f"encoder.position {self.position} does not go with {self.name}: give "
            f"--encoder.position {' or '.join(fitting)}",
        )
        require(
            not (self.is_beit and self.registers), "encoder.registers are not for BEiT's encoders"
        )
        if self.is_vit:
            require(self.patch > 0, f"encoder.patch_size must be positive, got {self.patch}")
            require(
                self.image_size % self.patch == 0,
                f"encoder.patch_size {self.patch} does not divide encoder.image_size "
                f"{self.image_size}: give a divisor, such as --encoder.patch-size "
                f"{_largest_divisor(self.image_size, self.patch)}",
            )
            if self.width and self.heads:
                require(
                    self.width % self.heads == 0,
                    f"encoder.heads {self.heads} does not divide encoder.width {self.width}",
                )
            if self.position == "sincos" and self.width:
                require(
                    self.width % 4 == 0,
                    f"encoder.width must be a multiple of 4 for sincos, got {self.width}",
                )
        require_one_of("encoder.norm", self.norm, ("batch", "ghost", "group"))
        require(
            self.norm == "batch" or not self.is_vit,
            f"encoder.norm {self.norm} is for ResNets: {self.name} has no batch norms",
        )
        if self.norm == "group":
            require(self.is_resnet, f"encoder.norm group is for ResNets, not for {self.name}")
            require(
                all(count % 32 == 0 for count in self.channels or ()),
                f"encoder.channels {self.channels} must be multiples of 32 for encoder.norm group",
            )
        require(
            not self.small_stem or self.is_resnet,
            f"encoder.small_stem is for ResNets, not for {self.name}",
        )

    @property
    def is_vit(self) -> bool:
        named = self.name.startswith(("vit_", "deit_", "deit3_"))
        return named or self.is_beit or self.is_rotary

    @property
    def is_rotary(self) -> bool:
        """Whether timm builds it as an `Eva` whose attention has rotary positions."""
        return _is_rotary(self.name)

    @property
    def is_beit(self) -> bool:
        return self.name.startswith(("beit_", "beitv2_"))

    @property
    def is_resnet(self) -> bool:
        return self.name.startswith(("resnet", "wide_resnet", "resnext"))

    @property
    def patch(self) -> int:
        """Side of a patch in pixels, for a ViT."""
        if self.patch_size is not None:
            return self.patch_size
        found = re.search(r"patch(\d+)", self.name)
        return int(found.group(1)) if found else 16

    @property
    def grid(self) -> int | None:
        """Patches along a side, for a ViT; None for others."""
        return self.image_size // self.patch if self.is_vit else None

    def _vit_choices(self) -> dict[str, bool]:
        """Whether each field that only ViTs have was given a value."""
        return {
            "position": self.position != "learned",
            "layer_scale": self.layer_scale is not None,
            "registers": self.registers > 0,
            "swiglu": self.swiglu,
            "drop_path_uniform": self.drop_path_uniform,
            "recompute": self.recompute,
        }

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that make this backbone from timm's name."""
        options: dict[str, Any] = {"num_classes": 0}
        if self.is_vit:
            options["img_size"] = self.image_size
        named = {
            "patch_size": self.patch_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "layers": self.layers,
            "channels": self.channels,
            "drop_path_rate": self.drop_path or None,
            "init_values": self.layer_scale,
            "num_reg_tokens" if self.is_rotary else "reg_tokens": self.registers or None,
            "norm_layer": _layer("GroupNorm") if self.norm == "group" else None,
            "in_chans": self.in_channels if self.in_channels != 3 else None,
        }
        if self.is_beit:
            # timm's names are of fine-tuned models: a bias for each block, averaged patches.
            shared = self.position == "relative"
            options |= {"use_rel_pos_bias": not shared, "use_shared_rel_pos_bias": shared}
        if self.is_beit or self.is_rotary:
            options["global_pool"] = "token"
        if self.swiglu:
            flag = self.is_beit or self.is_rotary
            kind = {"swiglu_mlp": True} if flag else {"mlp_layer": _layer("SwiGLU")}
            options |= {"mlp_ratio": self._gated_ratio, **kind}
            options |= {} if flag else {"act_layer": "silu"}
        return options | {key: value for key, value in named.items() if value is not None}

    @property
    def _gated_ratio(self) -> float:
        """timm's `mlp_ratio` that gives the gated layers their hidden width."""
        width = self.width or _width_of(self.name)
        wanted = 4 * width * 2 // 3
        rounded = -(-wanted // 8) * 8
        ratio = 8 / 3 if rounded == wanted else rounded / width
        # timm cuts the product off.
        return ratio if int(width * ratio) == rounded else (rounded + 0.5) / width

    def build(self) -> "Encoder":
        return Encoder(self)


@lru_cache
def _is_rotary(name: str) -> bool:
    # The names eva_* are of the first EVA, whose positions are learned alone.
    return names.built_by(name) == "timm.models.eva" and not name.startswith("eva_")


def positions_of(name: str) -> tuple[Position, ...]:
    """The kinds of position embedding that timm's model of a name can have here."""
    if name.startswith(("beit_", "beitv2_")):
        return ("relative", "relative_each")
    return ("rotary",) if _is_rotary(name) else ("learned", "sincos")


@lru_cache
def _width_of(name: str) -> int:
    """A timm model's own embedding dimension."""
    import timm

    with torch.device("meta"):
        return cast(int, timm.create_model(name).num_features)


def _layer(name: str) -> Any:
    from timm import layers

    return getattr(layers, name)


def _largest_divisor(size: int, most: int) -> int:
    return next(d for d in range(max(1, min(size, most)), 0, -1) if size % d == 0)


class Encoder(nn.Module):
    """What is pretrained, probed and exported. `backbone` is a plain timm model."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        import timm  # seconds, and most who read a config build no encoder

        self.config = config
        try:
            # Crops of several sizes go through one ViT: its positions are interpolated for them.
            any_size = config.is_vit and not config.is_beit
            sizes: dict[str, Any] = {"dynamic_img_size": True} if any_size else {}
            self.backbone = timm.create_model(config.name, **config.options, **sizes)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            what = unknown.group(1) if unknown else str(error)
            raise ValueError(f"encoder {config.name} does not take the option {what}") from None
        except AssertionError as error:  # timm's own mistakes are ValueErrors and TypeErrors
            raise ValueError(f"encoder.name {config.name} cannot be had here: {error}") from None
        if config.is_vit and not isinstance(self.backbone, vit.kinds()):
            raise ValueError(
                f"encoder.name {config.name} is a {type(self.backbone).__name__}, a kind of ViT "
                "that is not known here: take a vit_*, deit_* or beit_* model of learned or rotary "
                "positions"
            )
        self.width: int = cast(int, self.backbone.num_features)
        """D, the dimension of the features."""
        if config.drop_path_uniform:
            vit.skip_blocks_alike(self.backbone, config.drop_path)
        if config.small_stem:
            resnet.use_small_stem(self.backbone)
        if config.is_vit and config.position == "sincos":
            vit.fix_sincos_positions(self.backbone)

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Features:
        """Features of images.

        Args:
            images: float [B, C, H, W], normalised.
            visible: int64 [B, Nv], the patches that are to be seen; the others cost nothing and
                reach nothing (MAE). Only for ViTs. None shows all.
            mask: bool [B, N], the patches whose embeddings the mask token replaces (BEiT, iBOT).
            mask_token: [D].

        Returns:
            Features with patches [B, N, D], or [B, Nv, D] in the order of `visible`.
        """
        if self.config.is_vit:
            recompute = self.config.recompute and self.training
            tokens = vit.encode(self.backbone, images, visible, mask, mask_token, recompute)
            return Features(*tokens)
        assert visible is mask is None, f"{self.config.name} has no patch tokens to leave out"
        return Features(*resnet.encode(self.backbone, images))


def export_weights(encoder: Encoder) -> dict[str, Tensor]:
    """The backbone's weights under timm's names, so that plain timm loads them strictly.

    At the encoder's image size its features are ours. At others, where timm is asked for them
    (`dynamic_img_size`), they differ: timm resizes a ViT's positions with antialiasing, and here
    they are resized as local crops have them (vit.resized_positions). Where ranks hold shares of
    the weights, all must ask.
    """
    tensors = distributed.gathered(encoder.backbone.state_dict())
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if encoder.config.small_stem:
        weights["conv1.weight"] = resnet.widen_stem(weights["conv1.weight"])
    return weights


def import_weights(encoder: Encoder, weights: dict[str, Tensor]) -> None:
    """The inverse of export_weights. ValueError where the weights are of another encoder."""
    weights = dict(weights)
    if encoder.config.small_stem and "conv1.weight" in weights:
        weights["conv1.weight"] = resnet.narrow_stem(weights["conv1.weight"])
    try:
        encoder.backbone.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        whose = f"of encoder {encoder.config.name}"
        raise ValueError(f"these weights are not {whose}: {first}{_hint(encoder.config)}") from None


def _hint(config: EncoderConfig) -> str:
    """Why weights that an earlier version wrote may not fit."""
    return " (of before gated layers were rounded to multiples of 8?)" if config.swiglu else ""


@torch.no_grad()
def encode_uint8(
    encoder: Encoder, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> Features:
    """Features of uint8 images [B, C, H, W], normalised here."""
    return encoder(normalize(images, mean, std))


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [..., C, H, W] in 0..255 -> float32, (x / 255 - mean) / std for each channel."""
    shift, scale = _channels(mean, images.device), _channels(std, images.device)
    return (images.float() - shift) / scale


@lru_cache(maxsize=16)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[C, 1, 1] in 0..255; kept, since a copy to a GPU in every step would wait for it."""
    return (torch.tensor(values, dtype=torch.float32, device=device) * 255).view(-1, 1, 1)
