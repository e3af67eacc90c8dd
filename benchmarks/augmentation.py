"""Compares the augmentation's speed on one core with LightlySSL, torchvision, albumentations and
DALI.

    make bench                                                  # installs the peers and runs this
    python benchmarks/augmentation.py --photos photos/ --small cifar10/

Every contestant gets the same encoded images, decodes them and draws views of the same sizes with
the same operations and probabilities, as uint8 if it can, else in its own format. Each runs in its
own process on one core with one thread. They take turns in short rounds, one at a time, so that a
busy machine slows all alike. The table has the median round, the range and the ratio to LightlySSL
in the same run. Rounds are timed in CPU seconds, which other programs on the machine do not
consume.

A peer that is not installed, or does not start, is left out of the table with the reason.
"""

import io
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from selfray.views import (
    ASYMMETRIC_JITTER,
    ColorJitter,
    View,
    Views,
    asymmetric_views,
    blur_kernel_size,
)

Run = Callable[[Sequence[bytes]], object]
BLUR = (0.1, 2.0)


@dataclass(frozen=True)
class Benchmark:
    photos: Path | None = None
    """A folder of photographs; None takes ../shared/data/photos, else scikit-learn's two."""
    small: Path | None = None
    """A folder of Parquet shards of small images; None takes ../shared/data/cifar10, if there."""
    count: int = 64
    """Photographs in a round."""
    small_count: int = 1024
    """Small images in a round."""
    rounds: int = 9
    only: tuple[str, ...] = ()
    """Rows of the table, such as simclr-224; none means all."""
    output: Path = Path("runs/bench/augment.json")


@dataclass(frozen=True)
class Task:
    """One row of the table: the views that each contestant draws from an image."""

    views: Views
    is_small: bool = False
    """Whether the images are the small ones, not photographs."""
    max_side: int | None = None
    """Shrink the images first, as `selfray shards build --max-side` does; None does not."""


def simclr(size: int, blur: float) -> Views:
    view = View(
        size=size, crop_scale=(0.08, 1.0), color_jitter=ColorJitter(), grayscale=0.2, blur=blur
    )
    return {"global": (view, view)}


def dino() -> Views:
    first, second = asymmetric_views((0.4, 1.0))
    local = View(
        size=96, crop_scale=(0.05, 0.4), color_jitter=ASYMMETRIC_JITTER, grayscale=0.2, blur=0.5
    )
    sized = (replace(first, size=224), replace(second, size=224))
    return {"global": sized, "local": (local,) * 8}


TASKS = {
    "simclr-224": Task(simclr(224, 0.5)),
    "simclr-224-max-side-320": Task(simclr(224, 0.5), max_side=320),
    "simclr-32": Task(simclr(32, 0.0), is_small=True),
    "dino-224": Task(dino()),
    "mae-224": Task({"global": (View(size=224, crop_scale=(0.2, 1.0)),)}),
}


# Contestants: each function builds a function that turns encoded images into views


def ours(task: Task) -> Run:
    from selfray.pixels.augment import augment_batch

    return lambda images: augment_batch(images, task.views, seed=0, epoch=0)


def lightly(task: Task) -> Run:
    """LightlySSL's own transforms without normalisation; they return float tensors."""
    from lightly.transforms import DINOTransform, MAETransform, SimCLRTransform  # pyright: ignore[reportMissingImports]
    from PIL import Image

    nothing: Any = None
    first = task.views["global"][0]
    assert first.size is not None
    if "local" in task.views:
        local = task.views["local"][0]
        strengths: Any = ASYMMETRIC_JITTER
        draw: Any = DINOTransform(
            local_crop_scale=local.crop_scale,
            n_local_views=len(task.views["local"]),
            cj_strength=1.0,
            cj_bright=strengths.brightness,
            cj_contrast=strengths.contrast,
            cj_sat=strengths.saturation,
            cj_hue=strengths.hue,
            normalize=nothing,
        )
    elif first.color_jitter is None:
        draw = MAETransform(normalize=nothing)
    else:
        draw = SimCLRTransform(input_size=first.size, gaussian_blur=first.blur, normalize=nothing)

    def run(images: Sequence[bytes]) -> None:
        for data in images:
            draw(Image.open(io.BytesIO(data)).convert("RGB"))

    return run


