"""Paths that may be local, s3:// or gs://: one small layer over pyarrow's filesystems."""

import json
import os
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs


@dataclass(frozen=True)
class Location:
    """A file or folder on some filesystem. `path` is in the filesystem's own form (no scheme)."""

    filesystem: fs.FileSystem
    path: str
    uri: str
    """What the user wrote, made absolute: what messages show and other machines can open."""

    @classmethod
    def of(cls, path: "str | Path | Location") -> "Location":
        """Open a path or URI. ValueError names the path where its scheme is not understood."""
        if isinstance(path, Location):
            return path
        text = os.path.expanduser(str(path))
        if "://" not in text:
            absolute = os.path.abspath(text)
            return cls(fs.LocalFileSystem(), absolute, absolute)
        try:
            filesystem, inner = fs.FileSystem.from_uri(text)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"cannot open {text}: {error}; use a local path, s3://bucket/folder or "
                "gs://bucket/folder"
            ) from None
        return cls(filesystem, inner, text)

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def name(self) -> str:
        return posixpath.basename(self.path.rstrip("/"))

    def __truediv__(self, name: str) -> "Location":
        return Location(
            self.filesystem, posixpath.join(self.path, name), posixpath.join(self.uri, name)
        )

    @property
    def parent(self) -> "Location":
        return Location(self.filesystem, posixpath.dirname(self.path), posixpath.dirname(self.uri))

    def __str__(self) -> str:
        return self.uri

    def info(self) -> fs.FileInfo:
        return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        return self.info().type != fs.FileType.NotFound

    def is_folder(self) -> bool:
        return self.info().type == fs.FileType.Directory

    def list(self, recursive: bool = False) -> list[fs.FileInfo]:
        """What lies in this folder, sorted by path; empty where the folder does not exist."""
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        return sorted(self.filesystem.get_file_info(selector), key=lambda info: info.path)

    def make_folder(self) -> None:
        self.filesystem.create_dir(self.path, recursive=True)

    def delete_folder(self) -> None:
        if self.exists():
            self.filesystem.delete_dir(self.path)

    def read_bytes(self) -> bytes:
        with self.filesystem.open_input_stream(self.path) as stream:
            return stream.read()

    def read_json(self) -> Any:
        return json.loads(self.read_bytes())

    def write_bytes(self, data: bytes) -> None:
        """Write a whole file so that a reader, or a crash, sees all of it or none of it.

        Locally by a temporary name, fsync and rename; an object store shows an object only once
        its upload is complete.
        """
        if not self.is_local:
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(data)
            return
        temporary = f"{self.path}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def write_json(self, value: Any) -> None:
        self.write_bytes(json.dumps(value, indent=1).encode())
