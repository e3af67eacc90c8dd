"""Proposes a recipe and flags, with reasons, from the images' number and size and the machines.

The rules: small images or no GPU -> SimCLR on a ResNet, which learns most in few steps; 20,000 or
more large images on a GPU -> DINO on a ViT, whose features suit kNN and linear probes without
fine-tuning; fewer large images on a GPU -> SimCLR on a ResNet-50.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

SMALL_SIDE = 96
"""Images of at most this many pixels a side are small: the CIFAR-10 recipes suit them."""
MANY_IMAGES = 20_000
"""A ViT is proposed from this number of images on: it needs more data than a ResNet."""
FEW_IMAGES = 1_000
"""Below this number, public weights or more images are recommended."""

CPU_SECONDS = 1800
"""Training time on one core that the number of epochs aims at."""
CPU_RATE = 115
"""SimCLR's images/s on one core with the small ResNet below (benchmarks/README.md)."""
SMALL_RESNET = "1 1 1 1", "32 64 128 256"
"""Blocks and channels of the small ResNet's four stages."""
IMAGES_SEEN = 20_000_000
"""Images seen that the number of epochs on a GPU aims at: 100 epochs of 200,000 images, or 400 of
CIFAR-10."""


@dataclass(frozen=True)
class Facts:
    """The images' number and size, and the cluster's CPUs and GPUs."""

    images: int
    side: int
    """The median of the images' shorter sides, in pixels."""
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Proposal:
    """A recipe, the flags to give it, and why."""

    recipe: str
    flags: Mapping[str, str]
    """Flag -> its values as typed, separated by spaces."""
    reasons: tuple[str, ...]
    """One line each."""

    def without(self, given: set[str]) -> "Proposal":
        """The proposal without the flags in `given`, which the user sets."""
        flags = {flag: value for flag, value in self.flags.items() if flag not in given}
        return Proposal(self.recipe, flags, self.reasons)

    @property
    def words(self) -> list[str]:
        """The arguments of `selfray pretrain`."""
        flags = (word for flag, values in self.flags.items() for word in (flag, *values.split()))
        return [self.recipe, *flags]


def propose(facts: Facts) -> Proposal:
    """The proposal for these facts. ValueError for fewer than two images."""
    if facts.images < 2:
        raise ValueError(f"--data.path holds {facts.images} images: pretraining needs at least 2")
    found = _on_cpu(facts) if facts.gpus == 0 else _on_gpu(facts)
    reasons = found.reasons
    if facts.images < FEW_IMAGES:
        reasons += (
            f"{facts.images:,} images are few: starting from public weights (--init-from) or "
            "adding unlabelled images helps more than any setting",
        )
    return Proposal(found.recipe, found.flags, reasons)


def _on_cpu(facts: Facts) -> Proposal:
    size = 32 if facts.side <= 48 else 64 if facts.side < 128 else 96
    batch = _batch(facts.images, 256)
    epochs = _between(math.ceil(CPU_SECONDS * CPU_RATE / facts.images), 10, 200)
    minutes = max(1, round(epochs * facts.images / CPU_RATE / 60))
    layers, channels = SMALL_RESNET
    flags = {
        "--encoder.image-size": f"{size}",
        "--encoder.layers": layers,
        "--encoder.channels": channels,
        "--optimizer.name": "adamw",
        "--optimizer.base-learning-rate": "2e-3",
        "--optimizer.schedule.warmup-fraction": "0.1",
        "--batch-size": f"{batch}",
        "--epochs": f"{epochs}",
    }
    if size > 32:  # with the usual stem, 64 or 96 pixels cost no more than 32 with the small one
        flags["--encoder.no-small-stem"] = ""
    reasons = (
        "SimCLR: without a GPU, it learns most in few steps among nine methods",
        f"a small ResNet at {size} pixels: a CPU trains it in minutes; a GPU allows an encoder ten "
        "times the size",
        f"batch {batch}: " + _why(batch, facts.images),
        f"{epochs} epochs: about {minutes:,} min on one core, estimated on another machine",
    )
    return Proposal("simclr-cifar10", flags, reasons)


def _on_gpu(facts: Facts) -> Proposal:
    epochs = _between(math.ceil(IMAGES_SEEN / facts.images), 100, 800)
    flags = {"--epochs": f"{epochs}", "--precision": "bf16"}
    if facts.gpus > 1:
        flags["--workers"] = f"{facts.gpus}"
    seen = f"{epochs} epochs: {epochs * facts.images / 1e6:,.0f} million images seen"
    if facts.side <= SMALL_SIDE:
        size = 32 if facts.side <= 48 else 64
        recipe, wanted = "simclr-cifar10", 512
        flags["--encoder.image-size"] = f"{size}"
        why = f"SimCLR on a ResNet-18 with a small stem: the images have about {facts.side} pixels"
    elif facts.images < MANY_IMAGES:
        recipe, wanted = "simclr-imagenet", 256 * facts.gpus
        why = f"SimCLR on a ResNet-50: {facts.images:,} images are few for a ViT from scratch"
    else:
        recipe, wanted = "dino-imagenet", 128 * facts.gpus
        why = "DINO on a ViT-S: its features serve kNN and linear probes without fine-tuning"
    batch = _batch(facts.images, wanted, facts.gpus)
    flags["--batch-size"] = f"{batch}"
    if facts.images < 50_000 and facts.side > SMALL_SIDE:
        why += "; public weights would be a better start (dinov2-adapt with --init-from)"
    return Proposal(recipe, flags, (why, f"batch {batch}: {_why(batch, facts.images)}", seen))


def _batch(images: int, wanted: int, parts: int = 1) -> int:
    """The largest batch size `parts` * 2**k that exceeds neither `wanted` nor an eighth of the
    images."""
    most = max(parts, min(wanted, images // 8 or 1))
    return parts * 2 ** int(math.log2(max(1, most // parts)))


def _why(batch: int, images: int) -> str:
    return f"{images // batch:,} steps an epoch; the learning rate scales with the batch size"


def _between(value: int, least: int, most: int) -> int:
    return min(most, max(least, value))
