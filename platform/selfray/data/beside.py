"""Images stored as files beside a Parquet file or table that holds only their paths."""

import posixpath

import pyarrow as pa
import pyarrow.parquet as pq

from selfray.storage import Location

MAX_IMAGE_BYTES = 256 * 2**20
"""Larger files are refused unread: they could fill a worker's memory and are not photographs."""


def image_beside(folder: Location, path: str) -> Location:
    """The file that a row's path names, inside the folder. Raises ValueError for paths that lead
    out
    of it: a file from a stranger must not decide which files are read."""
    root = folder.path.rstrip("/") + "/"
    inner = path.removeprefix(root) if folder.is_local else path
    inner = posixpath.normpath(inner)
    if inner.startswith(("/", "../")) or inner in ("..", ".") or "://" in inner or "\0" in inner:
        raise ValueError(f"the path {path} does not lie in {folder}")
    return folder / inner


def read_beside(parquet_uri: str, path: str) -> bytes:
    """The bytes of the image that a row names. Raises OSError or ValueError with the reason if they
    cannot be read."""
    place = image_beside(Location.of(parquet_uri).parent, path)
    size = place.info().size
    if size is None:
        raise FileNotFoundError(f"{place} does not exist")
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"{place} has {size:,} bytes, more than an image may have")
    return place.read_bytes()


def require_images_beside(uri: str, schema: pa.Schema, image: str) -> None:
    """Raise ValueError if the first row holds only the path of an image that does not exist.

    This fails at the start of a run instead of after minutes, when no image can be read.
    """
    path = _first_path(uri, schema, image)
    if path is None:
        return
    try:
        found = image_beside(Location.of(uri).parent, path).exists()
    except ValueError:
        found = False
    if not found:
        raise ValueError(
            f"{uri} holds only the paths of images, no bytes, and there is no {path} beside it: "
            "give the folder of the images, move the file to the folder where the paths begin, or "
            "write it with the images inside"
        )


def _first_path(uri: str, schema: pa.Schema, image: str) -> str | None:
    """The path in the first row; None if the row has none, or if it has bytes."""
    kind = schema.field(image).type
    if pa.types.is_struct(kind):
        names = [field.name for field in kind.fields]
        if "path" not in names:
            return None
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return None
    location = Location.of(uri)
    try:
        with location.filesystem.open_input_file(location.path) as stream:
            batches = pq.ParquetFile(stream).iter_batches(batch_size=1, columns=[image])
            first = next(batches).column(0)[0].as_py()
    except (OSError, pa.ArrowException, UnicodeError, StopIteration):
        return None  # a later read reports this file
    if isinstance(first, dict):
        return None if first.get("bytes") is not None else first.get("path")
    return first if isinstance(first, str) else None
