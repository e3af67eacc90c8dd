"""Finds and reads public weights for an encoder to start from, without running any code in them.

They are named by `timm:NAME` (through the user's Hugging Face cache) or by a file: .safetensors, or
.pth in a layout that `models.layouts` knows, read only by torch.load(weights_only=True).
"""

import argparse
import hashlib
import io
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError

from selfray import config
from selfray.models import layouts, names
from selfray.models.encoder import EncoderConfig, positions_of
from selfray.models.layouts import Named, Tensors
from selfray.storage import Location, one_line

TIMM = "timm:"
FILES = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin", ".ckpt")


def is_public(reference: str) -> bool:
    """Whether --init-from names public weights; otherwise it names a checkpoint of selfray."""
    return reference.startswith(TIMM) or reference.endswith(FILES)


def located(reference: str) -> str:
    """The reference with an absolute path: the current folder of a worker is not its driver's."""
    return reference if reference.startswith(TIMM) else Location.of(reference).uri


def licence_in_timm(reference: str) -> str | None:
    """The licence of timm's weights, as far as timm knows it; None for files."""
    if not reference.startswith(TIMM):
        return None
    settings = _settings(reference)
    return settings.license if settings else None


def _settings(reference: str) -> Any:
    """timm's settings of its pretrained weights; None if it has none of that name."""
    import timm

    try:
        return timm.get_pretrained_cfg(reference.removeprefix(TIMM), allow_unregistered=False)
    except RuntimeError:
        return None


@dataclass(frozen=True)
class PublicWeights:
    """Published weights of an encoder, under timm's names."""

    source: str
    named: Named
    name: str | None
    """The encoder's timm name; None if neither file nor shapes show it."""
    fields: Mapping[str, Any]
    """Further known fields of the EncoderConfig."""
    sha256: str | None
    """The file's sha256 in hex; None for weights from timm."""

    def encoder(self, given: EncoderConfig) -> EncoderConfig | None:
        """The config of the encoder of these weights, with image size and stochastic depth from
        `given`; None if it is unknown."""
        if self.name is None:
            return None
        kept = {n: getattr(given, n) for n in ("image_size", "drop_path", "drop_path_uniform")}
        positions = positions_of(self.name)
        known = {"position": positions[0], **self.fields}
        if known["position"] not in positions:
            known["position"] = positions[0]
        if not EncoderConfig(self.name, position=known["position"]).is_vit:
            kept.pop("drop_path_uniform")
        return EncoderConfig(self.name, **kept, **known)


def read(reference: str) -> PublicWeights:
    """Find and read public weights.

    Raises:
        FileNotFoundError: the file does not exist, or timm's weights cannot be fetched.
        ValueError: the file is damaged, needs code to be read, or has an unknown layout. The
            message is one line that names the file and the way out.
    """
    if reference.startswith(TIMM):
        return _from_timm(reference)
    try:
        data = Location.of(reference).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"--init-from {reference}: there is no such file; give a .safetensors or .pth file, a "
            f"run of selfray, or {TIMM}NAME"
        ) from None
    metadata: dict[str, str] = {}
    if reference.endswith(".safetensors"):
        content, metadata = _safetensors(data, reference)
    else:
        content = _pickled(data, reference)
    found = layouts.named(content, reference)
    name, known = _recorded_encoder(metadata) or (None, {})
    if name is None:
        name, known = architecture(found)
        known = {**known, **found.facts}
    return PublicWeights(reference, found, name, known, hashlib.sha256(data).hexdigest())


def _from_timm(reference: str) -> PublicWeights:
    import timm

    full = reference.removeprefix(TIMM)
    name = full.partition(".")[0]
    if not names.is_model(name):
        EncoderConfig(name)  # raises, with similar names
    settings = _settings(reference)
    if settings is None or not settings.has_weights:
        known = ", ".join(timm.list_pretrained(f"{name}.*")[:6]) or "none for this name"
        raise ValueError(f"--init-from {reference}: timm has no such weights; it has {known}")
    try:
        model: Any = timm.create_model(full, pretrained=True, num_classes=0)
    except Exception as error:  # hub, network, proxy and disk each raise their own
        raise FileNotFoundError(
            f"--init-from {reference} cannot be fetched ({one_line(error)[:200]}): it is looked up "
            "in the Hugging Face cache, then on the network; give a file, or fill the cache first"
        ) from None
    tensors = {k: v.detach().float() for k, v in model.state_dict().items()}
    kept = Named("timm's", tensors, licence=settings.license)
    position = "relative_each" if "beit" in name else positions_of(name)[0]
    return PublicWeights(reference, kept, name, {"position": position}, None)


def _safetensors(data: bytes, reference: str) -> tuple[Tensors, dict[str, str]]:
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        return tensors, json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"--init-from {reference} is not a complete safetensors file "
            f"({one_line(error)[:120]}): download it again, it may be truncated"
        ) from None


