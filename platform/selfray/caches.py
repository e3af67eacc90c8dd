"""Folders outside the output: caches, whose contents are run as code, and logs of no run. Where a
machine has several users, only those count that nobody else can write to.

Imports nothing of selfray, since the kernels need it first.
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
    """Where a cache may lie, best first: the folder that the user names, `selfray` in
    XDG_CACHE_HOME or ~/.cache, a folder in the temporary one. Each has to be made, and asked
    `why_not_private`."""
    if named:
        yield Path(named)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        yield Path(caches) / "selfray"
    with contextlib.suppress(RuntimeError):  # this user has no home folder
        yield Path.home() / ".cache" / "selfray"
    yield temporary()


def temporary() -> Path:
    """This user's folder in the temporary one. Anybody may have made one by its name."""
    return Path(tempfile.gettempdir()) / f"selfray-{os.getuid()}"


def make(folder: Path) -> None:
    """Make a folder for this user alone; OSError where that cannot be."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def private(folders: Iterator[Path]) -> Path:
    """The first of these folders that can be made and written by this user, and by no other; else
    a new one with a name that nobody can guess."""
    for folder in folders:
        with contextlib.suppress(OSError):
            make(folder)
            if why_not_private(folder) is None and os.access(folder, os.W_OK):
                return folder
    return Path(tempfile.mkdtemp(prefix="selfray-"))


def why_not_private(folder: Path) -> str | None:
    """Whose folder this is, or who else may write to it, in words; None where only this user and
    root can change what lies in it, by way of any folder or link on its path.

    FileNotFoundError where there is no such folder.
    """
    # By the names that lead there, whose links may be changed, and by where they lead.
    for path in (Path(os.path.abspath(folder)), folder.resolve(strict=True)):
        for part in (path, *path.parents):
            found = part.lstat()
            if found.st_uid not in (0, os.getuid()):
                return f"{part} belongs to {_name(found.st_uid)}"
            if stat.S_ISLNK(found.st_mode):
                continue
            # In a sticky folder, such as /tmp, nobody removes or renames what is another's.
            is_sticky = part != path and bool(found.st_mode & stat.S_ISVTX)
            if _others_write(found) and not is_sticky:
                return f"others may write to {part} (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _others_write(found: os.stat_result) -> bool:
    by_group = bool(found.st_mode & stat.S_IWGRP)
    return bool(found.st_mode & stat.S_IWOTH) or (by_group and not _is_group_of_one(found))


def _is_group_of_one(found: os.stat_result) -> bool:
    """Whether the group is the owner's own: many systems give each user one of the same name."""
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
    """A descriptor that appends to a file of this user, made if it is missing, readable by its user
    alone. OSError where a link or another's file lies in its place: writing would go elsewhere."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    if path.is_symlink():
        raise OSError(f"{path} is a link, and its file may be another's: remove it")
    descriptor = os.open(path, flags, 0o600)
    found = os.fstat(descriptor)
    if found.st_uid != os.getuid() or found.st_nlink > 1 or not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not this user's own file: remove it")
    return descriptor
