"""Measures the images of a build: mean and deviation, shapes, duplicates, conversions.

The task that builds a shard also measures it. The records of all shards add up to the Statistics of
the manifest, independent of which worker built which shard.
"""

import base64
import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from selfray.check import require
from selfray.pixels.augment import image_key
from selfray.views import MOST_CHANNELS, RGB

PICTURES = (1, RGB)
"""Channels of gray and colour images. Either is read as the other, as data.channels says."""
_DIGITS = 5
"""Decimals of means and deviations: few enough that rounding on different processors agrees."""


@dataclass(frozen=True)
class Moments:
    """Sums over images of the means of a channel's values, and of their squares; values in 0..1."""

    images: int
    means: tuple[float, ...]
    squares: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """The measurements of one shard's images."""

    channels: Mapping[str, int]
    """Number of images for each number of channels."""
    aspects: Mapping[str, int]
    """Number of images for each aspect ratio, width / height in hundredths."""
    moments: Mapping[str, Moments]
    """For each number of channels that the images can be read with; gray and colour images with
    both 1 and 3."""
    converted: Mapping[str, int]
    """Number of images for each kind of conversion."""
    keys: str
    """A 64-bit digest of each image's pixels: uint64 in base64."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Measured":
        """Parse and check. Raises ValueError, TypeError or KeyError for anything else."""
        moments = {
            str(int(name)): Moments(
                int(m["images"]), tuple(map(float, m["means"])), tuple(map(float, m["squares"]))
            )
            for name, m in dict(value["moments"]).items()
        }
        counts = {
            name: {str(key): int(count) for key, count in dict(value[name]).items()}
            for name in ("channels", "aspects", "converted")
        }
        keys = value["keys"]
        require(len(_decoded(keys)) == sum(counts["channels"].values()), "it has no key for each")
        for key in (*counts["channels"], *counts["aspects"]):
            int(key)
        return cls(moments=moments, keys=keys, **counts)

    @property
    def pixel_keys(self) -> np.ndarray:
        """uint64 [images]."""
        return _decoded(self.keys)


def _decoded(keys: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(keys, validate=True), "<u8")


@dataclass(frozen=True)
class Statistics:
    """Statistics of the stored images, as in the manifest."""

    channels: Mapping[str, int]
    """Number of images for each number of channels."""
    mean: Mapping[str, tuple[float, ...]]
    """For each value of data.channels: the mean of each channel in 0..1; all images have equal
    weight."""
    std: Mapping[str, tuple[float, ...]]
    """For each value of data.channels: the standard deviation of each channel's values."""
    aspect_ratio: tuple[float, float, float]
    """Width / height: smallest, median, largest."""
    duplicates: int
    """Number of images with the same pixels as an earlier image."""
    of_test: int | None
    """Number of train images with the same pixels as a test or validation image; None without
    splits."""
    converted: Mapping[str, int] = field(default_factory=dict)
    """Number of images for each kind of conversion before they were stored."""
    window: tuple[float, float] | None = None
    """The values that became black and white, if they are percentiles over all images."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Statistics":
        """Parse and check. Raises ValueError, TypeError or KeyError for anything else."""
        window = value["window"]
        ratios = [float(ratio) for ratio in value["aspect_ratio"]]
        require(len(ratios) == 3, "it has another number of aspect ratios than 3")
        require(window is None or len(window) == 2, f"it has a window {window}")
        by_channels = {
            name: {
                str(int(n)): tuple(float(v) for v in values) for n, values in value[name].items()
            }
            for name in ("mean", "std")
        }
        for found in by_channels.values():
            for name, values in found.items():
                require(len(values) == int(name), f"it has {len(values)} means of {name} channels")
                require(all(0 <= v <= 1 for v in values), f"it has means of {values}")
        of_test = value["of_test"]
        return cls(
            channels={str(int(n)): int(count) for n, count in value["channels"].items()},
            mean=by_channels["mean"],
            std=by_channels["std"],
            aspect_ratio=(ratios[0], ratios[1], ratios[2]),
            duplicates=int(value["duplicates"]),
            of_test=None if of_test is None else int(of_test),
            converted={str(text): int(n) for text, n in value["converted"].items()},
            window=None if window is None else (float(window[0]), float(window[1])),
        )

    def normalization(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """(mean, std) of the images read with this number of channels; None if they cannot be."""
        found = self.mean.get(str(channels)), self.std.get(str(channels))
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    @property
    def kind(self) -> int:
        """The number of channels of the images: 3 if they are gray and colour images."""
        return kind_of_most(self.channels)


class Measuring:
    """Collects the measurements of a shard's images."""

    def __init__(self) -> None:
        self._channels: collections.Counter[int] = collections.Counter()
        self._aspects: collections.Counter[int] = collections.Counter()
        self._converted: collections.Counter[str] = collections.Counter()
        self._sums: dict[int, np.ndarray] = {}  # [2, C] by C: of means, of squares
        self._images: collections.Counter[int] = collections.Counter()
        self._keys: list[int] = []

    def add(self, pixels: np.ndarray, channels: int, done: str = "") -> None:
        """Add an image, uint8 [H, W, C]; `channels` is 1 if its three channels are equal."""
        height, width = pixels.shape[:2]
        self._channels[channels] += 1
        self._aspects[round(100 * width / height)] += 1
        if done:
            self._converted[done] += 1
        self._keys.append(image_key(pixels.tobytes() + f"{pixels.shape}".encode()))
        self._add_moments(pixels)
        if pixels.shape[2] == RGB:
            gray = pixels[:, :, :1] if channels == 1 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
            self._add_moments(gray.reshape(height, width, 1))

    def _add_moments(self, pixels: np.ndarray) -> None:
        channels = pixels.shape[2]
        found = [cv2.meanStdDev(np.ascontiguousarray(pixels[:, :, c])) for c in range(channels)]
        means = np.array([float(mean[0, 0]) for mean, _ in found]) / 255
        stds = np.array([float(std[0, 0]) for _, std in found]) / 255
        sums = self._sums.setdefault(channels, np.zeros((2, channels)))
        sums += np.stack([means, stds**2 + means**2])
        self._images[channels] += 1

    def result(self) -> Measured:
        moments = {
            str(n): Moments(self._images[n], tuple(sums[0].tolist()), tuple(sums[1].tolist()))
            for n, sums in sorted(self._sums.items())
        }
        return Measured(
            {str(n): count for n, count in sorted(self._channels.items())},
            {str(n): count for n, count in sorted(self._aspects.items())},
            moments,
            dict(sorted(self._converted.items())),
            base64.b64encode(np.array(self._keys, "<u8").tobytes()).decode(),
        )


