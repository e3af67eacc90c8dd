"""LightlySSL's modules in training loops like those of its examples, for gpu_session.py.

A step consists of the bare minimum: a float32 batch on the device, forward, loss, backward, the
updates of optimizer and teacher. `float32` is the setting of the examples; `bf16` adds autocast.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from selfray.experiment import Experiment

OneStep = Callable[[], None]


def loops(
    recipe: str, wanted: Experiment, batch_size: int, device: torch.device
) -> dict[str, Callable[[], OneStep]]:
    """Loop's name -> function that builds it; that raises ImportError if lightly is not
    installed."""
    build = {"mae": mae, "dino": dino, "simclr": simclr}[recipe]
    return {
        f"lightly {precision}": partial(build, wanted, batch_size, device, precision)
        for precision in ("float32", "bf16")
    }


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _images(wanted: Experiment, group: str, batch_size: int, device: torch.device) -> Tensor:
    views = wanted.views[group]
    size = views[0].size
    assert size is not None
    return torch.randn(len(views), batch_size, 3, size, size, device=device)  # [V, B, 3, H, W]


def _update(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _backbone(wanted: Experiment, device: torch.device) -> nn.Module:
    return wanted.encoder.build().backbone.to(device)


def simclr(wanted: Experiment, batch_size: int, device: torch.device, precision: str) -> OneStep:
    from lightly.loss import NTXentLoss  # type: ignore[import-not-found]
    from lightly.models.modules import SimCLRProjectionHead  # type: ignore[import-not-found]

    backbone = _backbone(wanted, device)
    width = wanted.encoder.build().width
    head = SimCLRProjectionHead(width, width, 128).to(device)
    criterion = NTXentLoss(temperature=0.1)
    optimizer = SGD([*backbone.parameters(), *head.parameters()], lr=1e-6, momentum=0.9)
    first, second = _images(wanted, "global", batch_size, device)

    def step() -> None:
        with _autocast(precision, device):
            loss = criterion(*(head(backbone(view).flatten(1)) for view in (first, second)))
        _update(optimizer, loss)

    return step


def dino(wanted: Experiment, batch_size: int, device: torch.device, precision: str) -> OneStep:
    from lightly.loss import DINOLoss  # type: ignore[import-not-found]
    from lightly.models.modules import DINOProjectionHead  # type: ignore[import-not-found]
    from lightly.models.utils import deactivate_requires_grad, update_momentum  # type: ignore[import-not-found]

    method: Any = wanted.method

    def network() -> nn.Module:
        encoder = wanted.encoder.build()
        return nn.Sequential(
            encoder.backbone,
            DINOProjectionHead(encoder.width, method.hidden, method.bottleneck, method.prototypes),
        ).to(device)

    student, teacher = network(), network()
    teacher.load_state_dict(student.state_dict())
    deactivate_requires_grad(teacher)
    criterion = DINOLoss(output_dim=method.prototypes).to(device)
    optimizer = AdamW(student.parameters(), lr=1e-6)
    large = list(_images(wanted, "global", batch_size, device))
    small = list(_images(wanted, "local", batch_size, device))

    def step() -> None:
        update_momentum(student, teacher, 0.996)
        with _autocast(precision, device):
            aims = [teacher(view) for view in large]
            answers = [student(view) for view in large + small]
            loss = criterion(aims, answers, epoch=0)
        _update(optimizer, loss)

    return step


def mae(wanted: Experiment, batch_size: int, device: torch.device, precision: str) -> OneStep:
    from lightly.models import utils  # type: ignore[import-not-found]
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM  # type: ignore[import-not-found]

    method: Any = wanted.method
    encoder = wanted.encoder
    # A plain timm model; LightlySSL replaces its position embeddings.
    plain: Any = timm.create_model(encoder.name, **encoder.options, dynamic_img_size=True)
    backbone = MaskedVisionTransformerTIMM(vit=plain).to(device)
    patches, patch = backbone.sequence_length, encoder.patch
    decoder = MAEDecoderTIMM(
        num_patches=patches - 1,
        patch_size=patch,
        embed_dim=plain.embed_dim,
        decoder_embed_dim=method.decoder_width,
        decoder_depth=method.decoder_depth,
        decoder_num_heads=method.decoder_heads,
    ).to(device)
    optimizer = AdamW([*backbone.parameters(), *decoder.parameters()], lr=1e-6)
    (images,) = _images(wanted, "global", batch_size, device)

    def step() -> None:
        with _autocast(precision, device):
            kept, hidden = utils.random_token_mask(
                size=(batch_size, patches), mask_ratio=method.mask_ratio, device=device
            )
            seen = decoder.embed(backbone.encode(images=images, idx_keep=kept))
            tokens = utils.repeat_token(decoder.mask_token, (batch_size, patches))
            tokens = utils.set_at_index(tokens, kept, seen.type_as(tokens))
            decoded = utils.get_at_index(decoder.decode(tokens), hidden)
            target = utils.get_at_index(utils.patchify(images, patch), hidden - 1)
            loss = nn.functional.mse_loss(decoder.predict(decoded), target)
        _update(optimizer, loss)

    return step
