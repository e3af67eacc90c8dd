"""What a data set's names and columns mean: decided here, once, for every command."""

from dataclasses import dataclass
from typing import Literal

SourceKind = Literal["images", "tar", "parquet"]


@dataclass(frozen=True)
class Layout:
    """How the source is read, and whether its rows have labels."""

    kind: SourceKind
    has_labels: bool
    label_names: tuple[str, ...] | None = None
    image_column: str = "image"
    label_column: str | None = None
