"""Paths that may be local, s3:// or gs://: one small layer over pyarrow's filesystems."""

import errno
import json
import os
import posixpath
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from pyarrow import fs

from selfray.masking import end_of_credentials, masked, masked_json

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Retry:
    """How often and how long to retry a failing store: exponential back-off with jitter."""

    attempts: int = 8
    first_seconds: float = 0.5
    longest_seconds: float = 16.0

    def pauses(self, rng: random.Random | None = None) -> Iterator[float]:
        """Seconds before each further attempt: uniform between half and all of first, 2 * first,
        4 * first, ... seconds, so that many readers do not retry at once."""
        # Created at the first failure: it takes 10 us, and nearly every read succeeds.
        rng = rng or random.Random()
        for attempt in range(self.attempts - 1):
            yield rng.uniform(0.5, 1.0) * min(self.longest_seconds, self.first_seconds * 2**attempt)


RETRY = Retry()
"""At most 47.5 s of pauses, plus the time of Arrow's own retries in each attempt, about 6 s if
connections are refused (measured)."""

# Errors of a network file system whose server is away or busy; a full disk is not among them.
_TRANSIENT_ERRNOS = frozenset(
    {errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.EHOSTUNREACH}
)


def is_about_the_file(error: OSError) -> bool:
    """Whether an object store's error concerns the named object, not the store."""
    about = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    # Arrow raises most refusals of S3 as a bare OSError with the cause in its text.
    causes = ("ACCESS_DENIED", "NO_SUCH_", "RESOURCE_NOT_FOUND", "INVALID_", "HTTP status 40")
    # Arrow's messages for a file whose bytes arrived but are not valid Parquet.
    causes += ("CRC checksum verification", "deserialize thrift", "Unexpected end of stream")
    return isinstance(error, about) or any(cause in str(error) for cause in causes)


def is_transient(error: OSError, is_local: bool) -> bool:
    """Whether the same call may succeed later."""
    if is_local:
        return error.errno in _TRANSIENT_ERRNOS
    return not is_about_the_file(error) and error.errno != errno.ENOSPC


def patiently(
    action: Callable[[], _Result], what: "Location", retry: Retry | None = None
) -> _Result:
    """Call action(), and retry while the store fails. The action must be safe to repeat.

    Raises OSError after the last attempt, with the number of attempts, the time and the last error.
    """
    pauses = (retry or RETRY).pauses()
    started, attempts = time.monotonic(), 1
    while True:
        try:
            return action()
        except OSError as error:
            if not is_transient(error, what.is_local):
                raise
            pause = next(pauses, None)
            if pause is None:
                raise OSError(
                    error.errno or errno.EIO,
                    f"{what} did not answer in {attempts} attempts over "
                    f"{time.monotonic() - started:.0f} s; the last error: {one_line(error)}",
                ) from error
        time.sleep(pause)
        attempts += 1


def one_line(error: Exception) -> str:
    return masked(" ".join(str(error).split())) or type(error).__name__


def last_line(error: BaseException) -> str:
    """The last line of an error, where Ray and torch give the cause; its type if it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@lru_cache(maxsize=16)
def _object_store(
    scheme: str, authority: str, environment: tuple[tuple[str, str], ...]
) -> fs.FileSystem:
    """One client for each store and process, so that connections stay open between reads."""
    return fs.FileSystem.from_uri(f"{scheme}://{authority}/")[0]


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    scheme, _, rest = uri.partition("://")
    if scheme not in ("s3", "gs", "gcs"):
        return fs.FileSystem.from_uri(uri)
    if end_of_credentials(scheme, rest):
        raise ValueError(
            "credentials in a path would be recorded with every run (set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the environment)"
        )
    if "?" in rest:
        raise ValueError(
            "settings after a ? would not reach the files inside (set AWS_ENDPOINT_URL, "
            "AWS_REGION and the like in the environment)"
        )
    authority, _, inner = rest.partition("/")
    environment = tuple(
        sorted(i for i in os.environ.items() if i[0].startswith(("AWS_", "GOOGLE_")))
    )
    filesystem = _object_store(scheme, authority, environment)
    return filesystem, f"{authority}/{unquote(inner)}".rstrip("/")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds the number {name}")


@dataclass(frozen=True)
class Location:
    """A file or folder on a filesystem. `path` is in the filesystem's own form (no scheme)."""

    filesystem: fs.FileSystem
    path: str
    uri: str
    """The user's path made absolute: messages show it, and other machines can open it."""

    @classmethod
    def of(cls, path: "str | Path | Location") -> "Location":
        """Parse a path or URI. Raises ValueError that names the path if its scheme is unknown."""
        if isinstance(path, Location):
            return path
        text = os.path.expanduser(str(path))
        if "://" not in text:
            absolute = os.path.abspath(text)
            return cls(fs.LocalFileSystem(), absolute, absolute)
        try:
            filesystem, inner = _open(text)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"cannot open {masked(text)}: {masked(str(error))}; use a local path, "
                "s3://bucket/folder or gs://bucket/folder"
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
        return masked(self.uri)

    def info(self) -> fs.FileInfo:
        return patiently(lambda: self.filesystem.get_file_info(self.path), self)

    def exists(self) -> bool:
        return self.info().type != fs.FileType.NotFound

    def is_folder(self) -> bool:
        return self.info().type == fs.FileType.Directory

    def list(self, recursive: bool = False) -> list[fs.FileInfo]:
        """The entries of this folder, sorted by path; empty if the folder does not exist."""
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)

        def read() -> list[fs.FileInfo]:
            return self.filesystem.get_file_info(selector)

        try:
            found = patiently(read, self)
        except FileNotFoundError:  # pyarrow says so if the folder appears while it looks
            found = patiently(read, self)
        return sorted(found, key=lambda info: info.path)

    def make_folder(self) -> None:
        self.filesystem.create_dir(self.path, recursive=True)

    def delete_folder(self) -> None:
        if self.exists():
            self.filesystem.delete_dir(self.path)

    def read_bytes(self) -> bytes:
        def read() -> bytes:
            with self.filesystem.open_input_stream(self.path) as stream:
                return stream.read()

        return patiently(read, self)

    def read_json(self) -> Any:
        return json.loads(self.read_bytes())

    def read_strict_json(self) -> Any:
        """The JSON of a file from an unknown writer. Raises ValueError if it is not valid: not
        UTF-8, nested too deeply, or with numbers that are not finite."""
        try:
            return json.loads(self.read_bytes(), parse_constant=_refuse_constant)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None

    def write_bytes(self, data: bytes) -> None:
        """Write a file atomically: a reader, also after a crash, sees all of it or none of it.

        Locally this takes a temporary name, fsync and rename; an object store shows an object only
        once its upload is complete.
        """
        if not self.is_local:

            def write() -> None:
                with self.filesystem.open_output_stream(self.path) as stream:
                    stream.write(data)

            patiently(write, self)
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
        self.write_bytes(json.dumps(masked_json(value), indent=1).encode())


def read_object(file: Location) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing or damaged (not JSON, not UTF-8, not
    an object, or nested too deeply)."""
    try:
        value = file.read_json()
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
