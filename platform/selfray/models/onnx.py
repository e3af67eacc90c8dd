"""Writes an encoder as an ONNX file and checks it against torch. Needs the extra `onnx`."""

from pathlib import Path

import torch
from torch import Tensor, nn

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


def save_onnx(encoder: Encoder, file: Path) -> None:
    """Write an ONNX file: `images` float32 [B, C, H, W] -> `cls` [B, D], `patches` [B, N, D], any
    B."""
    side = encoder.config.image_size
    shape = (2, encoder.config.in_channels, side, side)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.onnx.export(
        _Outputs(encoder).eval(),
        (example,),
        str(file),
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}},
        external_data=False,
        verbose=False,
    )


@torch.no_grad()
def check_onnx(encoder: Encoder, file: Path, images: Tensor) -> float:
    """The largest absolute difference between the features of onnxruntime and torch, for a batch of
    images float32 [B, C, H, W] and for a single one. Raises RuntimeError if it exceeds rounding."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    worst = 0.0
    for part in (images, images[:1]):
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