def _pickled(data: bytes, reference: str) -> object:
    try:
        # Files hold the flags of the authors' runs as a Namespace, which cannot run code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = one_line(error)
        wanted = re.search(r"(?:GLOBAL|Unsupported (?:class|global):?(?: GLOBAL)?) (\S+)", text)
        if wanted is None and "nsupported" not in text:
            raise _cut_off(reference, text) from None
        what = f" ({wanted[1].rstrip('.,')})" if wanted else ""
        raise ValueError(
            f"--init-from {reference} can only be read by running code in it{what}, which selfray "
            "never does: load it with its own project and save only its state dict, best as "
            ".safetensors"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise _cut_off(reference, one_line(error)) from None


def _cut_off(reference: str, text: str) -> ValueError:
    return ValueError(
        f"--init-from {reference} is not a complete torch.save file ({text[:120]}): download it "
        "again, it may be truncated"
    )


_OPTIONS = {
    "patch_size": "patch_size",
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "heads",
    "init_values": "layer_scale",
    "reg_tokens": "registers",
    "num_reg_tokens": "registers",
    "layers": "layers",
    "channels": "channels",
}


def _recorded_encoder(metadata: Mapping[str, str]) -> tuple[str, dict[str, Any]] | None:
    """(name, fields) of the encoder recorded by `selfray export`; None for other files."""
    if "encoder_config" in metadata:
        recorded: EncoderConfig = config.loads(metadata["encoder_config"])
        kept = ("name", "image_size", "drop_path", "drop_path_uniform")
        return recorded.name, {
            f.name: getattr(recorded, f.name) for f in fields(recorded) if f.name not in kept
        }
    if "selfray_version" not in metadata or "options" not in metadata:
        return None
    options = json.loads(metadata["options"])
    known = {_OPTIONS[k]: v for k, v in options.items() if k in _OPTIONS}
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    known["small_stem"] = json.loads(metadata.get("small_stem", "false"))
    known["swiglu"] = "mlp_ratio" in options
    return metadata["encoder"], known


_SIZES = {
    (192, 12): "tiny",
    (384, 12): "small",
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
    (1536, 40): "giant",
    (4096, 40): "7b",
}
"""(width, depth) of a ViT -> the size in its name."""
# (whether blocks are bottlenecks, number of blocks in each stage) -> name
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}


def architecture(found: Named) -> tuple[str | None, dict[str, Any]]:
    """(timm name, fields) of an encoder from its layout and shapes; the name is None if they do not
    show it."""
    tensors = found.tensors
    if "conv1.weight" in tensors:
        name = _RESNETS.get((any(".conv3." in n for n in tensors), _blocks_of_stages(tensors)))
        doubled = name and name != "resnet18" and tensors["layer1.0.conv1.weight"].shape[0] == 128
        return (f"wide_{name}_2" if doubled else name), {}
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    depth = 1 + max(int(m[1]) for n in tensors if (m := re.match(r"blocks\.(\d+)\.", n)))
    size = _SIZES.get((width, depth))
    gated = any(".mlp.fc1_g." in n for n in tensors)
    name: str | None = None
    if size is not None:
        match found.layout:
            case "DINOv3":
                name = f"vit_{size}{'_plus' * (gated and size != '7b')}_patch{patch}_dinov3"
            case "DINOv2":
                registers = "_reg4" * ("reg_token" in tensors)
                name = f"vit_{size}_patch{patch}{registers}_dinov2"
            case "BEiT":
                name = f"beit_{size}_patch{patch}_224"
            case "timm's rotary ViT":
                name = None
            case _:
                name = f"vit_{size}_patch{patch}_224"
                if not names.is_model(name):
                    return f"vit_{size}_patch16_224", {"patch_size": patch}
    return (name if name is not None and names.is_model(name) else None), {}


def _blocks_of_stages(tensors: Tensors) -> tuple[int, ...]:
    found = [re.match(r"layer(\d)\.(\d+)\.", name) for name in tensors]
    stages: dict[int, int] = {}
    for match in filter(None, found):
        stages[int(match[1])] = max(stages.get(int(match[1]), 0), int(match[2]) + 1)
    return tuple(stages[stage] for stage in sorted(stages))


def encoder_of(reference: str, given: EncoderConfig | None = None) -> EncoderConfig:
    """The encoder config of public weights, such as `timm:vit_small_patch14_dinov2.lvd142m`, at the
    image size of `given`. Raises ValueError if it is unknown."""
    given = given or EncoderConfig()
    if reference.startswith(TIMM):  # the name is enough; nothing is fetched
        name = reference.removeprefix(TIMM).partition(".")[0]
        position = "relative_each" if "beit" in name else None
        if not names.is_model(name):
            EncoderConfig(name)
        known: dict[str, Any] = {"position": position or positions_of(name)[0]}
        return _like(PublicWeights(reference, Named("timm's", {}), name, known, None), given)
    return _like(read(reference), given)


def _like(weights: PublicWeights, given: EncoderConfig) -> EncoderConfig:
    known = weights.encoder(given)
    if known is None:
        raise ValueError(
            f"--init-from {weights.source}: its shapes do not show which encoder it belongs to; "
            "give --encoder.name"
        )
    return known
