"""What to run on a data set of which nothing is known but its images: a recipe, flags and reasons.

The rules are few and said: small images or no GPU -> SimCLR on a ResNet, which learns most from few
steps; large images on a GPU -> DINO on a ViT, whose features serve kNN and linear probes as they
are, from 20,000 images on; fewer images than that -> SimCLR on a ResNet-50.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

SMALL_SIDE = 96
"""Pixels up to which images are small: the CIFAR-10 recipes are made for them."""
MANY_IMAGES = 20_000
"""From so many on, a ViT is worth its hunger."""
FEW_IMAGES = 1_000

CPU_SECONDS = 1800
CPU_RATE = 115
"""SimCLR's images/s on one core with the small ResNet below (benchmarks/README.md)."""
SMALL_RESNET = "1 1 1 1", "32 64 128 256"
"""Blocks and channels of the small ResNet's four stages."""
IMAGES_SEEN = 20_000_000
"""On a GPU: 100 epochs of 200,000 images, 400 of CIFAR-10."""


@dataclass(frozen=True)
class Facts:
    """What is known of the images and of the machines."""

    images: int
    side: int
    """The median of the images' shorter sides, in pixels."""
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Proposal:
    recipe: str
    flags: Mapping[str, str]
    """Flag -> its values, as typed."""
    reasons: tuple[str, ...]
    """One line each."""

    def without(self, given: set[str]) -> "Proposal":
        """The proposal without flags that the user gives."""
        flags = {flag: value for flag, value in self.flags.items() if flag not in given}
        return Proposal(self.recipe, flags, self.reasons)

    @property
    def words(self) -> list[str]:
        """As `selfray pretrain` takes them."""
        flags = (word for flag, values in self.flags.items() for word in (flag, *values.split()))
        return [self.recipe, *flags]


def propose(facts: Facts) -> Proposal:
    """A recipe, flags and reasons for these facts. ValueError where there are too few images."""
    if facts.images < 2:
        raise ValueError(f"--data.path holds {facts.images} images: nothing can be learned of them")
    found = _on_cpu(facts) if facts.gpus == 0 else _on_gpu(facts)
    reasons = found.reasons
    if facts.images < FEW_IMAGES:
        reasons += (
            f"{facts.images:,} images are few: going on from public weights (--init-from) or more "
            "unlabelled images will be worth more than any setting",
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
    if size > 32:  # the usual stem makes more pixels no dearer than 32 with the small one
        flags["--encoder.no-small-stem"] = ""
    reasons = (
        "SimCLR: no GPU is here, and of nine methods it learns most in few steps",
        f"a small ResNet at {size} pixels: what a CPU trains in minutes; a GPU allows ten times "
        "the encoder",
        f"batch {batch}: " + _why(batch, facts.images),
        f"{epochs} epochs: about {minutes:,} min on one core, an estimate from another machine",
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
    """The largest power of two, times `parts`, up to what is wanted and an eighth of the images."""
    most = max(parts, min(wanted, images // 8 or 1))
    return parts * 2 ** int(math.log2(max(1, most // parts)))


def _why(batch: int, images: int) -> str:
    return f"{images // batch:,} steps an epoch; the learning rate follows it"


def _between(value: int, least: int, most: int) -> int:
    return min(most, max(least, value))
