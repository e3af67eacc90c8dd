"""Rows on their way into shards: where they come from, and what they hold."""

from dataclasses import dataclass
from typing import NamedTuple

from selfray.data.beside import MAX_IMAGE_BYTES
from selfray.data.columns import NO_LABEL, Classes
from selfray.data.files import Quarantined
from selfray.data.layout import SourceKind
from selfray.storage import Location, is_about_the_file

MIB = 2**20


@dataclass(frozen=True)
class Layout:
    """How the source is read, and whether its rows have labels."""

    kind: SourceKind
    has_labels: bool
    label_names: tuple[str, ...] | None = None
    image_column: str = "image"
    label_column: str | None = None


class Input(NamedTuple):
    """A file of the source, or one row group of a Parquet file."""

    name: str
    bytes: int
    rows: int = 1
    """How many rows it may have at most."""
    row_group: int = 0
    first_row: int = 0
    label: int = NO_LABEL
    """Of all its images, where a folder or a table beside it says so."""
    classes: Classes | None = None
    """How its label column's values become labels."""
    split: str | None = None
    """Of a tar that holds several; None where the file is of one."""
    folders: tuple[tuple[str, int], ...] | None = None
    """Of a tar: the folders in it that are read, each with the label of its images."""


class Sample(NamedTuple):
    name: str
    data: bytes
    label: int = NO_LABEL
    path: str = ""
    """What the row's `path` says, where that is not the name."""
    text: str | None = None
    """The label as a tar has it."""


Row = Sample | Quarantined


def raise_if_outage(error: Exception, location: Location) -> None:
    """Raise what is a fault of the storage, not of one file: a build can go on after it, while
    quarantine would throw away sound images."""
    if isinstance(error, OSError) and not location.is_local and not is_about_the_file(error):
        raise error


def too_large(name: str, size: int) -> Quarantined:
    message = f"the file has {size:,} bytes, more than the {MAX_IMAGE_BYTES:,} of the largest image"
    return Quarantined(name, "too large", message)
