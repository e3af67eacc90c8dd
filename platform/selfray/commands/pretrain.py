"""`selfray pretrain` and `selfray tokenizer`: run a recipe, a config file or both."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from selfray.commands.script import run_pretrain
from selfray.recipes import every

if TYPE_CHECKING:  # torch takes seconds to import
    from selfray.experiment import Experiment

PRETRAIN = """Pretrain an encoder with a recipe; every field of the recipe is a flag.

  $ selfray pretrain mae-imagenet --data.path s3://bucket/scans --workers 8
  $ selfray pretrain simclr-cifar10 --data.path cifar10/ --method.temperature 0.5
  $ selfray pretrain auto --data.path scans/          proposes a recipe and settings, with reasons
  $ selfray pretrain --config runs/mae-imagenet-1a2b3c4d/experiment.yaml --epochs 200

The same command, given again, resumes the run where it stopped. --print-config prints the whole
experiment as a file for --config."""

TOKENIZER = """Train the tokenizer whose tokens BEiT predicts; every field of the recipe is a flag.

  $ selfray tokenizer tokenizer-imagenet --data.path scans/
  $ selfray pretrain beit-imagenet --data.path scans/ --method.tokenizer runs/tokenizer-imagenet-...

The result is registered in MLflow as a new version of the model with the recipe's name."""


def pretrain(arguments: Sequence[str], description: str = PRETRAIN, prog: str = "pretrain") -> int:
    """Parse a command line and run it. Returns the exit code."""
    if arguments[:1] == ["auto"]:
        from selfray.commands import auto

        return auto.run(arguments[1:], prog)
    return run_pretrain(arguments, description, prog, time.time())


def train_tokenizer(
    arguments: Sequence[str], description: str = TOKENIZER, prog: str = "tokenizer"
) -> int:
    """As `pretrain`, for recipes of tokenizers; the result is registered in MLflow."""

    def tokenizers() -> "dict[str, Experiment]":
        from selfray.tokenizer import TokenizerConfig

        return {n: r for n, r in every().items() if isinstance(r.method, TokenizerConfig)}

    def register(*finished: object) -> None:
        from selfray.cluster.registry import register_tokenizer

        register_tokenizer(*finished)  # type: ignore[arg-type]

    return run_pretrain(arguments, description, prog, time.time(), tokenizers, register)
