"""Rows during a build: the inputs that they come from, and their content."""

from dataclasses import dataclass
from typing import NamedTuple

from selfray.data.beside import MAX_IMAGE_BYTES
from selfray.data.columns import NO_LABEL, Classes
from selfray.data.files import Quarantined
from selfray.data.layout import SourceKind
from selfray.storage import Location, is_about_the_file

MIB = 2**20
GROUP = "group"
"""The column of shards that names each image's patient, slide or scene."""


@dataclass(frozen=True)
class Layout:
    """How a source is read, and whether its rows have labels."""

    kind: SourceKind
    has_labels: bool
    label_names: tuple[str, ...] | None = None
    image_column: str = "image"
    label_column: str | None = None
    group_column: str | None = None
    """The source's column of groups; shards keep it as GROUP."""


class Input(NamedTuple):
    """A file of the source, or one row group of a Parquet file."""

    name: str
    bytes: int
    rows: int = 1
    """Largest possible number of rows."""
    row_group: int = 0
    first_row: int = 0
    label: int = NO_LABEL
    """The label of all its images, if a folder or a table beside it gives one."""
    classes: Classes | None = None
    """How its label column's values become labels."""
    split: str | None = None
    """Of a tar that holds several; None where the file is of one."""
    folders: tuple[tuple[str, int], ...] | None = None
    """Of a tar: the folders in it that are read, each with the label of its images."""
    group: str | None = None
    """The group of an image, if a table beside it gives one."""


class Sample(NamedTuple):
    name: str
    data: bytes
    label: int = NO_LABEL
    path: str = ""
    """The row's `path`, if it differs from the name."""
    text: str | None = None
    """The label as text, from a tar."""
    group: str | None = None
    """The patient, slide or scene."""


Row = Sample | Quarantined


def raise_if_outage(error: Exception, location: Location) -> None:
    """Raise an error that concerns the storage, not one file: the build can be resumed later, while
    quarantine would drop sound images."""
    if isinstance(error, OSError) and not location.is_local and not is_about_the_file(error):
        raise error


def too_large(name: str, size: int) -> Quarantined:
    message = f"the file has {size:,} bytes, more than the {MAX_IMAGE_BYTES:,} of the largest image"
    return Quarantined(name, "too large", message)
