"""Tries an encoder before any process is started: on torch's device `meta`.

Tensors there have shapes but no values, so even the largest encoder takes a fraction of a second
and no memory.
"""

from collections.abc import Iterable
from functools import lru_cache

import torch

from selfray.experiment import Experiment
from selfray.method import Method
from selfray.models.encoder import EncoderConfig
from selfray.storage import one_line

IMAGES = 2
"""Images per trial; a batch norm cannot normalise a single value per channel."""


def built(experiment: Experiment) -> Method:
    """An experiment's method and encoder on `meta`, with the right shapes and dtypes.

    Raises ValueError that names the field if the encoder cannot be built or does not fit the views.
    """
    require_encoder_of(experiment)
    with torch.device("meta"):
        return experiment.method.build(experiment.encoder.build())


def require_encoder_of(experiment: Experiment) -> None:
    """Raise ValueError that names the field if an experiment's encoder cannot be built, or cannot
    process its method's views or the probes' images."""
    sizes = {view.size for group in experiment.views.values() for view in group}
    require_encoder(experiment.encoder, {experiment.encoder.image_size, *filter(None, sizes)})


def require_encoder(config: EncoderConfig, sizes: Iterable[int]) -> None:
    """Raise ValueError that names the field if an encoder cannot be built, or cannot process square
    images of each of these sizes in pixels."""
    fault = _fault(config, tuple(sorted(set(sizes))))
    if fault is not None:
        raise ValueError(fault)


@lru_cache(maxsize=64)
def _fault(config: EncoderConfig, sizes: tuple[int, ...]) -> str | None:
    """The fault in one line; None without one. timm raises various errors: AssertionError,
    AttributeError, ZeroDivisionError, IndexError, RuntimeError."""
    try:
        with torch.device("meta"):
            encoder = config.build().train()
    except ValueError as error:  # it names the field already
        return one_line(error)
    except Exception as error:
        return f"{config.given} cannot be built: {one_line(error)}"

    def fault_at(size: int) -> Exception | None:
        images = torch.empty(IMAGES, config.in_channels, size, size, device="meta")
        try:
            features = encoder(images)
        except Exception as error:
            return error
        if features.cls.shape != (IMAGES, encoder.width):
            return ValueError(
                f"its features have the shape {list(features.cls.shape)} in place of "
                f"{[IMAGES, encoder.width]}"
            )
        return None

    for size in sizes:
        error = fault_at(size)
        if error is None:
            continue
        if isinstance(error, ValueError) and "encoder." in str(error):
            return one_line(error)
        own = _own_size(config.name)
        at_own = fault_at(own) if own != size else error
        if at_own is None:
            what = "encoder.image_size" if size == config.image_size else "the method's views of"
            return (
                f"{what} {size}: encoder.name {config.name} takes no images of {size} pixels "
                f"({one_line(error)}): give its own {own}, or another --encoder.name"
            )
        if isinstance(at_own, ValueError) and "encoder." in str(at_own):
            return one_line(at_own)
        return f"{config.given} cannot be used here: {one_line(at_own)}"
    return None


def _own_size(name: str) -> int:
    """The image size in pixels for which a timm model was designed."""
    import timm  # takes seconds and imports torchvision

    known = timm.get_pretrained_cfg(name)
    return int(known.input_size[1]) if known is not None else 224
