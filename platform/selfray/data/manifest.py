"""The manifest of a folder of shards, and the records of single shards that add up to it."""

import collections
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfray.check import require
from selfray.data.columns import NO_LABEL
from selfray.data.files import Quarantined
from selfray.data.layout import SPLITS, TEST, VALIDATION
from selfray.data.listing import Plan
from selfray.data.measured import Measured, Statistics, summed
from selfray.storage import Location, one_line

MANIFEST = "manifest.json"
BUILD_FOLDER = "_build"  # readers of Parquet folders skip names that start with _
PLAN = "plan.json"
_STATISTICS, _DEDUP = "statistics", "dedup"
_ADDED = (_STATISTICS, _DEDUP)
"""Fields that manifests of earlier versions lack."""
SHARD_NAME = rf"(({'|'.join(SPLITS)})-)?shard-\d{{5,}}\.parquet"


@dataclass(frozen=True)
class Shard:
    name: str
    rows: int
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]
    """Rows of each row group."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Shard":
        """Parse and check a shard. Raises ValueError or TypeError for anything else."""
        shard = cls(**{**value, "row_groups": tuple(value["row_groups"])})
        _require_shard(shard.name, shard.rows, shard.bytes, shard.sha256, shard.row_groups)
        return shard


@dataclass(frozen=True)
class Labels:
    names: tuple[str, ...] | None
    """names[label] is the class's name; None if the source has only integers."""
    counts: dict[str, int]
    """Number of images of each class, by name, or by the integer as text without names."""
    unlabelled: int
    """Number of images with label -1, for which the source has no label."""


@dataclass(frozen=True)
class Spread:
    """Statistics of a side's length in pixels over all stored images."""

    min: int
    median: int
    max: int


@dataclass(frozen=True)
class QuarantineCount:
    count: int
    reasons: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """The content of a folder of shards; stored as manifest.json."""

    source: str
    options: dict[str, Any]
    images: int
    bytes: int
    labels: Labels | None
    shards: tuple[Shard, ...]
    image_width: Spread
    image_height: Spread
    formats: dict[str, int]
    quarantined: QuarantineCount
    max_side: int | None
    plan: dict[str, Any]
    """Number of files, bytes and fingerprint of the source's listing, which identify the build."""
    statistics: Statistics | None = None
    """What the build measured of the images; None in manifests of earlier versions."""
    dedup: dict[str, Any] | None = None
    """What `selfray shards dedup` removed, and how the shards that it read were built; None for
    other shards."""

    FORMAT = "selfray-shards"
    VERSION = 1

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        for name in _ADDED:
            if values[name] is None:
                del values[name]
        return {"format": self.FORMAT, "version": self.VERSION, **values}

    @classmethod
    def from_json(cls, value: Any) -> "Manifest":
        """The inverse of to_json. Raises ValueError for anything but a manifest of this version."""
        require(
            isinstance(value, dict) and value.get("format") == cls.FORMAT,
            f'it is not a manifest of selfray shards: it lacks "format": "{cls.FORMAT}"',
        )
        require(
            value.get("version") == cls.VERSION,
            f"the manifest has version {value.get('version')}, this selfray reads version "
            f"{cls.VERSION}: use the selfray that built the shards, or build them again",
        )
        fields = {f.name: value[f.name] for f in dataclasses.fields(cls) if f.name not in _ADDED}
        if value.get(_STATISTICS) is not None:
            fields[_STATISTICS] = Statistics.from_json(value[_STATISTICS])
        if value.get(_DEDUP) is not None:
            fields[_DEDUP] = dict(value[_DEDUP])
        if (labels := fields["labels"]) is not None:
            names = None if labels["names"] is None else tuple(labels["names"])
            fields["labels"] = Labels(names, labels["counts"], labels["unlabelled"])
        fields["shards"] = tuple(Shard.from_json(shard) for shard in fields["shards"])
        fields["image_width"] = Spread(**fields["image_width"])
        fields["image_height"] = Spread(**fields["image_height"])
        fields["quarantined"] = QuarantineCount(**fields["quarantined"])
        manifest = cls(**fields)
        _require_counts(images=manifest.images, bytes=manifest.bytes)
        _require_counts(quarantined=manifest.quarantined.count)
        require(
            isinstance(manifest.source, str)
            and isinstance(manifest.options, dict)
            and isinstance(manifest.plan, dict)
            and isinstance(manifest.plan.get("fingerprint"), str),
            "its source, options or plan have the wrong type",
        )
        if manifest.labels is not None:
            names = manifest.labels.names or ()
            require(all(isinstance(n, str) for n in names), "its label names are not strings")
            _require_counts(**manifest.labels.counts)
            _require_counts(unlabelled=manifest.labels.unlabelled)
        return manifest

    @classmethod
    def load(cls, folder: str | Path | Location) -> "Manifest":
        """Read the manifest of a folder of shards. Raises FileNotFoundError or ValueError that
        names the file."""
        location = Location.of(folder) / MANIFEST
        if not location.exists():
            raise FileNotFoundError(
                f"{location} does not exist: give a folder in which `selfray shards build` finished"
            )
        try:
            return cls.from_json(location.read_strict_json())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{location} cannot be read: {one_line(error)}; restore it from a copy, or delete "
                f"{folder} and build the shards again"
            ) from None


