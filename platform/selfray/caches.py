"""Folders outside the output: caches, whose contents are run as code, and logs that belong to no
run. A folder that other users of the machine can write to is not used.

Imports no other module of selfray, since the kernels need it first.
"""

import contextlib
import grp
import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


def choices(named: str | None = None) -> Iterator[Path]:
    """Candidate folders for a cache, best first: `named`, `selfray` in XDG_CACHE_HOME, `selfray` in
    ~/.cache, a folder in the temporary folder. None is created yet, nor checked by
    `why_not_private`."""
    if named:
        yield Path(named)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        yield Path(caches) / "selfray"
    with contextlib.suppress(RuntimeError):  # this user has no home folder
        yield Path.home() / ".cache" / "selfray"
    yield temporary()


def temporary() -> Path:
    """This user's folder in the system's temporary folder. Another user may have created it."""
    return Path(tempfile.gettempdir()) / f"selfray-{os.getuid()}"


def make(folder: Path) -> None:
    """Create a folder that only this user can access, if it is missing. OSError if that fails."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def private(folders: Iterator[Path]) -> Path:
    """The first of these folders that this user can create and write, and no other user can write;
    else a new temporary folder with a random name."""
    for folder in folders:
        with contextlib.suppress(OSError):
            make(folder)
            if why_not_private(folder) is None and os.access(folder, os.W_OK):
                return folder
    return Path(tempfile.mkdtemp(prefix="selfray-"))


def why_not_private(folder: Path) -> str | None:
    """None if only this user and root can change the folder's content, including by replacing a
    folder or link on its path; else a sentence that names the owner or the mode that prevents it.

    FileNotFoundError if the folder does not exist.
    """
    # Check both the path as given, whose links could be replaced, and the path they resolve to.
    for path in (Path(os.path.abspath(folder)), folder.resolve(strict=True)):
        for part in (path, *path.parents):
            found = part.lstat()
            if found.st_uid not in (0, os.getuid()):
                return f"{part} belongs to {_name(found.st_uid)}"
            if stat.S_ISLNK(found.st_mode):
                continue
            # In a sticky folder, such as /tmp, users cannot remove or rename each other's files.
            is_sticky = part != path and bool(found.st_mode & stat.S_ISVTX)
            if _others_write(found) and not is_sticky:
                return f"others may write to {part} (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _others_write(found: os.stat_result) -> bool:
    by_group = bool(found.st_mode & stat.S_IWGRP)
    return bool(found.st_mode & stat.S_IWOTH) or (by_group and not _is_group_of_one(found))


def _is_group_of_one(found: os.stat_result) -> bool:
    """Whether the group holds only the owner: many systems give each user a group of that name."""
    try:
        group, owner = grp.getgrgid(found.st_gid), pwd.getpwuid(found.st_uid)
    except KeyError:
        return False
    return group.gr_name == owner.pw_name and not set(group.gr_mem) - {owner.pw_name}


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def append_to(path: Path) -> int:
    """Open a file of this user for appending; a missing one is created, readable by this user only.
    OSError if the path is a link or another user's file, which would redirect the writing.

    Returns:
        An open file descriptor.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    if path.is_symlink():
        raise OSError(f"{path} is a link, possibly to another user's file: remove it")
    descriptor = os.open(path, flags, 0o600)
    found = os.fstat(descriptor)
    if found.st_uid != os.getuid() or found.st_nlink > 1 or not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not this user's own file: remove it")
    return descriptor
