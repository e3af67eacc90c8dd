"""Checks before a run starts: its paths, its starting weights, disk space for checkpoints.

Every error is one line that names the flag.
"""

import os
import shutil
from dataclasses import replace

from selfray import config
from selfray.experiment import Experiment
from selfray.models import weights
from selfray.runs import starting
from selfray.runs.checkpoint import Checkpoint
from selfray.storage import Location


def located(experiment: Experiment) -> Experiment:
    """The experiment with absolute paths to its inputs other than images."""
    start = experiment.init_from and weights.located(experiment.init_from)
    return replace(experiment, init_from=start, method=experiment.method.located())


def check_init_from(experiment: Experiment) -> None:
    """Raise ValueError or FileNotFoundError if the checkpoint in --init-from does not fit. Public
    weights are checked by `starting.keep`, which reads them."""
    if experiment.init_from is None or starting.starts_from_public(experiment):
        return
    theirs = Checkpoint.open(experiment.init_from).experiment()
    if type(theirs.method) is not type(experiment.method):
        raise ValueError(
            f"--init-from {experiment.init_from} is a checkpoint of {theirs.method.name}, but this "
            f"run trains {experiment.method.name}: give a checkpoint of {experiment.method.name}, "
            f"or use a {theirs.method.name} recipe"
        )
    # A ViT's positions are interpolated for another image size; a ResNet has none.
    may_differ = {name: getattr(theirs.encoder, name) for name in NOT_IN_WEIGHTS}
    different = config.differences(replace(experiment.encoder, **may_differ), theirs.encoder)
    if different:
        raise ValueError(
            f"--init-from {experiment.init_from} has another encoder: encoder.{different[0]}; give "
            "the same --encoder fields; only image size and stochastic depth may differ"
        )


NOT_IN_WEIGHTS = ("image_size", "drop_path", "drop_path_uniform")
"""Fields of an encoder that do not affect its weights, except for interpolated positions."""


def check_output(run: Location, needed_bytes: int) -> None:
    """Create the run's folder, and check that it can be written and has enough space. Raises
    OSError with one line."""
    probe = run / f".write-test-{os.getpid()}"
    try:
        run.make_folder()
        probe.write_bytes(b"\0" * 2**20)
        probe.filesystem.delete_file(probe.path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
        raise OSError(
            f"--output: {run} cannot be written ({reason}): give --output another folder, or make "
            "room or permission there"
        ) from None
    if run.is_local:
        free = shutil.disk_usage(run.path).free
        if free < needed_bytes:
            raise OSError(
                f"--output: the disk of {run} has {_megabytes(free)} free and this run's "
                f"checkpoints need {_megabytes(needed_bytes)}: make room, give --output another "
                "folder or --checkpoint.keep 1"
            )


def checkpoint_bytes(experiment: Experiment) -> int:
    """Approximate peak size in bytes of a run's checkpoints."""
    import torch

    with torch.device("meta"):
        method = experiment.method.build(experiment.encoder.build())
    state = sum(p.numel() * p.element_size() for p in method.state_dict().values())
    encoder = sum(p.numel() * p.element_size() for p in method.encoder.state_dict().values())
    moments = 2 if experiment.optimizer.name == "adamw" else 1
    # The kept ones, the best one, and the next while it is written.
    return (experiment.checkpoint.keep + 2) * ((1 + moments) * state + encoder)


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
