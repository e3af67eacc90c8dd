"""`selfray export`: a pretrained encoder as a file that other software loads."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from selfray import __version__
from selfray.check import require
from selfray.commands.flags import CheckpointArgument, TrackingFlag, flag
from selfray.commands.reference import described, name_of, open_checkpoint
from selfray.commands.words import plain, size
from selfray.storage import Location

if TYPE_CHECKING:
    from selfray.console import Console
    from selfray.experiment import Experiment
    from selfray.models.encoder import Encoder
    from selfray.runs.checkpoint import Checkpoint


@dataclass(frozen=True)
class Export:
    """Write a pretrained encoder as one file that plain timm loads, prove that it does, and print
    the Python lines that load it.
    $ selfray export runs/mae-imagenet-1a2b3c4d --to timm --output encoder.safetensors
    """

    interrupted: ClassVar[str] = "nothing was written"

    checkpoint: CheckpointArgument
    to: Annotated[Literal["timm"], flag("What is to load the file.")]
    output: Annotated[
        str | None,
        flag("Local file to write.", "FILE", "RUN-STEP.safetensors in this folder"),
    ] = None
    force: Annotated[bool, flag("Overwrite an existing file.", default="")] = False
    tracking: TrackingFlag = None

    def run(self, console: "Console") -> int:
        if self.output is not None:
            _require_local_safetensors(self.output)
        console.live("loading torch and timm")
        from selfray.models.encoder import timm_recipe

        checkpoint = open_checkpoint(self.checkpoint, self.tracking, console)
        experiment, encoder = checkpoint.experiment(), checkpoint.encoder()
        name = f"{name_of(checkpoint)}.safetensors"
        file = Path(os.path.abspath(os.path.expanduser(self.output or name)))
        if file.exists() and not self.force:
            raise FileExistsError(f"{file} exists: give --force to overwrite it, or --output FILE")
        verdict = _write_verified(file, encoder, _metadata(checkpoint, experiment))
        console.say(
            f"{file}: {size(file.stat().st_size)}, {described(experiment)}, "
            f"step {checkpoint.step:,}"
        )
        console.say(verdict)
        console.say("\n" + timm_recipe(encoder.config, str(file)) + "\n")
        side, (mean, std) = encoder.config.image_size, (experiment.data.mean, experiment.data.std)
        console.say(
            f"images: RGB, {side} x {side}, scaled to 0..1, minus {plain(mean)}, "
            f"divided by {plain(std)}"
        )
        return 0


def _require_local_safetensors(output: str) -> None:
    require(
        "://" not in output,
        f"--output must be a local file, got {output}: timm reads no other; copy it afterwards",
    )
    require(
        output.endswith(".safetensors"),
        f"--output must end in .safetensors, got {output}: timm tells the format by the name",
    )


def _metadata(checkpoint: "Checkpoint", experiment: "Experiment") -> dict[str, str]:
    """What the file's header says of its origin; safetensors holds text only."""
    from selfray.models.encoder import as_code

    return {
        "format": "pt",  # transformers and others ask for it
        "selfray_version": __version__,
        "method": experiment.method.name,
        "encoder": experiment.encoder.name,
        "options": json.dumps(experiment.encoder.options, default=as_code),
        "small_stem": json.dumps(experiment.encoder.small_stem),
        "image_size": str(experiment.encoder.image_size),
        "mean": json.dumps(experiment.data.mean),
        "std": json.dumps(experiment.data.std),
        "step": str(checkpoint.step),
        "images_seen": str(checkpoint.images_seen),
        "run": experiment.run_name,
    }


def _write_verified(file: Path, encoder: "Encoder", metadata: Mapping[str, str]) -> str:
    """Write the file under its name only when timm has loaded it. Returns what was verified."""
    import safetensors.torch

    from selfray.models.encoder import export_weights

    # In the same folder, so that it can be renamed; with this suffix, since timm goes by it.
    scratch = file.with_name(f".{file.stem}.{os.getpid()}.safetensors")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        data = safetensors.torch.save(export_weights(encoder), dict(metadata))
        Location.of(scratch).write_bytes(data)
        verdict = _verify(scratch, encoder)
        os.replace(scratch, file)
    except OSError as error:
        raise OSError(
            f"{file} cannot be written ({error.strerror or error}): give --output another file"
        ) from None
    finally:
        if scratch.exists():
            scratch.unlink()
    return verdict


def _verify(file: Path, encoder: "Encoder") -> str:
    """Run the very lines that are printed, and compare features. RuntimeError where they differ."""
    import torch

    from selfray.models.encoder import timm_recipe

    scope: dict[str, object] = {}
    # Nothing of a stranger is run: a checkpoint's encoder name is one of timm's, and its options
    # and the path enter as literals.
    exec(timm_recipe(encoder.config, str(file)), scope)
    model = scope["model"]
    assert isinstance(model, torch.nn.Module)
    side = encoder.config.image_size
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))

    def same(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
        return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-3, atol=1e-4)

    with torch.no_grad():
        ours, theirs = encoder(images), model(images)
        if same(theirs, ours.cls):
            return "verified: timm loads it with no key missing and gives the same features"
        tokens = model.forward_features(images)  # type: ignore[operator]
    # A ResNet's map is [B, D, h, w]; a ViT's tokens are [B, P + N, D].
    patches = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
    if not same(patches[:, -ours.patches.shape[1] :], ours.patches):
        raise RuntimeError(f"timm gives other features for {encoder.config.name}: please report it")
    return (
        "verified: timm loads it with no key missing; model.forward_features(images) gives the "
        "pretrained features, the pooling behind it is not pretrained"
    )
