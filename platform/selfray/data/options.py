"""The options of a build of shards: sizes, labels, and conversion of deep images."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from selfray.check import require
from selfray.data.layout import LabelRule
from selfray.data.rows import MIB
from selfray.pixels import codecs
from selfray.pixels.deep import Intake, WindowOf
from selfray.views import MOST_CHANNELS


@dataclass(frozen=True)
class BuildOptions:
    max_side: int | None = None
    """Shrink larger images so that the longer side has this many pixels, and store them as JPEGs of
    quality 95; None shrinks none. Other images keep their bytes."""
    shard_bytes: int = 128 * MIB
    """Target size of a shard in bytes. One task takes about three times this memory: measured 155
    MiB for shards of 64 MiB from a folder, 212 MiB from a tar."""
    max_pixels: int = codecs.MAX_PIXELS
    """Images with more pixels than this are quarantined before they are decoded."""
    labels: LabelRule = "auto"
    """Where labels come from. auto: class folders, a metadata table beside images, `.cls` or
    `.json` members of tars, a label column of Parquet files. folders: the first folder below the
    source or split is the class, deeper ones are ignored. none: no labels."""
    seed: int = 0
    image_column: str | None = None
    """The column that holds the images (only for Parquet sources); None finds it."""
    label_column: str | None = None
    """The label column of Parquet files, of a metadata table beside images, or the label's key in
    `.json` members of tars; None finds it."""
    window: tuple[float, float] | None = None
    window_of: WindowOf | None = None
    keep_depth: bool = False
    page: int | None = None
    """How deep images, multispectral images and files of several pages are stored, with the three
    fields before: see Intake."""
    channels: int | None = None
    """Quarantine images of any other number of channels; None keeps the number that most images
    have. Gray and colour images count as the same."""
    group_column: str | None = None
    """The column of Parquet files, or of a metadata table beside images, that names the patient,
    slide or scene of each image. Shards keep it as the column `group`, for data.group_by."""

    def __post_init__(self) -> None:
        require(
            self.max_side is None or self.max_side > 0,
            f"max_side must be positive or None, got {self.max_side}",
        )
        require(self.shard_bytes > 0, f"shard_bytes must be positive, got {self.shard_bytes}")
        require(self.max_pixels > 0, f"max_pixels must be positive, got {self.max_pixels}")
        require(
            self.labels in ("auto", "folders", "none"),
            f"labels must be auto, folders or none, got {self.labels!r}",
        )
        require(
            self.channels is None or 1 <= self.channels <= MOST_CHANNELS,
            f"channels must lie in [1, {MOST_CHANNELS}], got {self.channels}",
        )
        _ = self.intake  # refuses what cannot be meant

    @property
    def intake(self) -> Intake:
        return Intake(self.window, self.window_of, self.keep_depth, self.page)

    def to_json(self) -> dict[str, Any]:
        """The JSON stored in manifests; a field added later is left out at its default."""
        values = dataclasses.asdict(self)
        later = ("label_column", "window", "window_of", "keep_depth", "page", "channels")
        for name in (*later, "group_column"):
            if values[name] is None or values[name] is False:
                del values[name]
        if self.window is not None:
            values["window"] = list(self.window)  # as a file gives it back
        return values
