"""Lists the files of a data set: local folders with links and odd names, object stores,
patterns."""

import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pyarrow import fs

from selfray.check import require
from selfray.data.layout import (
    IMAGE_EXTENSIONS,
    TEST,
    TRAIN,
    UNLABELED,
    VALIDATION,
    SourceKind,
    extension,
    understand,
)
from selfray.pixels.foreign import ENVI_DATA
from selfray.storage import Location, one_line

IGNORED_NAMES = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX"})
ARCHIVES = frozenset({"7z", "bz2", "gz", "rar", "tbz2", "tgz", "txz", "xz", "zip", "zst"})
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables of labels beside images, as in Hugging Face's ImageFolder."""


class Quarantined(NamedTuple):
    file: str
    """Name inside the source: `a/b.jpg`, `archive.tar!member`, `file.parquet#row 17`."""
    reason: str
    message: str


class File(NamedTuple):
    name: str
    bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Listing:
    """The files at a path."""

    root: Location
    """The folder to which names are relative."""
    files: list[File]
    """Sorted by name."""
    quarantined: list[Quarantined]
    """Files and folders that could not be listed."""

    def uri(self, name: str) -> str:
        return (self.root / name).uri


def list_source(source: Location) -> Listing:
    """List the files at a path. Raises FileNotFoundError or ValueError if there is nothing to
    use."""
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
        return Listing(source.parent, [_file(info, source.name)], [])
    files, quarantined = _below(source)
    require(bool(files or quarantined), f"{source} is empty: give a folder that holds images")
    return Listing(source, files, quarantined)


def list_matching(pattern: str) -> Listing:
    """List the files that match a pattern: * is any part of a name, ** any folders, and a matching
    folder stands for all files in it. Every other character stands for itself.

    Names are relative to the last folder without a *. Folders that do not match are not read.
    """
    parts = pattern.split("/")
    first = next(index for index, part in enumerate(parts) if "*" in part)
    root = Location.of("/".join(parts[:first]) or ("/" if first else "."))
    found: dict[str, File] = {}
    quarantined: list[Quarantined] = []
    _match(root, "", parts[first:], found, quarantined)
    return Listing(root, [found[name] for name in sorted(found)], quarantined)


def _match(
    root: Location,
    prefix: str,
    parts: Sequence[str],
    found: dict[str, File],
    quarantined: list[Quarantined],
) -> None:
    folder = root / prefix if prefix else root
    if not parts or not parts[0]:
        files, more = _below(folder)
        found |= {
            f"{prefix}/{file.name}": file._replace(name=f"{prefix}/{file.name}") for file in files
        }
        quarantined += more
        return
    if parts[0] == "**":
        _match(root, prefix, parts[1:] or ["*"], found, quarantined)
    is_last = len(parts) == 1
    wanted = re.compile(".*".join(re.escape(p) for p in parts[0].split("*")), re.DOTALL)
    for info in _entries(folder, quarantined):
        base = posixpath.basename(info.path.rstrip("/"))
        name = f"{prefix}/{base}" if prefix else base
        if is_ignored(base) or (parts[0] != "**" and not wanted.fullmatch(base)):
            continue
        if info.type == fs.FileType.Directory:
            rest = parts if parts[0] == "**" else parts[1:]
            _match(root, name, rest, found, quarantined)
        elif info.is_file and (is_last or parts == ["**", "*"]):
            found[name] = _file(info, name)


def _entries(folder: Location, quarantined: list[Quarantined]) -> list[fs.FileInfo]:
    try:
        return folder.list()
    except (OSError, UnicodeError) as error:
        quarantined.append(Quarantined(folder.uri, "unreadable", one_line(error)))
        return []


def parquet_files(path: str | Location) -> list[str]:
    """The Parquet files at a path: a file, a folder (searched recursively) or a pattern with *.
    Hidden files and folders are skipped. Empty if there are none."""
    text = str(path)
    if "*" in text and not Location.of(path).exists():
        listing = list_matching(text)
    else:
        location = Location.of(path)
        info = location.info()
        if info.type == fs.FileType.File:
            return [location.uri] if location.path.endswith(".parquet") else []
        if info.type == fs.FileType.NotFound:
            return []
        listing = Listing(location, *_below(location))
    return [listing.uri(name) for name in parquet_names(listing.files)]


def parquet_names(files: Sequence[File]) -> list[str]:
    """The names of Parquet files, without those that other programs are still writing (_*)."""
    return [
        file.name
        for file in files
        if extension(file.name) == "parquet"
        and not any(part.startswith("_") for part in file.name.split("/"))
    ]


class Selected(NamedTuple):
    """The files of a source that belong together."""

    kind: SourceKind
    files: list[File]
    tables: list[File]
    """Metadata beside images."""


