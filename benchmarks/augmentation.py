"""Augmentation on one core: JPEG or PNG bytes -> two SimCLR views, ours beside torchvision's.

    python benchmarks/augmentation.py                          # scikit-learn's two photographs
    python benchmarks/augmentation.py --images photos/         # yours
    python benchmarks/augmentation.py --images cifar10/ --size 32 --no-blur

Every contestant gets the same bytes, decodes them and draws the same two views' distribution, on
one thread. They take turns in short rounds, so that a busy machine slows all of them alike; the
table shows the median round and the ratio to torchvision on PIL images, the field's usual pipeline.
"""

import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
import tyro
from PIL import Image
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from selfray.augment import augment_batch
from selfray.shards import open_shards, parquet_files, read_rows, sample_rows
from selfray.views import ColorJitter, View, blur_kernel_size

SIGMA = (0.1, 2.0)


@dataclass(frozen=True)
class Benchmark:
    images: str | None = None
    """A folder of image files, or of Parquet shards; None takes scikit-learn's two photographs."""
    size: int = 224
    """Side of the views in pixels."""
    blur: bool = True
    """SimCLR's Gaussian blur with probability 0.5; its CIFAR recipe has none."""
    count: int = 64
    """Images in a round."""
    rounds: int = 7
    output: Path = Path("runs/bench/augmentation.json")


def main() -> None:
    settings = tyro.cli(Benchmark, description=__doc__)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    images = load(settings)
    contestants = {
        "selfray": ours(settings),
        "torchvision v2, uint8 tensors": torchvision_tensors(settings),
        "torchvision, PIL images": torchvision_pil(settings),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(settings.rounds + 1):
        for name, run in contestants.items():
            started = time.perf_counter()
            run(images)
            if round_number:  # the first warms up
                rates[name].append(len(images) / (time.perf_counter() - started))
    size = sum(map(len, images)) / len(images) / 1000
    print(f"{len(images)} images of {size:.1f} kB, two views of {settings.size} pixels, one core")
    print(f"{'':32}{'images/s':>10}{'range':>16}{'ratio':>8}")
    base = statistics.median(rates["torchvision, PIL images"])
    result = {}
    for name, measured in rates.items():
        middle = statistics.median(measured)
        low_high = f"{min(measured):,.0f} - {max(measured):,.0f}"
        print(f"{name:32}{middle:10,.0f}{low_high:>16}{middle / base:7.1f}x")
        result[name] = {"images_per_second": middle, "ratio_to_torchvision_pil": middle / base}
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text(json.dumps(result, indent=1))


def load(settings: Benchmark) -> list[bytes]:
    """`count` encoded images, repeated where there are fewer."""
    if settings.images is None:
        from sklearn.datasets import load_sample_images

        folder = Path(load_sample_images.__code__.co_filename).parent / "images"
        found = [file.read_bytes() for file in sorted(folder.glob("*.jpg"))]
    elif any(Path(settings.images).glob("*.parquet")):
        shards = open_shards(parquet_files(settings.images), settings.images)
        groups, rows = sample_rows(shards, settings.count)
        found = list(read_rows(shards, groups, rows)[0])
    else:
        files = sorted(file for file in Path(settings.images).rglob("*") if file.is_file())
        found = [file.read_bytes() for file in files[: settings.count]]
    return [found[i % len(found)] for i in range(settings.count)]


Run = Callable[[Sequence[bytes]], object]


def ours(settings: Benchmark) -> Run:
    view = View(
        size=settings.size,
        crop_scale=(0.08, 1.0),
        color_jitter=ColorJitter(),
        grayscale=0.2,
        blur=0.5 if settings.blur else 0.0,
    )
    return lambda images: augment_batch(images, {"global": (view, view)}, seed=0, epoch=0)


def torchvision_pil(settings: Benchmark) -> Run:
    draw = transforms.Compose(
        [
            transforms.RandomResizedCrop(settings.size),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            transforms.RandomGrayscale(0.2),
            *([transforms.RandomApply([_blur(settings, transforms)])] if settings.blur else []),
            transforms.PILToTensor(),
        ]
    )

    def run(images: Sequence[bytes]) -> None:
        for data in images:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            for _ in range(2):
                draw(image)

    return run


def torchvision_tensors(settings: Benchmark) -> Run:
    draw = v2.Compose(
        [
            v2.RandomResizedCrop(settings.size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v2.RandomGrayscale(0.2),
            *([v2.RandomApply([_blur(settings, v2)])] if settings.blur else []),
        ]
    )

    def run(images: Sequence[bytes]) -> None:
        for data in images:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image = decode_image(encoded, ImageReadMode.RGB)
            for _ in range(2):
                draw(image)

    return run


def _blur(settings: Benchmark, library: Any) -> Any:
    """A blur of torchvision's `transforms` or of its `v2`: both have the class."""
    return library.GaussianBlur(blur_kernel_size(settings.size), SIGMA)


if __name__ == "__main__":
    main()