def statistics_in(folder: Location) -> Statistics | None:
    """The statistics of a folder of shards; None without a manifest, or with a damaged one."""
    try:
        return Manifest.load(folder).statistics
    except (ValueError, OSError):
        return None


@dataclass(frozen=True)
class ShardRecord:
    """The contribution of one finished shard to the manifest; kept until the build is complete."""

    number: int
    name: str
    rows: int
    """0 if no sound image was left; then there is no file."""
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]
    labels: dict[str, int]
    widths: dict[str, int]
    heights: dict[str, int]
    formats: dict[str, int]
    measured: Measured
    quarantined: tuple[Quarantined, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ShardRecord":
        """Parse and check a record. Raises ValueError, TypeError or KeyError for anything else."""
        value["row_groups"] = tuple(value["row_groups"])
        value["quarantined"] = tuple(Quarantined(*entry) for entry in value["quarantined"])
        value["measured"] = Measured.from_json(value["measured"])
        record = cls(**value)
        _require_shard(record.name, record.rows, record.bytes, record.sha256, record.row_groups)
        require(shard_number(record.name) == record.number, f"it has the number {record.number}")
        for counts in (record.labels, record.widths, record.heights, record.formats):
            _require_counts(**counts)
        require(
            all(isinstance(text, str) for entry in record.quarantined for text in entry),
            "its quarantined entries are not strings",
        )
        return record


def _require_shard(name: str, rows: int, size: int, sha256: str, row_groups: Sequence[int]) -> None:
    require(
        isinstance(name, str) and re.fullmatch(SHARD_NAME, name) is not None,
        f"it names a shard {name!r}",
    )
    _require_counts(rows=rows, bytes=size, **{f"group {i}": n for i, n in enumerate(row_groups)})
    require(isinstance(sha256, str) and sum(row_groups) == rows, f"{name} has wrong row groups")


def _require_counts(**counts: object) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value!r}, not a count")


def shard_name(number: int, split: str = "") -> str:
    """Such as shard-00007.parquet or, with splits, validation-shard-00007.parquet, by which
    `datasets` and selfray recognise a split."""
    return f"{split}-shard-{number:05d}.parquet" if split else f"shard-{number:05d}.parquet"


def shard_number(name: str) -> int:
    return int(name.rpartition("shard-")[2].removesuffix(".parquet"))


def manifest_of(
    plan: Plan,
    records: Sequence[ShardRecord],
    quarantined: Sequence[Quarantined],
    window: tuple[float, float] | None = None,
) -> Manifest:
    def merged(name: str) -> dict[str, int]:
        total: collections.Counter[str] = collections.Counter()
        for record in records:
            total.update(getattr(record, name))
        return dict(sorted(total.items()))

    labels = None
    if plan.layout.has_labels:
        names, counts = plan.layout.label_names, merged("labels")
        unlabelled = counts.pop(str(NO_LABEL), 0)
        if names is None:
            by_name = dict(sorted(counts.items(), key=lambda item: int(item[0])))
        else:
            by_name = {name: counts.pop(str(index), 0) for index, name in enumerate(names)} | counts
        labels = Labels(names, by_name, unlabelled)
    identity = plan.identity()
    return Manifest(
        source=identity.pop("source"),
        options=identity.pop("options"),
        images=sum(record.rows for record in records),
        bytes=sum(record.bytes for record in records),
        labels=labels,
        shards=tuple(
            Shard(r.name, r.rows, r.bytes, r.sha256, r.row_groups) for r in records if r.rows
        ),
        image_width=_spread(merged("widths")),
        image_height=_spread(merged("heights")),
        formats=merged("formats"),
        quarantined=QuarantineCount(
            len(quarantined),
            dict(sorted(collections.Counter(q.reason for q in quarantined).items())),
        ),
        max_side=plan.options.max_side,
        plan=identity,
        statistics=summed([(_is_test(r.name), r.measured) for r in records if r.rows], window),
    )


def _is_test(name: str) -> bool:
    return name.startswith((f"{TEST}-", f"{VALIDATION}-"))


def _spread(counts: dict[str, int]) -> Spread:
    sizes = {int(size): count for size, count in sorted(counts.items(), key=lambda c: int(c[0]))}
    total, seen = sum(sizes.values()), 0
    median = 0
    for size, count in sizes.items():
        seen += count
        if seen * 2 >= total:
            median = size
            break
    return Spread(min(sizes), median, max(sizes))
