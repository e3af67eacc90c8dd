"""selfray from Python: `selfray pretrain`, `embed` and `evaluate` as functions.

Heavy packages are imported in the calls that need them. docs/library.md has an example of each.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as Picture

    from selfray.cluster.launch import RunResult
    from selfray.console import Console
    from selfray.experiment import Experiment
    from selfray.models.encoder import Encoder

    Image = str | Path | bytes | Picture | np.ndarray
    """A file, a file's bytes, a Pillow image, or uint8 [H, W, 3] RGB."""


def pretrain(experiment: "Experiment", console: "Console | None" = None) -> "RunResult":
    """Start a run, or resume it where it stopped. Uses the running Ray, or starts one for the call.

    Args:
        experiment: what to run, such as `selfray.recipes.every()["mae-digits"]`.
        console: where progress is shown; None shows it on standard output, or in a notebook in the
            cell's output, with the run's pictures at the end.

    Raises:
        ValueError, OSError: bad input, before any worker is started.
        selfray.cluster.endings.RunFailed: the cause in one line; the last checkpoint is kept.
    """
    from selfray.cluster import runtime
    from selfray.cluster.launch import launch
    from selfray.commands import notebook
    from selfray.models import on_meta
    from selfray.storage import Location

    on_meta.require_encoder_of(experiment)  # before Ray starts
    with runtime.session():
        result = launch(experiment, console or _screen())
    if console is None and notebook.is_notebook():
        notebook.show_pictures(Location.of(result.folder))
    return result


@dataclass(frozen=True)
class Trained:
    """A pretrained encoder and the experiment that trained it."""

    encoder: "Encoder"
    """In eval mode, on the CPU; `.backbone` is a plain timm model."""
    experiment: "Experiment"

    def embed(self, images: "Sequence[Image]") -> "np.ndarray":
        """Features of the central view of each image, which is the view that probes use.

        Returns:
            float32 [n, D]; for a ViT [n, 2D], the class token followed by the mean patch token.

        Raises:
            ValueError: some images cannot be decoded; it names the first.
        """
        from selfray.data.source import evaluation_views
        from selfray.probes.features import embed

        data = self.experiment.data
        encoded = [_bytes_of(image) for image in images]
        views, readable = evaluation_views(encoded, self.encoder.config.image_size, data.channels)
        broken = [n for n, is_readable in enumerate(readable) if not is_readable]
        if broken:
            shown = images[broken[0]] if isinstance(images[broken[0]], str | Path) else broken[0]
            raise ValueError(f"{len(broken)} of {len(images)} are not images, such as {shown}")
        return embed(self.encoder, views, *data.normalization)


def load(run: str | Path) -> Trained:
    """Load the encoder of a run's folder (the checkpoint with the best probe, else the last one) or
    of one checkpoint. FileNotFoundError and ValueError say what is there instead."""
    from selfray.runs import checkpoint
    from selfray.runs.checkpoint import Checkpoint
    from selfray.storage import Location

    place = Location.of(str(run))
    is_one = (place / checkpoint.MANIFEST).exists()
    found = None if is_one else checkpoint.best(place)
    found = found or Checkpoint.open(place)
    return Trained(found.encoder(), found.experiment())


def evaluate(*encoders: str, data: str | None = None, **options: Any) -> dict[str, Any]:
    """Judge encoders on labelled images, as `selfray evaluate` does, with its options by name.

    Args:
        encoders: runs, checkpoints, exported files or timm:NAME.
        data: labelled images; None takes the training data of the first run.
        options: fields of `selfray.commands.evaluate.Evaluate`, such as `test` or `by`.

    Returns:
        The content of its --json file: figures with intervals by data set and encoder.
    """
    from selfray.commands.evaluate import Evaluate
    from selfray.storage import Location

    sets = () if data is None else (data,)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "numbers.json")
        command = Evaluate(tuple(encoders), sets, **{"json": file, "no_track": True, **options})
        command.run(_screen())
        return Location.of(command.json or file).read_json()


def _screen() -> "Console":
    from selfray.commands import notebook
    from selfray.console import Console

    return notebook.NotebookConsole() if notebook.is_notebook() else Console(sys.stdout, None)


def _bytes_of(image: Any) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    import numpy as np

    from selfray.pixels.codecs import encode_png

    pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"an array must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    return encode_png(np.ascontiguousarray(pixels))
