"""Images that a Parquet file or a table names by their paths, and that lie beside it."""

import posixpath

import pyarrow as pa
import pyarrow.parquet as pq

from selfray.storage import Location

MAX_IMAGE_BYTES = 256 * 2**20
"""A larger file is refused unread: it would take the worker's memory, and is no photograph."""


def image_beside(folder: Location, path: str) -> Location:
    """The file that a row's path names, inside the folder. ValueError where it leads out of it: a
    file from a stranger must not choose what is read."""
    root = folder.path.rstrip("/") + "/"
    inner = path.removeprefix(root) if folder.is_local else path
    inner = posixpath.normpath(inner)
    if inner.startswith(("/", "../")) or inner in ("..", ".") or "://" in inner or "\0" in inner:
        raise ValueError(f"the path {path} does not lie in {folder}")
    return folder / inner


def _found_beside(parquet_uri: str, path: str) -> Location:
    """`image_beside`; a path that Windows wrote is taken where there is none by its own name."""
    folder = Location.of(parquet_uri).parent
    place = image_beside(folder, path)
    if "\\" in path and not place.exists():
        return image_beside(folder, path.replace("\\", "/"))
    return place


def read_beside(parquet_uri: str, path: str) -> bytes:
    """The bytes of the image that a row names. OSError, ValueError say why there are none."""
    place = _found_beside(parquet_uri, path)
    size = place.info().size
    if size is None:
        raise FileNotFoundError(f"{place} does not exist")
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"{place} has {size:,} bytes, more than any image")
    return place.read_bytes()


def require_images_beside(uri: str, schema: pa.Schema, image: str) -> None:
    """Refuse a file whose first row holds the path of an image that is not there, no bytes.

    Told at the start rather than after minutes, when a run finds no readable image.
    """
    path = _first_path(uri, schema, image)
    if path is None:
        return
    try:
        found = _found_beside(uri, path).exists()
    except ValueError:
        found = False
    if not found:
        raise ValueError(
            f"{uri} holds only the paths of images, no bytes, and there is no {path} beside it: "
            "give the folder of the images, put the file where the paths begin, or write it with "
            "the images inside"
        )


def _first_path(uri: str, schema: pa.Schema, image: str) -> str | None:
    """The path in the first row, where it has one and no bytes."""
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
        return None  # what cannot be read is named when it is read
    if isinstance(first, dict):
        return None if first.get("bytes") is not None else first.get("path")
    return first if isinstance(first, str) else None
