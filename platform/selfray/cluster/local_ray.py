"""The local Ray that selfray starts if no cluster is given: small, and only for its user.

All of its ports are on the loopback interface, Ray's token authentication is on, and the token and
the session lie in a folder that only its user can read. Only the processes that one machine needs
are started: no dashboard, no log monitor, no autoscaler.
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
"""Ray's own folder inside the session's folder; Ray makes it readable for everyone."""
OWNER = "owner"
"""File in a session's folder that names the process that started it."""
LONGEST_FOLDER = 32
"""Largest length in bytes: the path of a Unix socket has at most 107, Ray's part takes up to 75."""
STORE_BYTES = 2 * 2**30
STORE_SHARE = 0.25
"""The object store gets this share of the free shared memory, but at most STORE_BYTES. Streams fill
a third of it; Ray's default, 30 % of the machine's memory, is meant for whole data sets."""
START_SECONDS = 90.0
"""A start that takes longer is abandoned and tried once more."""
SLOW_SECONDS = 10.0
"""After this time the console says that the start is slow."""

MEMORY_LIMIT = "RAY_memory_usage_threshold"
IDLE_LIMIT = "RAY_num_workers_soft_limit"
IDLE_WORKERS = 4
"""Ray keeps at least this many idle workers. By default it keeps as many as there are free CPUs,
which are none while a run trains: each probe would start a process that imports torch again."""

LAST_WORDS_SECONDS = 15.0
"""Time for a run whose Ray has ended to record the cause."""

Say = Callable[[str], None]


class StartFailed(OSError):  # noqa: N818 - the start is what failed
    """Raised when Ray did not start; the message is the cause in one line."""


_session: Path | None = None
_before: dict[str, str | None] = {}


def is_running() -> bool:
    """Whether the Ray in use was started by this process or by the driver of this worker."""
    return os.environ.get("SELFRAY_LOCAL_RAY") == "1"


def start(options: Mapping[str, Any], say: Say = lambda _: None) -> None:
    """Start Ray and connect to it. Raises StartFailed after two attempts."""
    sweep_leftovers()
    for attempt in (1, 2):
        try:
            _start(options, say)
            return
        except Exception as error:
            if signals.were_received():  # Ctrl-C also ended Ray's processes: not an error of Ray
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
            # No metrics collector runs.
            "RAY_enable_metrics_collection": "0",
            "RAY_TRAIN_METRICS_ENABLED": "0",
            # A single machine gets no preemption notice.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            "RAY_agent_register_timeout_ms": "120000",
            "RAY_worker_register_timeout_seconds": "180",
            # Ray kills workers if the machine's memory is nearly full, even due to other programs.
            MEMORY_LIMIT: os.environ.get(MEMORY_LIMIT, "0.98"),
            IDLE_LIMIT: os.environ.get(IDLE_LIMIT, f"{max(IDLE_WORKERS, os.cpu_count() or 1)}"),
            "SELFRAY_LOCAL_RAY": "1",
        }
    )
    with _report_slow_start(say):
        ray_internals.start_on_loopback(
            _session / RAYS_PART, START_SECONDS, object_store_memory=store_bytes(), **options
        )


def stop() -> None:
    """Stop the Ray that `start` started, and remove its folder."""
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
def exit_when_lost(tell: Callable[[str], None]) -> Iterator[None]:
    """Inside, if one of Ray's own processes ends, call `tell` with the cause and exit with code 1.
    Ray's library would end this process a moment later without any message."""
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
    """The size of the object store in bytes, which depends on the free shared memory."""
    free = shutil.disk_usage("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())
    return max(80 * 2**20, min(STORE_BYTES, int(STORE_SHARE * free.free)))


# --- the session's folder


def _new_folder() -> Path:
    """A new folder for this session, with a random name, readable only by its user."""
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
    """Candidates for the parent folder whose paths are short enough; the first writable one
    counts."""
    wanted = [tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp"]
    room = LONGEST_FOLDER - len(PREFIX)
    return [path for path in dict.fromkeys(wanted) if path and len(os.fsencode(path)) <= room]


def sweep_leftovers() -> None:
    """Remove this user's session folders whose process was killed."""
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
    """Kill all processes of a session, which have its token's path in their environment."""
    wanted = f"RAY_AUTH_TOKEN_PATH={folder / TOKEN}\0".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.name != str(os.getpid()) and wanted in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:  # it has ended, or belongs to another user
            continue


def _started_at(pid: int) -> str:
    """The start time of a process, because its id may have been reused; "" if there is no such
    one."""
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
    """Restore the environment, because a cluster joined later has its own settings and token."""
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()
    ray_internals.read_token_again()


@contextmanager
def _report_slow_start(say: Say) -> Iterator[None]:
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
    """Kill Ray's processes and remove its folder, right before this process exits."""
    if _session is not None:
        _kill_processes_of(_session)
        shutil.rmtree(_session, ignore_errors=True)


atexit.register(abandon)
