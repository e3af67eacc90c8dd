"""References to encoders of any origin, as data from which a task on any machine can load them."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import safetensors.torch
import torch

from selfray import config
from selfray.check import require
from selfray.experiment import Experiment
from selfray.models import names
from selfray.models.encoder import Encoder, EncoderConfig, export_weights, import_weights
from selfray.models.portable import WEIGHTS, own_weights
from selfray.runs import starting
from selfray.runs.checkpoint import Checkpoint
from selfray.storage import Location
from selfray.train import TrainState

TIMM = "timm:"
UNTRAINED = "untrained"
ENCODER_CONFIG = "encoder_config"
"""The key of an exported file's header that holds the EncoderConfig as JSON."""
Channels = tuple[float, ...]


@dataclass(frozen=True)
class EncoderRef:
    """An encoder that a task can load by itself, from a run, a file, or timm. Exactly one of
    `experiment`, `file` and `timm_name` is set."""

    experiment: str | None = None
    """The Experiment as JSON."""
    checkpoint: str | None = None
    """A checkpoint's folder; None means the experiment's weights before the first step."""
    file: str | None = None
    """A file written by `selfray export`."""
    timm_name: str | None = None
    """The name of a timm model with published weights."""
    started: str | None = None
    """The folder of the experiment's run, if the weights that it started from are meant."""

    @classmethod
    def untrained(cls, experiment: Experiment) -> "EncoderRef":
        return cls(config.dumps(experiment), None)

    @classmethod
    def start(cls, experiment: Experiment, run: Location) -> "EncoderRef":
        """The weights that a run started from: public ones, a checkpoint's, or random ones."""
        return cls(config.dumps(experiment), started=run.uri)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "EncoderRef":
        return cls(config.dumps(checkpoint.experiment()), checkpoint.location.uri)

    @classmethod
    def of_file(cls, path: str) -> "EncoderRef":
        """A file written by `selfray export`, or its folder. Raises ValueError for other files."""
        place = Location.of(path)
        if place.is_folder():
            place = place / WEIGHTS
        ref = cls(file=place.uri)
        _ = ref.encoder_config
        return ref

    @classmethod
    def of_timm(cls, name: str) -> "EncoderRef":
        """A timm model. Raises ValueError if timm has no such model or no weights for it."""
        ref = cls(timm_name=name)
        _ = ref.encoder_config
        return ref

    @property
    def is_untrained(self) -> bool:
        """Whether it is a run's encoder before its first step."""
        return self.experiment is not None and self.checkpoint is None

    @property
    def width(self) -> int:
        """D, the width of the class token."""
        with torch.device("meta"):
            return self.encoder_config.build().width

    @cached_property
    def encoder_config(self) -> EncoderConfig:
        if self.experiment is not None:
            return self._experiment.encoder
        if self.file is not None:
            return config.loads(self._header[ENCODER_CONFIG])
        assert self.timm_name is not None
        return EncoderConfig(self.timm_name, image_size=self._timm["input_size"][1])

    @cached_property
    def normalization(self) -> tuple[Channels, Channels]:
        """(mean, std) of the channels, in 0..1."""
        if self.experiment is not None:
            return self._experiment.data.normalization
        known: dict[str, Any] = self._header if self.file is not None else self._timm
        mean, std = (known[name] for name in ("mean", "std"))
        mean, std = ((json.loads(v) if isinstance(v, str) else v) for v in (mean, std))
        return tuple(mean), tuple(std)  # type: ignore[return-value]

    @property
    def digest(self) -> str:
        """64 hex digits that identify the weights."""
        if self.checkpoint is not None:
            files = Checkpoint.open(self.checkpoint).manifest["files"]
            return files["encoder.safetensors"]["sha256"]
        if self.experiment is not None:
            start = self._experiment
            known = config.dumps(start.method), config.dumps(start.encoder), str(start.seed)
            return hashlib.sha256("\n".join(known).encode()).hexdigest()
        if self.file is not None:
            return hashlib.sha256(Location.of(self.file).read_bytes()).hexdigest()
        digest = hashlib.sha256()
        for name, tensor in sorted(export_weights(self.load()).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def load(self) -> Encoder:
        """Load the encoder, in eval mode on the CPU. Raises ValueError or OSError if it cannot."""
        if self.checkpoint is not None:
            return Checkpoint.open(self.checkpoint).encoder()
        if self.experiment is not None and self.started is not None:
            run = Location.of(self.started)
            return starting.state(self._experiment, run, total_images=1).method.encoder.eval()
        if self.experiment is not None:
            return TrainState.start(self._experiment, total_images=1).method.encoder.eval()
        encoder = self.encoder_config.build()
        if self.file is not None:
            weights = safetensors.torch.load(Location.of(self.file).read_bytes())
            import_weights(encoder, own_weights(encoder.config, weights))
        else:
            import_weights(encoder, self._timm_weights())
        return encoder.eval()

    @cached_property
    def _experiment(self) -> Experiment:
        assert self.experiment is not None
        return config.loads(self.experiment)

    @cached_property
    def _header(self) -> dict[str, str]:
        assert self.file is not None
        data = Location.of(self.file).read_bytes()
        try:
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        except (ValueError, AttributeError):
            raise ValueError(f"{self.file} is not a safetensors file") from None
        require(
            ENCODER_CONFIG in header,
            f"{self.file} does not say which encoder it holds: give a file written by this "
            "version's `selfray export`",
        )
        return header

    @cached_property
    def _timm(self) -> dict[str, Any]:
        assert self.timm_name is not None
        if not names.is_model(self.timm_name):
            similar = " or ".join(names.similar(self.timm_name))
            hint = f"; did you mean {similar}?" if similar else ""
            raise ValueError(f"timm has no model {self.timm_name}{hint}")
        import timm

        found = timm.models.get_pretrained_cfg(self.timm_name)
        require(found is not None, f"timm:{self.timm_name} has no published weights")
        return found.to_dict()  # type: ignore[union-attr]

    def _timm_weights(self) -> dict[str, torch.Tensor]:
        assert self.timm_name is not None
        # With the encoder's options, not only the name: BEiT's pooling differs from timm's.
        options = self.encoder_config.options
        import timm

        try:
            return timm.create_model(self.timm_name, pretrained=True, **options).state_dict()
        except (OSError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise OSError(
                f"{TIMM}{self.timm_name}: its weights are not on this machine and cannot be "
                f"fetched ({first}): fetch them on a machine with network, or export a run instead"
            ) from None
