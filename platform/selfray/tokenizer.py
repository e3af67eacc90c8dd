"""Tokenizers: shared by the method that trains one and the methods that predict its tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray.check import require
from selfray.method import MethodConfig, as_constants
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.models.quantizer import Quantizer
from selfray.runs.checkpoint import Checkpoint

VERSION = "version.json"
"""File in a checkpoint's folder with the tokenizer's name and version in MLflow's registry."""
HOW_TO_TRAIN = "train one with experiments/train_tokenizer.py and give its run's folder"


@dataclass(frozen=True)
class TokenizerConfig(MethodConfig):
    """A method that trains a tokenizer: its module has an `encoder` and a `quantizer`."""

    codes: int = 8192
    """Number of different tokens, K."""
    code_width: int = 32
    """Dimension in which features and codes are compared."""

    def __post_init__(self) -> None:
        for name in ("codes", "code_width"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")


class Tokenizer(nn.Module):
    """A trained, fixed tokenizer: maps images to one token per patch."""

    def __init__(self, encoder: Encoder, quantizer: Quantizer) -> None:
        super().__init__()
        self.encoder = encoder
        self.quantizer = quantizer
        as_constants(self)
        self.train(False)

    def train(self, mode: bool = True) -> "Tokenizer":
        """Stay in eval mode: stochastic depth would only add noise to the targets."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Tokens int64 [B, N] of float images [B, 3, H, W] of any size.

        The images must be normalised like those that the tokenizer was trained on.
        """
        side = self.encoder.config.image_size
        if images.shape[-1] != side:
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
        return self.quantizer.tokens(self.quantizer.embed(self.encoder(images).patches))


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer's checkpoint that was checked to fit an encoder's patches."""

    checkpoint: Checkpoint
    config: TokenizerConfig

    @classmethod
    def open(cls, path: str, encoder: EncoderConfig) -> "TokenizerFile":
        """Open the tokenizer in the folder of a run or checkpoint, for an encoder's patches.

        Raises FileNotFoundError or ValueError that names what is missing or does not fit, and the
        way out.
        """
        require(path != "", f"method.tokenizer names no tokenizer: {HOW_TO_TRAIN}")
        try:
            checkpoint = Checkpoint.open(path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"method.tokenizer: there is nothing at {path}: {HOW_TO_TRAIN}"
            ) from None
        theirs = checkpoint.experiment()
        if not isinstance(theirs.method, TokenizerConfig):
            raise ValueError(
                f"method.tokenizer {path} is a checkpoint of {theirs.method.name}, not of a "
                f"tokenizer: {HOW_TO_TRAIN}"
            )
        grid = theirs.encoder.grid
        require(
            grid == encoder.grid,
            f"method.tokenizer {path} cuts an image into {grid} x {grid} tokens and "
            f"encoder.name {encoder.name} into {encoder.grid} x {encoder.grid} patches: give "
            "another --encoder.image-size or --encoder.patch-size, or another tokenizer",
        )
        return cls(checkpoint, theirs.method)

    @property
    def digest(self) -> str:
        """sha256 of its weights, in hex."""
        return self.checkpoint.digest

    @property
    def version(self) -> str | None:
        """Its name and version in the registry; None if it was not registered."""
        try:
            known = (self.checkpoint.location / VERSION).read_json()
        except FileNotFoundError:
            return None
        return f"{known['model']} {known['version']}"

    def load(self) -> Tokenizer:
        with torch.device("cpu"):  # the caller may build its own modules on another device
            encoder = self.checkpoint.encoder()
            quantizer = Quantizer(encoder.width, self.config.codes, self.config.code_width)
        prefix = "quantizer."
        state = self.checkpoint.state()["method"]
        quantizer.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
        return Tokenizer(encoder, quantizer)