def select(source: object, files: Sequence[File]) -> Selected:
    """Determine the kind of a source. Raises ValueError if its files are of several kinds."""
    by_kind: dict[str, list[File]] = {"images": [], "tar": [], "parquet": []}
    tables, others = [], []
    for file in files:
        suffix = extension(file.name)
        if posixpath.basename(file.name) in METADATA_NAMES:
            tables.append(file)
        elif suffix in IMAGE_EXTENSIONS:
            by_kind["images"].append(file)
        elif suffix in ("tar", "parquet"):
            by_kind[suffix].append(file)
        else:
            others.append(file)
    if not by_kind["images"]:
        # Without images these are not tables of labels: a data set may have such a name.
        by_kind["parquet"] += [file for file in tables if extension(file.name) == "parquet"]
        by_kind["parquet"].sort()
        others += [file for file in tables if extension(file.name) != "parquet"]
        tables = []
    names = set(parquet_names(by_kind["parquet"]))
    by_kind["parquet"] = [file for file in by_kind["parquet"] if file.name in names]
    present = [kind for kind, found in by_kind.items() if found]
    if len(present) > 1:
        found = ", ".join(f"{len(by_kind[kind])} {kind}" for kind in present)
        raise ValueError(
            f"{source} holds files of several kinds ({found}): give a folder of one kind"
            + (f", or a file, such as {by_kind['parquet'][0].name}" if "parquet" in present else "")
        )
    if not present and others and all(extension(file.name) in ARCHIVES for file in others):
        raise ValueError(
            f"{source} holds packed archives ({others[0].name}): unpack them, and give the folder; "
            "of archives, .tar alone is read as it is"
        )
    if present == ["tar"]:
        return Selected("tar", by_kind["tar"], [])
    if present == ["parquet"]:
        return Selected("parquet", by_kind["parquet"], [])
    # With the others: images may have no or a wrong extension, and non-images must be reported.
    return Selected("images", sorted(by_kind["images"] + others), tables)


def _file(info: fs.FileInfo, name: str) -> File:
    return File(name, info.size or 0, info.mtime_ns or 0)


def _below(folder: Location) -> tuple[list[File], list[Quarantined]]:
    """(all files below a folder, sorted by name; those that could not be listed)."""
    if folder.is_local:
        return _walk(folder.path)
    prefix = len(folder.path.rstrip("/")) + 1
    files = [
        _file(info, info.path[prefix:])
        for info in folder.list(recursive=True)
        if info.is_file and not is_ignored(info.path[prefix:])
    ]
    return sorted(files), []


def _walk(root: str) -> tuple[list[File], list[Quarantined]]:
    """All files below a local folder; each folder counts once, however many links lead to it.

    pyarrow's own listing follows circular links and returns each image forty times, omits dangling
    links, and fails at the first folder without permission. Here folders are identified by device
    and inode, and folders of the tree are listed before those that links lead to.
    """
    files: list[File] = []
    quarantined: list[Quarantined] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [(root, "")], []

    def refuse(name: str, message: str) -> None:
        shown = name.encode(errors="backslashreplace").decode()
        quarantined.append(Quarantined(shown, "unreadable", message))

    while folders or links:
        folder, prefix = folders.pop() if folders else links.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                refuse(prefix.rstrip("/"), "this link leads to a folder that is already listed")
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                found = list(entries)
        except OSError as error:
            if not prefix:
                raise
            refuse(prefix.rstrip("/"), one_line(error))
            continue
        for entry in found:
            name = prefix + entry.name
            if is_ignored(entry.name):
                continue
            try:
                name.encode()
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append((entry.path, name + "/"))
                elif not entry.is_file():
                    kind = "a dangling link" if entry.is_symlink() else "not a regular file"
                    refuse(name, f"this is {kind}")
                else:
                    status = entry.stat()
                    files.append(File(name, status.st_size, status.st_mtime_ns))
            except UnicodeEncodeError:
                refuse(name, "the file name is not UTF-8: rename the file")
            except OSError as error:
                refuse(name, one_line(error))
        links.sort(reverse=True)
    return sorted(files), sorted(quarantined)


def is_ignored(name: str) -> bool:
    return any(
        part in IGNORED_NAMES or (part.startswith(".") and part not in (".", ".."))
        for part in name.split("/")
    )


def bare_values(names: Sequence[str]) -> list[Quarantined]:
    """Files that hold the bare values of an ENVI image, which a header beside them describes."""
    headers = {name[:-4] for name in names if name.endswith(".hdr")}
    parts = ((name, *posixpath.splitext(name)) for name in names)
    return [
        Quarantined(
            name,
            "unsupported",
            f"the values of an ENVI image, described by {stem}.hdr: convert it to TIFF",
        )
        for name, stem, extension in parts
        if extension[1:].lower() in ENVI_DATA and stem in headers
    ]


def split_files(uris: Sequence[str], folder: str | Location) -> tuple[list[str], list[str]]:
    """(train files, test files) among the Parquet files of a folder, by their names."""
    root = (str(folder) if "://" in str(folder) else Location.of(folder).uri).rstrip("/") + "/"
    names = [
        uri.removeprefix(root) if uri.startswith(root) else posixpath.basename(uri) for uri in uris
    ]
    splits = understand(names, "parquet").splits
    found = list(zip(uris, splits, strict=True))
    train = [uri for uri, split in found if split in (TRAIN, UNLABELED)]
    return train, [uri for uri, split in found if split in (VALIDATION, TEST)]
