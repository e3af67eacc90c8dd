"""The Ray that selfray starts where no cluster is named: for its user alone, and small.

Every port of it is on the loopback interface, Ray's token check is on, and the token and all of the
session lie in a folder that its user alone can read. Of Ray's processes only those start that one
machine needs: no dashboard, no log monitor, no autoscaler.
"""

import atexit
import logging
import os
import secrets
import select
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfray import signals
from selfray.cluster import ray_internals

log = logging.getLogger(__name__)

PREFIX = "selfray-ray-"
TOKEN = "token"
RAYS_PART = "r"
"""Ray's own folder, inside the session's: Ray opens it to everybody."""
OWNER = "owner"
"""In a session's folder: the process that started it."""
LONGEST_FOLDER = 32
"""Bytes. A Unix socket's path has 107 at most; Ray's own part of it takes up to 75."""
STORE_BYTES = 2 * 2**30
STORE_SHARE = 0.25
"""The object store gets this share of the free shared memory, and STORE_BYTES at most. Streams keep
a third of it filled; Ray's own default, 30 % of the machine, is meant for data sets held in it."""
START_SECONDS = 90.0
"""A start that takes longer is given up and tried once more."""
SLOW_SECONDS = 10.0
"""Then the console is told that it is slow."""

MEMORY_LIMIT = "RAY_memory_usage_threshold"

LAST_WORDS_SECONDS = 15.0
"""How long a run whose Ray is gone may take to write down what happened."""

Say = Callable[[str], None]


class StartFailed(OSError):  # noqa: N818 - the start is what failed
    """Ray did not come up; the message is the cause in one line."""


_session: Path | None = None
_before: dict[str, str | None] = {}


def is_running() -> bool:
    """Whether this process, or the driver of this worker, started the Ray in use."""
    return os.environ.get("SELFRAY_LOCAL_RAY") == "1"


def start(options: Mapping[str, Any], say: Say = lambda _: None) -> None:
    """Start Ray and connect to it. StartFailed after two attempts."""
    sweep_leftovers()
    for attempt in (1, 2):
        try:
            _start(options, say)
            return
        except Exception as error:
            if signals.were_received():  # Ctrl-C ended Ray's processes, too: nothing is to be said
                raise
            log.exception("Ray did not start")
            stop()
            if attempt == 2:
                raise StartFailed(
                    f"Ray did not start on this machine ({_one_line(error)}): stop other programs "
                    "that take its memory or CPUs, or name a cluster with RAY_ADDRESS"
                ) from error
            say(f"Ray did not start ({_one_line(error)}): trying once more")


def _start(options: Mapping[str, Any], say: Say) -> None:
    global _session
    _session = _new_folder()
    _set(
        {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(_write_token(_session)),
            "RAY_AUTH_TOKEN": None,
            # Nothing collects them.
            "RAY_enable_metrics_collection": "0",
            "RAY_TRAIN_METRICS_ENABLED": "0",
            # This machine is not taken away with notice.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            "RAY_agent_register_timeout_ms": "120000",
            "RAY_worker_register_timeout_seconds": "180",
            # Ray kills workers when the machine's memory is nearly full, whoever filled it.
            MEMORY_LIMIT: os.environ.get(MEMORY_LIMIT, "0.98"),
            "SELFRAY_LOCAL_RAY": "1",
        }
    )
    with _told_when_slow(say):
        ray_internals.start_on_loopback(
            _session / RAYS_PART, START_SECONDS, object_store_memory=store_bytes(), **options
        )


def stop() -> None:
    """Stop what `start` started, and remove its folder."""
    global _session
    import ray

    if ray.is_initialized():
        ray.shutdown()
    if _session is not None:
        ray_internals.stop_loopback()
        shutil.rmtree(_session, ignore_errors=True)
        _session = None
    _restore()


