"""EncoderConfig and Encoder: a timm backbone whose output is always Features."""

import re
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from selfray import distributed, imports
from selfray.check import require, require_one_of
from selfray.config import added
from selfray.models import names, resnet, vit
from selfray.views import MOST_CHANNELS


class Features(NamedTuple):
    """The output of every encoder."""

    cls: Tensor
    """Features of the images [B, D]: the class token, or the pooled map."""
    patches: Tensor
    """Features of the patches [B, N, D]; [B, Nv, D] if only Nv patches were visible."""


Position = Literal["learned", "sincos", "relative", "relative_each", "rotary"]


@dataclass(frozen=True)
class EncoderConfig:
    """The name of a timm backbone, and changes to it for pretraining.

    A field that is None keeps timm's value.
    """

    name: str = "vit_small_patch16_224"
    """Name of a timm model: a ViT, a ResNet or similar."""
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
    """A ViT's position embedding: `learned`; `sincos`, fixed (MAE, MoCo v3); `relative`, an
    attention bias shared by all blocks (BEiT; for names beit_*); `relative_each`, an attention bias
    of each block (fine-tuned BEiT); `rotary`, which rotates queries and keys by position (DINOv3,
    EVA-02)."""
    layer_scale: float | None = None
    """Initial value of a ViT's per-channel factors on each residual branch (BEiT, DINOv2)."""
    registers: int = 0
    """A ViT's number of register tokens beside the class token (arXiv:2309.16588)."""
    swiglu: bool = False
    """Gate a ViT's feed-forward layers; the hidden width is two thirds of the usual one, rounded up
    to a multiple of 8 (DINOv2: 2736 at ViT-L, not 2730)."""
    drop_path: float = 0.0
    """Stochastic depth: the probability to skip the last block; it falls linearly to 0 at the
    first.
    """
    drop_path_uniform: bool = False
    """Skip every block of a ViT with the same probability `drop_path` (DINOv2)."""
    small_stem: bool = False
    """A ResNet's stem for small images: 3 x 3, stride 1, no max-pool (SimCLR, appendix B.9)."""
    layers: tuple[int, ...] | None = None
    """A ResNet's number of blocks in each stage."""
    channels: tuple[int, ...] | None = None
    """A ResNet's channels in each stage."""
    norm: Literal["batch", "ghost", "group"] = added("batch")
    """A ResNet's norms. batch: statistics of the whole batch, without --accumulate; ghost: of each
    micro-batch; group: of groups of 32 channels of each image (GroupNorm, arXiv:1803.08494)."""
    recompute: bool = added(False)
    """Keep only the inputs of a ViT's blocks and compute the blocks again in the backward pass: a
    third more time, a fraction of the memory, the same numbers."""
    in_channels: int = added(3)
    """Channels of the images; must equal data.channels."""

    def __post_init__(self) -> None:
        if not names.is_model(self.name):
            close = names.similar(self.name)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"encoder.name {self.name!r} is not a timm model{hint}")
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
                f"encoder.{name} {getattr(self, name)} is for ViTs, not for {self.name}: give a "
                f"ViT, such as vit_small_patch16_224, or leave --encoder.{name.replace('_', '-')} "
                "out",
            )
        fitting = positions_of(self.name)
        require(
            self.position in fitting,
            f"encoder.position {self.position} is not possible with {self.name}: give "
            f"--encoder.position {' or '.join(fitting)}",
        )
        require(not (self.is_beit and self.registers), "encoder.registers is not for BEiT encoders")
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
        """Whether timm builds the model as an `Eva` with rotary positions."""
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
        """Patches along a side for a ViT; None for other models."""
        return self.image_size // self.patch if self.is_vit else None

    @property
    def given(self) -> str:
        """The name and the fields that were given a value, for messages about its size or shape."""
        changed = [
            f"encoder.{field.name} "
            + (" ".join(map(str, value)) if isinstance(value, tuple) else str(value))
            for field in fields(self)
            if field.name not in ("name", "image_size")
            and (value := getattr(self, field.name)) != field.default
        ]
        return " with ".join([f"encoder.name {self.name}", *filter(None, [", ".join(changed)])])

    def _vit_choices(self) -> dict[str, bool]:
        """For each field that is only for ViTs, whether it was given a value."""
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
        """The keyword arguments with which timm.create_model builds this backbone."""
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
            # timm's defaults are those of fine-tuned models: a bias per block, averaged patches.
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
        """The `mlp_ratio` with which timm gives the gated layers the right hidden width."""
        width = self.width or _width_of(self.name)
        wanted = 4 * width * 2 // 3
        rounded = -(-wanted // 8) * 8
        ratio = 8 / 3 if rounded == wanted else rounded / width
        # timm truncates the product to an integer.
        return ratio if int(width * ratio) == rounded else (rounded + 0.5) / width

    def build(self) -> "Encoder":
        return Encoder(self)


@lru_cache
def _is_rotary(name: str) -> bool:
    # Names eva_* are models of the first EVA, which has learned positions only.
    return names.built_by(name) == "timm.models.eva" and not name.startswith("eva_")


def positions_of(name: str) -> tuple[Position, ...]:
    """The position embeddings that a timm model of this name can have."""
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
    """The module that is pretrained, probed and exported. `backbone` is a plain timm model."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        imports.postpone_compiler()
        with imports.uncollected():
            import timm  # takes seconds, and most processes that read a config build no encoder

        self.config = config
        try:
            # A ViT takes crops of several sizes: its positions are interpolated for each.
            any_size = config.is_vit and not config.is_beit
            sizes: dict[str, Any] = {"dynamic_img_size": True} if any_size else {}
            self.backbone = timm.create_model(config.name, **config.options, **sizes)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            what = unknown.group(1) if unknown else str(error)
            if what == "dynamic_img_size":
                raise self._unknown_kind() from None
            raise ValueError(f"encoder {config.name} does not take the option {what}") from None
        except AssertionError as error:  # how timm refuses some combinations of arguments
            raise ValueError(f"{config.given} cannot be built: {error}") from None
        if config.is_vit and not isinstance(self.backbone, vit.kinds()):
            raise self._unknown_kind()
        self.width: int = cast(int, self.backbone.num_features)
        """D, the dimension of the features."""
        if config.drop_path_uniform:
            vit.skip_blocks_alike(self.backbone, config.drop_path)
        if config.small_stem:
            resnet.use_small_stem(self.backbone)
        if config.is_vit and config.position == "sincos":
            vit.fix_sincos_positions(self.backbone)

    def _unknown_kind(self) -> ValueError:
        return ValueError(
            f"encoder.name {self.config.name} is a kind of ViT that selfray does not support: "
            "give a vit_*, deit_* or beit_* model with learned or rotary positions"
        )

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
            visible: int64 [B, Nv], indices of the patches to encode; the others are dropped before
                the first block and cost no time (MAE). Only for ViTs. None encodes all.
            mask: bool [B, N], the patches whose embeddings the mask token replaces (BEiT, iBOT).
            mask_token: [D]; needed with `mask`.

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
    """The backbone's weights on the CPU under timm's names, so that plain timm loads them strictly.

    At the encoder's image size timm computes the same features. At other sizes (`dynamic_img_size`)
    they differ: timm resizes a ViT's positions with antialiasing, selfray without, as for local
    crops (vit.resized_positions). Collective if weights are sharded: every rank must call it.
    """
    tensors = distributed.gathered(encoder.backbone.state_dict())
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if encoder.config.small_stem:
        weights["conv1.weight"] = resnet.widen_stem(weights["conv1.weight"])
    return weights


def import_weights(encoder: Encoder, weights: dict[str, Tensor]) -> None:
    """The inverse of export_weights. Raises ValueError if the weights do not fit the encoder."""
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
    """Why weights written by an earlier version may not fit."""
    older = " (written before gated layers were rounded to multiples of 8?)"
    return older if config.swiglu else ""


@torch.no_grad()
def encode_uint8(
    encoder: Encoder, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> Features:
    """Normalise uint8 images [B, C, H, W] and return their features, without gradient."""
    return encoder(normalize(images, mean, std))


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [..., C, H, W] in 0..255 -> float32, (x / 255 - mean) / std for each channel."""
    shift, scale = _channels(mean, images.device), _channels(std, images.device)
    return (images.float() - shift) / scale


@lru_cache(maxsize=16)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [C, 1, 1] in 0..255; cached, because a copy to the GPU in every step would block."""
    return (torch.tensor(values, dtype=torch.float32, device=device) * 255).view(-1, 1, 1)
