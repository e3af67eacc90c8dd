"""A seeded choice of a folder's images, to be looked at before anything is trained."""

import random
from dataclasses import dataclass, field, replace

import numpy as np

from selfray.check import require
from selfray.data import summary
from selfray.data.columns import NO_LABEL
from selfray.data.files import Quarantined, list_source, select
from selfray.data.layout import TEST, TRAIN, UNLABELED, VALIDATION, understand
from selfray.data.listing import make_plan
from selfray.data.manifest import MANIFEST, Manifest
from selfray.data.measured import channels_of
from selfray.data.options import BuildOptions
from selfray.data.reader import read_rows, sample_rows
from selfray.data.samples import read_samples
from selfray.data.shard_set import ShardSet, open_shards
from selfray.pixels.codecs import checked
from selfray.pixels.intake import take
from selfray.pixels.limits import BrokenImage
from selfray.storage import Location


@dataclass(frozen=True)
class Chosen:
    """Images of a folder, chosen by a seed."""

    total: int
    """Images, or files of images, in the folder."""
    manifest: Manifest | None
    """None for a folder that `selfray shards build` did not write."""
    encoded: list[bytes] = field(default_factory=list)
    """As stored in shards, or as a build would store them."""
    pixels: list[np.ndarray] = field(default_factory=list)
    """uint8 [H, W, C] each; C is 3 for pictures, also for gray ones."""
    channels: list[int] = field(default_factory=list)
    """1 for an image whose three channels are equal."""
    classes: list[str] = field(default_factory=list)
    """The class of each image; "" for none."""
    done: list[str] = field(default_factory=list)
    """How a build would convert each image; "" for shards, and where the bytes are kept."""
    notes: list[str] = field(default_factory=list)
    """What was understood of the folder, one line each."""
    broken: list[str] = field(default_factory=list)
    """Why images of the choice could not be read, one line each."""

    def add(self, data: bytes, name: str, label: str, done: str = "") -> None:
        try:
            _, pixels = checked(data)
        except BrokenImage as error:
            self.broken.append(f"{name}: {error}")
            return
        self.encoded.append(data)
        self.pixels.append(pixels)
        self.channels.append(channels_of(pixels))
        self.classes.append(label)
        self.done.append(done)


def choose(folder: str, count: int, seed: int) -> Chosen:
    """Choose images of a folder of shards, of Parquet files or of raw images.

    The choice follows from the seed and from the names of the files. Raises FileNotFoundError or
    ValueError, one line with the way out; tars are refused, because all of them would be read.
    """
    location = Location.of(folder)
    if not location.exists():
        raise FileNotFoundError(f"{folder} does not exist: give a folder of shards or of images")
    manifest = Manifest.load(location) if (location / MANIFEST).exists() else None
    listing = list_source(location)
    kind, files, _ = select(location, listing.files)
    require(
        kind != "tar",
        f"{folder} holds WebDataset tars, which have no table of contents: convert them by "
        f"`selfray shards build {folder} DST`, then `selfray shards show DST`",
    )
    if kind == "parquet":
        return _of_shards(folder, [listing.uri(file.name) for file in files], manifest, count, seed)
    return _of_files(location, count, seed)


def _of_shards(
    folder: str, uris: list[str], manifest: Manifest | None, count: int, seed: int
) -> Chosen:
    shards = open_shards(sorted(uris), folder)
    groups, rows = sample_rows(shards, count, seed)
    images, labels = read_rows(shards, groups, rows)
    found = Chosen(shards.rows, manifest, notes=[_said(shards)])
    names: tuple[str, ...] = shards.label_names or ()
    for data, label, group, row in zip(images, labels, groups, rows, strict=True):
        said = names[int(label)] if label != NO_LABEL else ""
        found.add(data, f"row {row} of row group {group}", said)
    return found


def _said(shards: ShardSet) -> str:
    names = [file.uri.rpartition("/")[2] for file in shards.files]
    splits = understand(names, "parquet").splits

    def part(*own: str) -> summary.Part:
        files = (f for f, split in zip(shards.files, splits, strict=True) if split in own)
        return summary.part_of(replace(shards, files=tuple(files)))

    test = part(VALIDATION, TEST)
    return summary.line(part(TRAIN, UNLABELED), test if test.images else None)


def _of_files(location: Location, count: int, seed: int) -> Chosen:
    options = BuildOptions()
    plan = make_plan(location, options)
    inputs = sorted(
        (entry for item in plan.items for entry in item.inputs), key=lambda entry: entry.name
    )
    some = random.Random(seed).sample(inputs, min(count, len(inputs)))
    found = Chosen(len(inputs), None, notes=list(plan.notes))
    names = plan.layout.label_names or ()
    for row in read_samples(plan.source, plan.layout, some):
        if isinstance(row, Quarantined):
            found.broken.append(f"{row.file}: {row.message}")
            continue
        try:
            # Of a file of several pages, the first one is looked at.
            taken = next(take(row.data, options.intake, options.max_pixels))
        except BrokenImage as error:
            found.broken.append(f"{row.name}: {error}")
            continue
        label = names[row.label] if row.label != NO_LABEL else ""
        found.add(taken.data, row.name, label, taken.described)
    return found
