"""What is known of a folder of shards, in lines for a person."""

import collections
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from selfray.commands.words import size
from selfray.data.layout import SPLITS, TRAIN
from selfray.storage import Location

if TYPE_CHECKING:
    from selfray.data.manifest import Labels, Manifest
    from selfray.data.measured import Statistics

MOST_CLASSES = 12
"""Classes that are listed with their number of images; of more, the smallest and the largest."""


def summary(manifest: "Manifest", destination: Location, seconds: float) -> Iterator[str]:
    """Lines about a finished build, and the command that uses it."""
    yield (
        f"{destination}: {manifest.images:,} images in {len(manifest.shards):,} shards, "
        f"{size(manifest.bytes)}, {seconds:.0f} s"
    )
    yield from _measured_lines(manifest)
    if manifest.labels is None:
        yield NO_LABELS
    else:
        yield _labels_line(manifest.labels)
    yield _quarantine_line(manifest, destination)
    kind = manifest.statistics.kind if manifest.statistics is not None else 3
    path = shlex.quote(destination.uri)
    train = f"auto --data.path {path}"
    if kind != 3:
        flags = f"--data.channels {kind} --encoder.in-channels {kind}"
        train = f"mae-imagenet --data.path {path} {flags}"
    yield f"next: selfray shards show {path}, and selfray pretrain {train}"


NO_LABELS = "labels: none, so the encoder cannot be probed on these images"


def known(manifest: "Manifest", destination: Location) -> Iterator[str]:
    """Everything that the manifest of a folder of shards says about its images."""
    yield (
        f"{destination}: {manifest.images:,} images in {len(manifest.shards):,} shards, "
        f"{size(manifest.bytes)}, built from {manifest.source}"
    )
    rows: collections.Counter[str] = collections.Counter()
    for shard in manifest.shards:
        split = shard.name.partition("-shard-")[0]
        rows[split if split in SPLITS else TRAIN] += shard.rows
    words = ", ".join(f"{split} {rows[split]:,}" for split in SPLITS if rows[split])
    yield f"splits: {words}" + ("" if len(rows) > 1 else "; no test images of their own")
    yield from _measured_lines(manifest)
    yield "formats: " + ", ".join(f"{name} {count:,}" for name, count in manifest.formats.items())
    yield _depth_line(manifest)
    if manifest.labels is None:
        yield NO_LABELS
    else:
        yield _labels_line(manifest.labels)
        counts = sorted(manifest.labels.counts.items(), key=lambda item: -item[1])
        if len(counts) <= MOST_CLASSES:
            yield "  " + ", ".join(f"{name} {count:,}" for name, count in counts)
        else:
            yield f"  from {counts[0][0]} {counts[0][1]:,} to {counts[-1][0]} {counts[-1][1]:,}"
    yield _quarantine_line(manifest, destination)
    if manifest.dedup is not None:
        yield from removed_lines(manifest.dedup, destination)


def _measured_lines(manifest: "Manifest") -> Iterator[str]:
    width, height = manifest.image_width, manifest.image_height
    yield (
        f"pixels (min / median / max): width {width.min} / {width.median} / {width.max}, "
        f"height {height.min} / {height.median} / {height.max}"
    )
    if manifest.statistics is not None:
        yield from statistics_lines(manifest.statistics)


def _labels_line(labels: "Labels") -> str:
    counts = sorted(labels.counts.values())
    sizes = f"{counts[0]:,}" + (f" to {counts[-1]:,}" if counts[0] < counts[-1] else "")
    return f"labels: {len(counts):,} classes of {sizes} images" + (
        f"; {labels.unlabelled:,} images without" if labels.unlabelled else ""
    )


def _quarantine_line(manifest: "Manifest", destination: Location) -> str:
    from selfray.data.destination import QUARANTINE

    quarantined = manifest.quarantined
    if not quarantined.count:
        return "quarantined: none"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in quarantined.reasons.items())
    return f"quarantined: {reasons}; see {destination / QUARANTINE}"


def _depth_line(manifest: "Manifest") -> str:
    """The bits of a stored value, and the window of values that were mapped to them."""
    found = manifest.statistics
    converted = sum(found.converted.values()) if found is not None else 0
    if found is None or not converted:
        return "depth: 8 bits, as in the files"
    deep = sum(count for text, count in found.converted.items() if "-> 16 bits" in text)
    bits = "8 bits" if not deep else "16 bits" if deep == manifest.images else "8 and 16 bits"
    if found.window is not None:
        window = f"{found.window[0]:g} to {found.window[1]:g}, from percentiles of all images"
    elif manifest.options.get("window") is not None:
        window = " to ".join(f"{bound:g}" for bound in manifest.options["window"])
        window += f", {manifest.options.get('window_of') or 'percentiles of each image or fixed'}"
    else:
        window = "each image's own, see `converted`"
    return f"depth: {bits}; window of {converted:,} converted images: {window}"


def statistics_lines(found: "Statistics") -> Iterator[str]:
    """What was measured of the images, for a person."""
    kind = found.kind
    words = {1: "1 (gray)", 3: "3 (RGB)"}.get(kind, str(kind))
    gray = found.channels.get("1", 0)
    some = f", {gray:,} images of them gray" if kind == 3 and gray else ""
    normalization = found.normalization(kind)
    if normalization is not None:
        mean, std = (" ".join(f"{value:.3f}" for value in values) for values in normalization)
        yield f"channels: {words}{some}; mean {mean}, std {std} (of 0..1)"
    least, median, most = found.aspect_ratio
    yield f"aspect ratio (min / median / max): {least:g} / {median:g} / {most:g}"
    for done, count in found.converted.items():
        yield f"converted: {count:,} images, {done}"
    if found.duplicates:
        across = (
            f", {found.of_test:,} train images among them are in the test" if found.of_test else ""
        )
        yield f"duplicates: {found.duplicates:,} images have the pixels of another{across}"
    else:
        yield "duplicates: none"


def removed_lines(done: dict[str, Any], folder: Location) -> Iterator[str]:
    """What was removed as a duplicate, for a person."""
    from selfray.data.destination import DUPLICATES, PAIRS

    if not done["removed"]:
        yield f"duplicates: none among {done['images_before']:,} images"
    else:
        words = {"bytes": "copies of the file", "pixels": "with equal pixels", "near": "near"}
        kinds = ", ".join(f"{n:,} {words[kind]}" for kind, n in done["removed_by"].items())
        yield (
            f"removed: {done['removed']:,} of {done['images_before']:,} images ({kinds}), named in "
            f"{folder / DUPLICATES} and shown in {folder / PAIRS}"
        )
    if done["removed_as_alike_to_test"]:
        yield (
            f"{done['removed_as_alike_to_test']:,} of them were train images alike to a test "
            "image: numbers from before were too good"
        )
    if done["test_images_alike_to_test"]:
        yield f"{done['test_images_alike_to_test']:,} test images are alike to another, and stay"
    if several := done["groups_of_several_classes"]:
        yield f"groups of alike images that hold several classes: {several:,}; look at their labels"