def torchvision(task: Task) -> Run:
    """torchvision.transforms.v2 on uint8 tensors."""
    import torch
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    def transform(view: View) -> Any:
        steps: list[Any] = [
            v2.RandomResizedCrop(view.size or 0, scale=view.crop_scale, antialias=True),
            v2.RandomHorizontalFlip(view.flip),
        ]
        j = view.color_jitter
        if j is not None:
            jitter = v2.ColorJitter(j.brightness, j.contrast, j.saturation, j.hue)
            steps += [v2.RandomApply([jitter], j.probability), v2.RandomGrayscale(view.grayscale)]
        if view.blur:
            steps.append(v2.RandomApply([v2.GaussianBlur(_kernel(view), BLUR)], view.blur))
        if view.solarize:
            steps.append(v2.RandomSolarize(128, view.solarize))
        return v2.Compose(steps)

    draws = [transform(view) for group in task.views.values() for view in group]

    def run(images: Sequence[bytes]) -> None:
        for data in images:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image = decode_image(encoded, ImageReadMode.RGB)
            for draw in draws:
                draw(image)

    return run


def albumentations(task: Task) -> Run:
    import albumentations as library  # pyright: ignore[reportMissingImports]
    import cv2

    def transform(view: View) -> Any:
        assert view.size is not None
        size = (view.size, view.size)
        steps: list[Any] = [
            library.RandomResizedCrop(size, scale=view.crop_scale),
            library.HorizontalFlip(p=view.flip),
        ]
        j = view.color_jitter
        if j is not None:
            strengths = [(max(0.0, 1 - s), 1 + s) for s in (j.brightness, j.contrast, j.saturation)]
            steps.append(library.ColorJitter(*strengths, (-j.hue, j.hue), p=j.probability))
            steps.append(library.ToGray(p=view.grayscale))
        if view.blur:
            kernel = (3, _kernel(view))
            steps.append(library.GaussianBlur(kernel, sigma_limit=BLUR, p=view.blur))
        if view.solarize:
            steps.append(library.Solarize((0.5, 0.5), p=view.solarize))
        return library.Compose(steps)

    draws = [transform(view) for group in task.views.values() for view in group]

    def run(images: Sequence[bytes]) -> None:
        for data in images:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            for draw in draws:
                draw(image=image)["image"].transpose(2, 0, 1).copy()

    return run


def dali(task: Task) -> Run:
    """NVIDIA DALI's CPU operators, one thread, batches of 32. DALI has a fixed order of colour
    operations, and decodes an image once for all its views."""
    from nvidia.dali import fn, pipeline_def, types  # pyright: ignore[reportMissingImports]

    batch, waiting = 32, []

    def flag(probability: float) -> Any:
        return fn.random.coin_flip(probability=probability)

    def draw(image: Any, view: View) -> Any:
        assert view.size is not None
        out = fn.random_resized_crop(image, size=view.size, random_area=view.crop_scale)
        out = fn.flip(out, horizontal=flag(view.flip))
        j = view.color_jitter
        if j is not None:
            on = fn.cast(flag(j.probability), dtype=types.FLOAT)
            uniform = fn.random.uniform

            def factor(strength: float) -> Any:
                return 1.0 + on * uniform(range=(-strength, strength))

            gray = 1.0 - fn.cast(flag(view.grayscale), dtype=types.FLOAT)
            out = fn.color_twist(
                out,
                brightness=factor(j.brightness),
                contrast=factor(j.contrast),
                saturation=factor(j.saturation) * gray,
                hue=on * uniform(range=(-360 * j.hue, 360 * j.hue)),
            )
        if view.blur:
            # A sigma of 0.1 changes no pixel and stands for no blur, cheaper than a branch.
            on = fn.cast(flag(view.blur), dtype=types.FLOAT)
            out = fn.gaussian_blur(out, sigma=0.1 + on * fn.random.uniform(range=(0.0, 1.9)))
        return fn.transpose(out, perm=[2, 0, 1])

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> Any:
        encoded = fn.external_source(source=lambda: waiting.pop(), batch=True)
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        return tuple(draw(image, view) for group in task.views.values() for view in group)

    build: Any = pipeline
    built = build(exec_dynamic=False)
    built.build()

    def run(images: Sequence[bytes]) -> None:
        arrays = [np.frombuffer(data, np.uint8) for data in images]
        for first in range(0, len(arrays), batch):
            part = arrays[first : first + batch]
            waiting.append(part + part[: batch - len(part)])
            built.run()

    return run


def _kernel(view: View) -> int:
    assert view.size is not None
    return blur_kernel_size(view.size)


CONTESTANTS: dict[str, tuple[Callable[[Task], Run], str]] = {
    "selfray": (ours, "selfray"),
    "LightlySSL": (lightly, "lightly"),
    "torchvision v2": (torchvision, "torchvision"),
    "albumentations": (albumentations, "albumentations"),
    "DALI, CPU": (dali, "nvidia-dali-cuda120"),
}
BASE = "LightlySSL"


# Turns


