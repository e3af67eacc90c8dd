"""`selfray export`: writes a pretrained encoder in the formats of other software and verifies
it."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from selfray import __version__
from selfray.check import require
from selfray.commands.flags import CheckpointArgument, TrackingFlag, flag
from selfray.commands.reference import described, name_of, open_checkpoint, run_folder
from selfray.commands.words import plain, size

if TYPE_CHECKING:
    from selfray.console import Console
    from selfray.experiment import Experiment
    from selfray.runs.checkpoint import Checkpoint


@dataclass(frozen=True)
class Export:
    """Write a pretrained encoder for other software, verify that it computes the same features
    there, and print the Python lines that load it.
    $ selfray export runs/mae-imagenet-1a2b3c4d --to timm --output encoder
    $ selfray export runs/mae-imagenet-1a2b3c4d --to onnx --output encoder.onnx
    """

    interrupted: ClassVar[str] = "nothing was written"

    checkpoint: CheckpointArgument
    to: Annotated[
        Literal["timm", "huggingface", "onnx", "mlflow"],
        flag(
            """Target: timm (a folder with timm's config.json and safetensors, which plain PyTorch
            loads as well), huggingface (the same with a model card, for transformers and the hub),
            onnx (one file with a dynamic batch size), or mlflow (a logged model of the run)."""
        ),
    ]
    output: Annotated[
        str | None,
        flag("Local folder to write, or file for onnx.", "PATH", "RUN-STEP in this folder"),
    ] = None
    register: Annotated[
        str | None, flag("With mlflow: a registered model that gets a new version.", "NAME")
    ] = None
    force: Annotated[bool, flag("Overwrite existing files.", default="")] = False
    any_size: Annotated[
        bool,
        flag("With onnx, for ViTs: images of any size in whole patches.", default=""),
    ] = False
    tracking: TrackingFlag = None

    def run(self, console: "Console") -> int:
        require(
            self.register is None or self.to == "mlflow",
            "--register needs --to mlflow: only MLflow has a registry",
        )
        require(
            not self.any_size or self.to == "onnx",
            f"--any-size is for --to onnx; what --to {self.to} writes takes other sizes already",
        )
        if self.to == "mlflow":
            return self._to_mlflow(console)
        require(
            self.output is None or "://" not in self.output,
            f"--output must be local, got {self.output}: copy it afterwards",
        )
        if self.output is not None:
            is_onnx = self.output.endswith(".onnx")
            require(
                is_onnx == (self.to == "onnx") and not self.output.endswith(".safetensors"),
                f"--output must be {'a file .onnx' if self.to == 'onnx' else 'a folder'}, got "
                f"{self.output}",
            )
        if self.to == "onnx":
            _require_onnx()
        console.live("loading torch and timm")
        from selfray.runs.starting import licence_of

        checkpoint = open_checkpoint(self.checkpoint, self.tracking, console)
        checkpoint = _best_of(checkpoint, self.checkpoint, console)
        name = name_of(checkpoint) + (".onnx" if self.to == "onnx" else "")
        target = Path(os.path.abspath(os.path.expanduser(self.output or name)))
        if target.exists() and not self.force:
            raise FileExistsError(f"{target} exists: give --force to overwrite it, or --output")
        experiment = checkpoint.experiment()
        console.live("writing and checking")
        if self.to == "onnx":
            verdict, lines = _write_onnx(target, checkpoint, experiment, self.any_size)
        else:
            verdict, lines = _write_folder(target, checkpoint, experiment, self.to)
        total = sum(f.stat().st_size for f in ([target] if target.is_file() else target.iterdir()))
        console.say(f"{target}: {size(total)}, {described(experiment)}, step {checkpoint.step:,}")
        console.say(verdict)
        if (licence := licence_of(experiment.init_from, experiment.encoder)) is not None:
            console.say(f"trained from public weights, whose licence applies: {licence}")
        console.say("\n" + lines + "\n")
        channels = experiment.encoder.in_channels
        kind = "RGB" if channels == 3 else "gray" if channels == 1 else f"{channels} channels"
        side, (mean, std) = experiment.encoder.image_size, _normalization(experiment)
        console.say(
            f"images: {kind}, {side} x {side}, scaled to 0..1, minus {plain(mean)}, "
            f"divided by {plain(std)}"
        )
        return 0

    def _to_mlflow(self, console: "Console") -> int:
        require(self.output is None, "--output is not for --to mlflow, which keeps its own files")
        console.live("loading torch and mlflow")
        from selfray.cluster.logged_model import log_encoder
        from selfray.commands.script import FAILED

        run = run_folder(open_checkpoint(self.checkpoint, self.tracking, console))
        require(run is not None, f"{self.checkpoint} lies outside a run's folder: give a run")
        assert run is not None
        return 0 if log_encoder(run, console, self.tracking, self.register) else FAILED


def _best_of(newest: "Checkpoint", reference: str, console: "Console") -> "Checkpoint":
    """The checkpoint with the best probe if the user named a run; a named checkpoint itself."""
    from selfray.runs.checkpoint import best

    run = run_folder(newest)
    if run is None or newest.location.name in reference:
        return newest
    found = best(run)
    if found is None or found.step == newest.step:
        return newest
    console.say(
        f"taking step {found.step:,}, which has the best probe; to export the last one, give "
        f"{newest.location}"
    )
    return found


def _normalization(experiment: "Experiment") -> tuple[tuple[float, ...], tuple[float, ...]]:
    return experiment.data.normalization


def _require_onnx() -> None:
    import importlib.util

    missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(n)]
    require(
        not missing,
        f"--to onnx needs {', '.join(missing)}: pip install 'selfray[onnx]'",
    )


LABEL_NAMES = "label_names"
"""Entry of the safetensors header, and timm's name for the classes of the images."""


