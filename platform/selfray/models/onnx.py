"""Writes an encoder as an ONNX file and checks it against torch. Needs the extra `onnx`."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray.check import require
from selfray.models.encoder import Encoder

OPSET = 18
INPUT, OUTPUTS = "images", ("cls", "patches")


class _Outputs(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        cls, patches = self.encoder(images)
        return cls, patches


def save_onnx(encoder: Encoder, file: Path, any_size: bool = False) -> None:
    """Write an ONNX file: `images` float32 [B, C, H, W] -> `cls` [B, D], `patches` [B, N, D], any
    B; with `any_size`, any H and W that are multiples of a ViT's patches, too. ValueError if the
    encoder cannot take other sizes."""
    config = encoder.config
    batch = torch.export.Dim("batch", min=1)
    dynamic: dict[int, Any] = {0: batch}
    side = (config.image_size, config.image_size)
    if any_size:
        require(
            config.is_vit and not (config.is_beit or config.is_rotary),
            f"--any-size is for ViTs with learned or sine-cosine positions, not for {config.name}",
        )
        dynamic[2] = config.patch * torch.export.Dim("rows", min=2)
        dynamic[3] = config.patch * torch.export.Dim("columns", min=2)
        grid = config.image_size // config.patch
        side = (config.patch * (grid + 1), config.patch * (grid + 2))  # no size is special
    shape = (2, config.in_channels, *side)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.onnx.export(
        _Outputs(encoder).eval(),
        (example,),
        str(file),
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        dynamic_shapes={INPUT: dynamic},
        external_data=False,
        verbose=False,
    )


@torch.no_grad()
def check_onnx(encoder: Encoder, file: Path, images: Tensor, any_size: bool = False) -> float:
    """The largest absolute difference between the features of onnxruntime and torch, for a batch of
    images float32 [B, C, H, W] and for a single one; with `any_size`, for smaller and larger ones,
    too. Raises RuntimeError if it exceeds rounding."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    worst = 0.0
    parts = [images, images[:1]]
    if any_size:
        side, patch = encoder.config.image_size, encoder.config.patch
        sizes = ((side + 2 * patch, side + patch), (max(2 * patch, side - patch), side))
        parts += [F.interpolate(images, size, mode="bilinear") for size in sizes]
    for part in parts:
        expected = encoder(part)
        found = session.run(None, {INPUT: part.numpy()})
        for ours, theirs in zip(expected, found, strict=True):
            theirs = torch.from_numpy(theirs)  # type: ignore[arg-type]
            if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
                raise RuntimeError(
                    f"onnxruntime computes different features for {encoder.config.name}: please "
                    "report it"
                )
            worst = max(worst, float((ours - theirs).abs().max()))
    return worst
