"""The weights that a run starts from: random ones, a checkpoint's, or public ones.

The driver reads public weights once and stores them in the run's folder in the encoder's shapes. So
train workers and probes on other machines need no file, network or pickle, and a run can still be
compared with its start after the original file is gone.
"""

import json
from collections.abc import Callable
from dataclasses import replace

import safetensors
import safetensors.torch
import torch

from selfray.data.measured import Statistics
from selfray.experiment import Experiment
from selfray.models import weights
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.models.fitting import fitted_for
from selfray.models.layouts import DINOV3_LICENCE
from selfray.runs.checkpoint import Checkpoint, latest
from selfray.runs.folder import START
from selfray.storage import Location
from selfray.train import TrainState

_FACTS = "selfray.start"
_LEAST_STD = 1e-3
"""Smallest deviation used, for channels with constant values."""


def keep(experiment: Experiment, run: Location, say: Callable[[str], None]) -> dict[str, str]:
    """Store the public weights that a run starts from, unless done before, and print what was
    taken.

    Returns:
        Tags about them: `start.from`, `start.layout`, `start.share`, `start.sha256` and
        `start.licence`; empty if the run does not start from public weights.

    Raises:
        ValueError, FileNotFoundError: one line; the weights are damaged, belong to another encoder,
            have an unknown layout or cannot be fetched.
    """
    if not starts_from_public(experiment):
        return {}
    assert experiment.init_from is not None
    place = run / START
    if not place.exists():
        found = fitted_for(experiment.init_from, experiment.encoder, experiment.init_share)
        facts = {
            "start.from": experiment.init_from,
            "start.layout": found.weights.named.layout,
            "start.share": f"{found.share:.4f}",
            "start.sha256": found.weights.sha256 or "",
            "start.licence": found.weights.named.licence or "",
        }
        header = {_FACTS: json.dumps({"tags": facts, "said": found.described})}
        tensors = {name: tensor.contiguous().clone() for name, tensor in found.tensors.items()}
        place.write_bytes(safetensors.torch.save(tensors, header))
    _, told = _kept(place)
    for line in told["said"]:
        say(line)
    return {name: value for name, value in told["tags"].items() if value}


def normalized(
    experiment: Experiment,
    measured: Statistics | None,
    run: Location,
    say: Callable[[str], None],
) -> Experiment:
    """The experiment with its final mean and deviation: those measured by the build of the shards,
    unless flags give others. A resumed run keeps its own, and a run that starts from a checkpoint
    takes the checkpoint's. Raises ValueError if there are none for these channels."""
    data = experiment.data
    known = measured and measured.normalization(data.channels)
    has_own = len(data.mean) == data.channels
    if (found := latest(run)) is not None:
        known = found.experiment().data.measured
    elif data.statistics == "given":
        known = None
    elif experiment.init_from is not None and not starts_from_public(experiment):
        theirs = Checkpoint.open(experiment.init_from).experiment().data.normalization
        known = theirs if len(theirs[0]) == data.channels else known
    elif experiment.init_from is not None and has_own:
        known = None
    elif known is not None:
        known = known[0], tuple(max(deviation, _LEAST_STD) for deviation in known[1])
        mean, std = (" ".join(f"{value:.3f}" for value in values) for values in known)
        say(
            f"images are normalised by their own mean {mean} and std {std}, as the build of the "
            "shards measured them (--data.mean and --data.std win)"
        )
    resolved = replace(experiment, data=replace(data, measured=known))
    _ = resolved.data.normalization
    return resolved


def starts_from_public(experiment: Experiment) -> bool:
    return experiment.init_from is not None and weights.is_public(experiment.init_from)


def state(
    experiment: Experiment,
    run: Location,
    total_images: int,
    device: torch.device | str = "cpu",
) -> TrainState:
    """The state before the first step: encoder and teacher have the weights stored by `keep` or
    those of the checkpoint in --init-from; otherwise random weights from the seed."""
    if starts_from_public(experiment):
        tensors, _ = _kept(run / START)
        started = TrainState.start(experiment, total_images, device)
        # After building, because methods initialise the encoder themselves. Students and teachers
        # get the weights; a tokenizer's encoder, which has only buffers, does not.
        for part in started.method.modules():
            if isinstance(part, Encoder) and next(part.parameters(), None) is not None:
                part.backbone.load_state_dict(part.backbone.state_dict() | tensors)
        return started
    started = TrainState.start(experiment, total_images, device)
    if experiment.init_from is not None:
        started.load_weights(Checkpoint.open(experiment.init_from).state())
    return started


def _kept(place: Location) -> tuple[dict[str, torch.Tensor], dict]:
    data = place.read_bytes()
    length = int.from_bytes(data[:8], "little")
    told = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_FACTS])
    return safetensors.torch.load(data), told


def licence_of(init_from: str | None, encoder: EncoderConfig) -> str | None:
    """The licence that a run's weights inherit from the weights it started from; None without
    one."""
    if init_from is None:
        return None
    if "dinov3" in encoder.name or "dinov3" in init_from:
        return DINOV3_LICENCE
    return weights.licence_in_timm(init_from)