def channels_of(pixels: np.ndarray) -> int:
    """The number of channels of decoded pixels, uint8 [H, W, C]: 1 if three channels are equal."""
    if pixels.shape[2] != RGB:
        return pixels.shape[2]
    for part in (pixels[::16, ::16], pixels):  # a coarse grid finds most colours at once
        if not (
            np.array_equal(part[:, :, 0], part[:, :, 1])
            and np.array_equal(part[:, :, 0], part[:, :, 2])
        ):
            return RGB
    return 1


def are_alike(channels: int, others: int) -> bool:
    """Whether images with these numbers of channels can be in one data set."""
    return channels == others or (channels in PICTURES and others in PICTURES)


def kind_of_most(counts: Mapping[str, int]) -> int:
    """The number of channels of most images, with gray and colour images counted as 3 unless all
    are gray. On a tie, the smaller number."""
    kinds: collections.Counter[int] = collections.Counter()
    for channels, count in counts.items():
        kinds[RGB if int(channels) in PICTURES else int(channels)] += count
    if not kinds:
        return RGB
    kind = min(kinds, key=lambda channels: (-kinds[channels], channels))
    return 1 if kind == RGB and not counts.get(str(RGB)) else kind


def summed(
    parts: Sequence[tuple[bool, Measured]], window: tuple[float, float] | None = None
) -> Statistics:
    """The statistics of all shards, given as (whether the shard holds test images,
    measurements)."""
    totals = {name: collections.Counter() for name in ("channels", "aspects", "converted")}
    moments: dict[int, list[Moments]] = {}
    for _, part in parts:
        for name, total in totals.items():
            total.update(getattr(part, name))
        for channels, found in part.moments.items():
            moments.setdefault(int(channels), []).append(found)
    mean, std = {}, {}
    whole = sum(totals["channels"].values())
    for channels, found in sorted(moments.items()):
        count = sum(m.images for m in found)
        if count < whole or not 1 <= channels <= MOST_CHANNELS:
            continue  # moments of only some of the images
        means = np.sum([m.means for m in found], axis=0) / count
        squares = np.sum([m.squares for m in found], axis=0) / count
        mean[str(channels)] = tuple(np.round(means, _DIGITS).tolist())
        deviations = np.sqrt(np.maximum(squares - means**2, 0))
        std[str(channels)] = tuple(np.round(deviations, _DIGITS).tolist())
    test = np.concatenate([m.pixel_keys for is_test, m in parts if is_test] or [_NO_KEYS])
    train = np.concatenate([m.pixel_keys for is_test, m in parts if not is_test] or [_NO_KEYS])
    return Statistics(
        _by_number(totals["channels"]),
        mean,
        std,
        _spread({int(n) / 100: count for n, count in totals["aspects"].items()}),
        len(train) + len(test) - len(np.unique(np.concatenate([train, test]))),
        int(np.isin(train, test).sum()) if len(test) and len(train) else None,
        dict(sorted(totals["converted"].items())),
        window,
    )


_NO_KEYS = np.empty(0, np.uint64)


def _by_number(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def _spread(counts: Mapping[float, int]) -> tuple[float, float, float]:
    values = sorted(counts)
    half = sum(counts.values()) / 2
    median, seen = values[0], 0
    for median in values:
        seen += counts[median]
        if seen >= half:
            break
    return values[0], median, values[-1]
