"""The files of a source, by name: local folders with links and odd names, or an object store."""

import os
import posixpath
from typing import NamedTuple

from pyarrow import fs

from selfray.check import require
from selfray.storage import Location, one_line

# fmt: off
IMAGE_EXTENSIONS = frozenset({
    "avif", "bmp", "gif", "heic", "jfif", "jp2", "jpe", "jpeg", "jpg",
    "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp",
})
# fmt: on
IGNORED_NAMES = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX"})


class Quarantined(NamedTuple):
    file: str
    """Name inside the source: `a/b.jpg`, `archive.tar!member`, `file.parquet#row 17`."""
    reason: str
    message: str


class File(NamedTuple):
    name: str
    bytes: int
    modified_ns: int


def list_source(source: Location) -> tuple[Location, list[File], list[Quarantined]]:
    """(the folder that names count from, files sorted by name, what could not be listed)."""
    info = source.info()
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(
            f"{source} does not exist: give a folder of images, or .tar or .parquet files"
        )
    if info.type == fs.FileType.File:
        kinds = (".tar", ".parquet")
        require(
            source.path.endswith(kinds),
            f"{source} is a file, but neither .tar nor .parquet: give a folder of images, "
            "a .tar or a .parquet file",
        )
        parent = Location(
            source.filesystem, posixpath.dirname(source.path), posixpath.dirname(source.uri)
        )
        return parent, [File(source.name, info.size or 0, info.mtime_ns or 0)], []
    if source.is_local:
        files, quarantined = _walk(source.path)
    else:
        prefix = len(source.path.rstrip("/")) + 1
        listed = source.list(recursive=True)
        files = [
            File(info.path[prefix:], info.size or 0, info.mtime_ns or 0)
            for info in listed
            if info.is_file
        ]
        quarantined = []
    files = sorted(file for file in files if not is_ignored(file.name))
    require(bool(files or quarantined), f"{source} is empty: give a folder that holds images")
    return source, files, quarantined


def _walk(root: str) -> tuple[list[File], list[Quarantined]]:
    """All files below a local folder.

    pyarrow's own listing follows links in a circle, giving each image forty times, leaves dangling
    links out and gives up at the first folder that it may not open.
    """
    files: list[File] = []
    quarantined: list[Quarantined] = []

    def visit(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            message = "this link leads back to a folder above it"
            quarantined.append(Quarantined(prefix.rstrip("/"), "unreadable", message))
            return
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = prefix + entry.name
                if is_ignored(name):
                    continue
                try:
                    name.encode()
                    if entry.is_dir():
                        visit(entry.path, name + "/", above | {identity})
                    elif not entry.is_file():
                        kind = "a link to nowhere" if entry.is_symlink() else "no regular file"
                        quarantined.append(Quarantined(name, "unreadable", f"this is {kind}"))
                    else:
                        status = entry.stat()
                        files.append(File(name, status.st_size, status.st_mtime_ns))
                except UnicodeEncodeError:
                    shown = name.encode(errors="backslashreplace").decode()
                    message = "the file name is not UTF-8: rename the file"
                    quarantined.append(Quarantined(shown, "unreadable", message))
                except OSError as error:
                    quarantined.append(Quarantined(name, "unreadable", one_line(error)))

    visit(root, "", frozenset())
    return files, quarantined


def is_ignored(name: str) -> bool:
    return any(
        part in IGNORED_NAMES or (part.startswith(".") and part not in (".", ".."))
        for part in name.split("/")
    )


def extension(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()
