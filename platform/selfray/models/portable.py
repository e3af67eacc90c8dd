"""An encoder in a form that plain timm opens: architecture name, arguments and weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from selfray.models.encoder import Encoder, EncoderConfig, export_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PACKED = "vit_giant_patch14_dinov2"
"""A timm architecture with gated feed-forward layers, whose sizes are all arguments. Other names
take a gated layer only as a Python class, which JSON cannot hold."""


@dataclass(frozen=True)
class Portable:
    """Content of a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

    architecture: str
    arguments: dict[str, Any]
    """JSON values."""
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, encoder: Encoder) -> "Portable":
        config, weights = encoder.config, export_weights(encoder)
        arguments = {k: v for k, v in config.options.items() if k != "num_classes"}
        if config.norm == "group":
            arguments["norm_layer"] = "groupnorm"  # timm accepts this name for the class
        if config.is_vit and not config.is_beit:
            arguments["dynamic_img_size"] = True
        if config.swiglu and not (config.is_beit or config.is_rotary):
            return cls(PACKED, _packed_arguments(encoder, arguments), _packed(weights))
        return cls(config.name.partition(".")[0], arguments, weights)

    def config(
        self, encoder: Encoder, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Any]:
        """The content of timm's config.json. Preprocessing is that of the probes: the central
        square is resized to the view by bicubic interpolation."""
        size = encoder.config.image_size
        known = getattr(encoder.backbone, "pretrained_cfg", {})
        pool = self.arguments.get("global_pool") or getattr(encoder.backbone, "global_pool", "avg")
        return {
            "architecture": self.architecture,
            "num_classes": 0,
            "num_features": encoder.width,
            "global_pool": pool if isinstance(pool, str) else "avg",
            "model_args": {
                k: list(v) if isinstance(v, tuple) else v for k, v in self.arguments.items()
            },
            "pretrained_cfg": {
                "tag": "selfray",
                "custom_load": False,
                "input_size": [encoder.config.in_channels, size, size],
                "fixed_input_size": encoder.config.is_beit,
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "crop_mode": "center",
                "mean": list(mean),
                "std": list(std),
                "num_classes": 0,
                "pool_size": None,
                "first_conv": known.get("first_conv"),
                "classifier": known.get("classifier"),
            },
        }

    def write(
        self,
        folder: Path,
        encoder: Encoder,
        normalization: tuple[tuple[float, ...], tuple[float, ...]],
        metadata: dict[str, str],
        label_names: Sequence[str] = (),
    ) -> None:
        """Write both files into an existing folder. `label_names` are the classes of the images,
        for whoever trains a classifier on the encoder."""
        config = self.config(encoder, *normalization)
        if label_names:
            config["pretrained_cfg"]["label_names"] = list(label_names)
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        safetensors.torch.save_file(self.weights, folder / WEIGHTS, metadata)


def _is_packed(config: EncoderConfig) -> bool:
    """Whether gated layers are packed into one matrix in the folder. BEiT and rotary ViTs have an
    argument for gated layers instead."""
    return config.swiglu and not (config.is_beit or config.is_rotary)


def own_weights(config: EncoderConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo the packing of `Portable.of`, so that `import_weights` takes the weights."""
    if not _is_packed(config):
        return weights
    found = {}
    for name, tensor in weights.items():
        if ".mlp.fc1." in name:
            gate, value = tensor.chunk(2)
            found[name.replace(".fc1.", ".fc1_g.")] = gate.contiguous()
            found[name.replace(".fc1.", ".fc1_x.")] = value.contiguous()
        else:
            found[name] = tensor
    return found


def _packed_arguments(encoder: Encoder, arguments: dict[str, Any]) -> dict[str, Any]:
    backbone: Any = encoder.backbone
    hidden = backbone.blocks[0].mlp.fc1_x.out_features
    width = encoder.width
    kept = {k: v for k, v in arguments.items() if k not in ("mlp_layer", "act_layer", "mlp_ratio")}
    own = {
        "patch_size": encoder.config.patch,
        "embed_dim": width,
        "depth": len(backbone.blocks),
        "num_heads": backbone.blocks[0].attn.num_heads,
        # The width of both halves; + 0.5 because timm truncates the product to an integer.
        "mlp_ratio": (2 * hidden + 0.5) / width,
        "init_values": encoder.config.layer_scale,
    }
    return own | kept


def _packed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join gate and value of gated layers into one matrix, gate first, as timm's packed layers."""
    found = {}
    for name, tensor in weights.items():
        if ".mlp.fc1_g." in name:
            value = weights[name.replace("fc1_g", "fc1_x")]
            found[name.replace("fc1_g", "fc1")] = torch.cat([tensor, value]).contiguous()
        elif ".mlp.fc1_x." not in name:
            found[name] = tensor
    return found


def opening_lines(config: EncoderConfig, folder: str, to: str = "timm") -> str:
    """The Python lines that open an exported folder."""
    lines = ["import timm", ""]
    if config.small_stem:
        lines[0] = "import timm, torch"
    lines.append(f'model = timm.create_model("local-dir:{folder}", pretrained=True)')
    stem = "{0}.conv1.stride, {0}.maxpool = (1, 1), torch.nn.Identity()  # small-image stem"
    if config.small_stem:
        lines.append(stem.format("model"))
    lines.append("model.eval()")
    if to == "huggingface":
        lines += [
            "",
            "import transformers",
            f"model = transformers.AutoModel.from_pretrained({folder!r})",
        ]
        if config.small_stem:
            lines.append(stem.format("model.timm_model"))
    return "\n".join(lines)


def verify(folder: Path, encoder: Encoder) -> str:
    """Open a folder as its users will, and compare features. Raises RuntimeError if they differ.

    Returns a sentence that says what was verified.
    """
    scope: dict[str, object] = {}
    # exec is safe here: the folder's name enters the code as a literal.
    exec(opening_lines(encoder.config, str(folder)), scope)
    model: Any = scope["model"]
    side = encoder.config.image_size
    shape = (2, encoder.config.in_channels, side, side)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = encoder(images), model(images)
        tokens = model.forward_features(images)
    # A ResNet's map is [B, D, h, w]; a ViT's tokens are [B, P + N, D].
    patches = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
    if not _same(patches[:, -ours.patches.shape[1] :], ours.patches):
        raise RuntimeError(
            f"timm computes different features for {encoder.config.name}: please report it"
        )
    name = f"local-dir:{folder}"
    import timm

    with_head = timm.create_model(name, pretrained=True, num_classes=10)
    own, headed = model.state_dict(), with_head.state_dict()
    wrong = [k for k in own if k not in headed or not torch.equal(own[k], headed[k])]
    if wrong and not encoder.config.small_stem:
        raise RuntimeError(f"timm loses {wrong[0]} with num_classes=10: please report it")
    verdict = "verified: timm opens it, also with num_classes=10, and computes the same features"
    if not _same(theirs, ours.cls):
        verdict += " (model.forward_features; the pooling after it is not pretrained)"
    return verdict


def _same(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-3, atol=1e-4)