@contextmanager
def told_when_lost(tell: Callable[[str], None]) -> Iterator[None]:
    """While this lasts, call `tell` with the cause if Ray's own processes end, then leave with exit
    code 1: Ray's library would end this process a moment later, without a word."""
    if _session is None:
        yield
        return
    ended = select.poll()
    watched = {os.pidfd_open(pid): name for name, pid in ray_internals.own_processes().items()}
    over, stop_watching = os.pipe()
    for file in (*watched, over):
        ended.register(file, select.POLLIN)

    def watch() -> None:
        gone = [file for file, _ in ended.poll() if file in watched]
        if not gone:
            return
        name = watched[gone[0]]
        threading.Timer(LAST_WORDS_SECONDS, os._exit, (1,)).start()
        try:
            tell(
                f"Ray's process {name} ended unexpectedly (killed, or out of memory): the same "
                "command continues from the last checkpoint"
            )
        finally:
            abandon()
            os._exit(1)

    thread = threading.Thread(target=watch, daemon=True, name="selfray-ray-watch")
    thread.start()
    try:
        yield
    finally:
        os.close(stop_watching)
        thread.join(1)
        for file in (*watched, over):
            os.close(file)


def store_bytes() -> int:
    """How large the object store is, in bytes: at most what the shared memory has free."""
    free = shutil.disk_usage("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())
    return max(80 * 2**20, min(STORE_BYTES, int(STORE_SHARE * free.free)))


# --- the session's folder


def _new_folder() -> Path:
    """A folder of this session alone, with a name that nobody can guess, readable by its user."""
    refused = ""
    for parent in _parents():
        try:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        except OSError as error:
            refused = f"{parent}: {error.strerror}"
            continue
        (folder / OWNER).write_text(f"{os.getpid()} {_started_at(os.getpid())}")
        return folder
    raise StartFailed(
        f"Ray has no folder for its sockets ({refused or 'TMPDIR is too long'}): set TMPDIR to a "
        f"writable folder of at most {LONGEST_FOLDER - len(PREFIX)} characters"
    )


def _parents() -> list[str]:
    """Where the folder may lie: the first that is short enough and can be written."""
    wanted = [tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp"]
    room = LONGEST_FOLDER - len(PREFIX)
    return [path for path in dict.fromkeys(wanted) if path and len(os.fsencode(path)) <= room]


def sweep_leftovers() -> None:
    """Remove the folders of this user's sessions whose process was killed."""
    for parent in _parents():
        for folder in Path(parent).glob(f"{PREFIX}*"):
            try:
                if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                    continue
                pid, started = (folder / OWNER).read_text().split()
            except (OSError, ValueError):
                continue
            if _started_at(int(pid)) != started:
                _kill_processes_of(folder)
                shutil.rmtree(folder, ignore_errors=True)


def _kill_processes_of(folder: Path) -> None:
    """End at once all processes of a session. They have its token in their environment."""
    wanted = f"RAY_AUTH_TOKEN_PATH={folder / TOKEN}\0".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.name != str(os.getpid()) and wanted in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:  # it has ended, or is another user's
            continue


def _started_at(pid: int) -> str:
    """When a process started: another one may have its number by now. "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _write_token(folder: Path) -> Path:
    path = folder / TOKEN
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "w") as stream:
        stream.write(secrets.token_hex(32))
    return path


# --- the environment, which Ray's processes inherit


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        _before.setdefault(name, os.environ.get(name))
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    ray_internals.read_token_again()


def _restore() -> None:
    """A cluster that is joined later has an owner, and settings of its own."""
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()
    ray_internals.read_token_again()


@contextmanager
def _told_when_slow(say: Say) -> Iterator[None]:
    started, done = time.monotonic(), threading.Event()

    def watch() -> None:
        while not done.wait(SLOW_SECONDS):
            load = os.getloadavg()[0]
            say(
                f"Ray is starting slowly, {time.monotonic() - started:.0f} s so far (load "
                f"{load:.0f} on {os.cpu_count()} CPUs): waiting"
            )

    thread = threading.Thread(target=watch, daemon=True, name="selfray-ray-slow")
    thread.start()
    try:
        yield
    finally:
        done.set()


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def abandon() -> None:
    """Before this process ends at once: end what Ray started, and remove its folder."""
    if _session is not None:
        _kill_processes_of(_session)
        shutil.rmtree(_session, ignore_errors=True)


atexit.register(abandon)