def metadata(checkpoint: "Checkpoint", experiment: "Experiment") -> dict[str, str]:
    """The header of the safetensors file: the weights' origin, with all values as text."""
    from selfray import config
    from selfray.data.data_sets import classes_in
    from selfray.probes.encoders import ENCODER_CONFIG

    run = run_folder(checkpoint)
    classes = classes_in(run) if run is not None else ()
    known = {LABEL_NAMES: json.dumps(classes)} if classes else {}
    return known | {
        "format": "pt",  # transformers requires it
        "selfray_version": __version__,
        "method": experiment.method.name,
        "encoder": experiment.encoder.name,
        ENCODER_CONFIG: config.dumps(experiment.encoder),
        "image_size": str(experiment.encoder.image_size),
        "mean": json.dumps(experiment.data.normalization[0]),
        "std": json.dumps(experiment.data.normalization[1]),
        "step": str(checkpoint.step),
        "images_seen": str(checkpoint.images_seen),
        "run": experiment.run_name,
    }


def _write_folder(
    target: Path, checkpoint: "Checkpoint", experiment: "Experiment", to: str
) -> tuple[str, str]:
    """Write a folder, which gets its final name only after timm loaded it successfully.

    Returns:
        A sentence that says what was verified, and the Python lines that load the folder.
    """
    from selfray.commands.model_card import model_card
    from selfray.models.portable import Portable, verify

    encoder = checkpoint.encoder()

    def fill(scratch: Path) -> str:
        scratch.mkdir(parents=True)
        portable = Portable.of(encoder)
        header = metadata(checkpoint, experiment)
        names = json.loads(header.get(LABEL_NAMES, "[]"))
        portable.write(scratch, encoder, _normalization(experiment), header, names)
        if to == "huggingface":
            (scratch / "README.md").write_text(model_card(checkpoint, experiment))
        return verify(scratch, encoder)

    verdict = _under_its_name(target, fill)
    from selfray.models.portable import opening_lines

    return verdict, opening_lines(encoder.config, str(target), to)


def _write_onnx(
    target: Path, checkpoint: "Checkpoint", experiment: "Experiment", any_size: bool
) -> tuple[str, str]:
    from selfray.models.onnx import OPSET, check_onnx, save_onnx

    encoder = checkpoint.encoder()
    images, what = _images(experiment)

    def fill(scratch: Path) -> str:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        save_onnx(encoder, scratch, any_size)
        worst = check_onnx(encoder, scratch, images, any_size)
        sizes = " and size" if any_size else ""
        return (
            f"verified: onnxruntime gives torch's features of {len(images)} {what} at every tested "
            f"batch size (largest difference {worst:.1e}); opset {OPSET}, dynamic batch{sizes}"
        )

    verdict = _under_its_name(target, fill)
    lines = (
        "import onnxruntime\n\n"
        f"session = onnxruntime.InferenceSession({str(target)!r})\n"
        'cls, patches = session.run(None, {"images": images})  # float32 [B, C, H, W]'
    )
    return verdict, lines


def _images(experiment: "Experiment"):
    """Images for the check, normalised, float32 [n, C, H, W], and their description: images of the
    run's own data if it is reachable and needs no conversion, else Gaussian noise."""
    import torch

    from selfray.data.data_sets import needs_build, open_data
    from selfray.data.source import VIEWS
    from selfray.models.encoder import normalize
    from selfray.storage import Location

    side, data = experiment.encoder.image_size, experiment.data

    def no_build(*_: object, **__: object) -> None:
        raise ValueError("an export does not convert data")

    try:
        if data.path and not needs_build(data.path):
            opened = open_data(data, Location.of(experiment.output), lambda _: None, no_build)  # type: ignore[arg-type]
            train, _ = opened.samples(side, 8, 8)
            views = torch.from_numpy(train.read(0)[VIEWS][:8])
            if len(views):
                return normalize(views, *data.normalization), "images of its own data"
    except (ValueError, OSError):
        pass  # the data is not reachable; noise verifies an exporter as well
    shape = (4, experiment.encoder.in_channels, side, side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return noise, "images of noise"


def _under_its_name(target: Path, fill: Callable[[Path], str]) -> str:
    """Let `fill` write a file or folder beside the target, then rename it to the target. Returns
    what `fill` returns."""
    from safetensors import SafetensorError

    scratch = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        verdict = fill(scratch)
        _remove(target)
        os.replace(scratch, target)
    except (OSError, SafetensorError) as error:  # the latter is safetensors' word for a full disk
        cause = getattr(error, "strerror", None) or error
        raise OSError(f"{target} cannot be written ({cause}): give another --output") from None
    finally:
        with suppress(OSError):  # it does not exist if its parent folder could not be made
            _remove(scratch)
    return verdict


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