def serve(connection: Connection, contestant: str, task_name: str, images: list[bytes]) -> None:
    """A contestant's process: runs a round for each message and answers with its CPU seconds."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    if sys.platform == "linux":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        import cv2
        import torch

        cv2.setNumThreads(1)
        torch.set_num_threads(1)
        run = CONTESTANTS[contestant][0](TASKS[task_name])
        run(images)  # warm-up: compiles, fills caches
        connection.send("ready")
    except BaseException as error:
        cause = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        connection.send(cause)
        return
    while connection.recv():
        started = time.process_time()
        run(images)
        connection.send(time.process_time() - started)


def measure(settings: Benchmark, task: str, images: list[bytes]) -> tuple[dict, dict]:
    """(contestant -> images/s of each round, contestant -> why it did not take part)."""
    context = multiprocessing.get_context("spawn")
    running, missing = {}, {}
    for name in CONTESTANTS:
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, name, task, images), daemon=True)
        process.start()
        there.close()
        try:
            answer = here.recv()
        except EOFError:
            answer = "its process died"
        if answer == "ready":
            running[name] = (here, process)
        else:
            missing[name] = answer
    rates: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(settings.rounds):
        for name, (connection, _process) in running.items():
            connection.send(True)
            rates[name].append(len(images) / connection.recv())
    for connection, process in running.values():
        connection.send(False)
        process.join()
    return rates, missing


def main() -> None:
    settings = tyro.cli(Benchmark, description=__doc__)
    result: dict[str, Any] = {"versions": _versions(), "images_per_second": {}, "left_out": {}}
    ratios: dict[str, float] = {}
    for name, task in TASKS.items():
        images = load(settings, task)
        if images is None or (settings.only and name not in settings.only):
            continue
        rates, missing = measure(settings, name, images)
        show(name, images, rates, missing)
        result["images_per_second"][name] = {
            contestant: {"median": statistics.median(r), "low": min(r), "high": max(r)}
            for contestant, r in rates.items()
        }
        result["left_out"][name] = missing
        if BASE in rates:
            ratios[name] = statistics.median(rates["selfray"]) / statistics.median(rates[BASE])
    result["ratio_to_lightly"] = ratios
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text(json.dumps(result, indent=1))
    print(", ".join(f"{name} {number}" for name, number in result["versions"].items()))
    print(f"written: {settings.output}")


def show(name: str, images: list[bytes], rates: dict, missing: dict) -> None:
    size = sum(map(len, images)) / len(images) / 1000
    views = sum(map(len, TASKS[name].views.values()))
    print(f"{name}: {len(images)} images of {size:.1f} kB, {views} views each, one core")
    print(f"  {'':20}{'images/s':>10}{'range':>18}{'to LightlySSL':>16}")
    for contestant, measured in rates.items():
        middle = statistics.median(measured)
        spread = f"{min(measured):,.0f} - {max(measured):,.0f}"
        ratio = f"{middle / statistics.median(rates[BASE]):.1f} x" if BASE in rates else ""
        print(f"  {contestant:20}{middle:10,.0f}{spread:>18}{ratio:>16}")
    for contestant, reason in missing.items():
        print(f"  {contestant:20}left out: {reason}")


def _versions() -> dict[str, str]:
    found = {}
    for package in (*(p for _, p in CONTESTANTS.values()), "opencv-python-headless", "numba"):
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            found[package] = "not installed"
    return found


def load(settings: Benchmark, task: Task) -> list[bytes] | None:
    """Encoded images for a round, repeated if there are too few; None if there are none."""
    shared = Path(__file__).parents[2] / "shared" / "data"
    if task.is_small:
        from selfray.data.files import parquet_files
        from selfray.data.reader import read_rows, sample_rows
        from selfray.data.shard_set import open_shards

        folder = settings.small or shared / "cifar10"
        if not folder.is_dir():
            print(f"no small images: there is no {folder}; give --small")
            return None
        shards = open_shards(parquet_files(str(folder)), str(folder))
        groups, rows = sample_rows(shards, settings.small_count)
        return list(read_rows(shards, groups, rows)[0])
    folder = settings.photos or shared / "photos"
    if not folder.is_dir():
        from sklearn.datasets import load_sample_images

        folder = Path(load_sample_images.__code__.co_filename).parent / "images"
    files = photographs(folder)
    # Spread over the folder, since neighbouring files tend to be alike.
    step = max(1, len(files) // settings.count)
    found = [file.read_bytes() for file in files[::step][: settings.count]]
    if task.max_side is not None:
        from selfray.pixels.codecs import shrink

        found = [shrink(data, task.max_side) for data in found]
    return [found[i % len(found)] for i in range(settings.count)]


def photographs(folder: Path) -> list[Path]:
    """The JPEG files below a folder."""
    names = (".jpg", ".jpeg")
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in names)


if __name__ == "__main__":
    main()
