"""An encoder as plain timm opens it: its architecture's name, arguments and weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from selfray.models.encoder import Encoder, EncoderConfig, export_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PACKED = "vit_giant_patch14_dinov2"
"""The architecture of timm's that has gated feed-forward layers: they cannot be asked for in JSON
by another name. Every size of it is an argument."""


@dataclass(frozen=True)
class Portable:
    """What a folder holds that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens."""

    architecture: str
    arguments: dict[str, Any]
    """JSON values."""
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, encoder: Encoder) -> "Portable":
        config, weights = encoder.config, export_weights(encoder)
        arguments = {k: v for k, v in config.options.items() if k != "num_classes"}
        if config.norm == "group":
            arguments["norm_layer"] = "groupnorm"  # timm knows it by this word, too
        if config.is_vit and not config.is_beit:
            arguments["dynamic_img_size"] = True
        if config.swiglu and not (config.is_beit or config.is_rotary):
            return cls(PACKED, _packed_arguments(encoder, arguments), _packed(weights))
        return cls(config.name.partition(".")[0], arguments, weights)

    def config(
        self, encoder: Encoder, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Any]:
        """timm's config.json. Images are resized by bicubic interpolation so that the central
        square of the shorter side fills the view, as the probes do."""
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
    ) -> None:
        """The two files, into a folder that exists."""
        config = self.config(encoder, *normalization)
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        safetensors.torch.save_file(self.weights, folder / WEIGHTS, metadata)


def _is_packed(config: EncoderConfig) -> bool:
    """Whether its gated layers have another form in the folder: BEiT and rotary ViTs have an
    argument for them."""
    return config.swiglu and not (config.is_beit or config.is_rotary)


def own_weights(config: EncoderConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of what Portable does to weights, for `import_weights`."""
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
        # Of both halves; a fraction that int() of the product does not round down.
        "mlp_ratio": (2 * hidden + 0.5) / width,
        "init_values": encoder.config.layer_scale,
    }
    return own | kept


def _packed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm keeps the gate and the value of a packed layer in one matrix, the gate first."""
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
    if config.small_stem:
        lines.append(
            "model.conv1.stride, model.maxpool = (1, 1), torch.nn.Identity()  # small-image stem"
        )
    lines.append("model.eval()")
    if to == "huggingface" and not config.small_stem:
        lines += [
            "",
            "import transformers",
            f"model = transformers.AutoModel.from_pretrained({folder!r})",
        ]
    return "\n".join(lines)


def verify(folder: Path, encoder: Encoder) -> str:
    """Open a folder as its users will, and compare features. RuntimeError where they differ.

    Returns what was verified, in a sentence.
    """
    scope: dict[str, object] = {}
    # Nothing of a stranger is run: the folder's name enters as a literal.
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
        raise RuntimeError(f"timm gives other features for {encoder.config.name}: please report it")
    name = f"local-dir:{folder}"
    import timm

    with_head = timm.create_model(name, pretrained=True, num_classes=10)
    own, headed = model.state_dict(), with_head.state_dict()
    wrong = [k for k in own if k not in headed or not torch.equal(own[k], headed[k])]
    if wrong and not encoder.config.small_stem:
        raise RuntimeError(f"timm loses {wrong[0]} with num_classes=10: please report it")
    verdict = "verified: timm opens it, with num_classes=10 too, and gives the same features"
    if not _same(theirs, ours.cls):
        verdict += " (model.forward_features; the pooling behind it is not pretrained)"
    return verdict


def _same(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-3, atol=1e-4)
