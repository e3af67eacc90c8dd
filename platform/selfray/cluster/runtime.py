"""Every Ray setting in one place: how Ray is started, what it may use, and a quiet console."""

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

# Set before ray is imported anywhere: ray reads some of these at import.
ENVIRONMENT = {
    # Ray 2.60 turns token auth on for local clusters, but `ray job submit` then sends none unless
    # told to; a cluster's owner chooses by setting the variable, a laptop needs none.
    "RAY_AUTH_MODE": "disabled",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "120",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    # The controller polls its workers this often; every start, end and restart waits for a poll.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def set_environment() -> None:
    """Defaults for what the user has not set. Called before ray is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Resources:
    """What a cluster has in all, or has free, in Ray's units."""

    cpus: float
    gpus: float


@contextmanager
def session(address: str | None = None) -> Iterator[None]:
    """A Ray session: joined where one is given or already joined, else started and stopped here."""
    is_ours = start(address)
    try:
        yield
    finally:
        if is_ours:
            stop()


def _require_cluster(address: str) -> None:
    """ConnectionError where nothing answers: Ray itself tries a dead address for ten minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"no Ray cluster answers at {address} ({str(error).splitlines()[0]}); start one with "
        "`ray start --head`, or unset RAY_ADDRESS to run on this machine alone"
    )


class Starting:
    """A Ray session that starts in a thread while its owner imports torch and reads flags."""

    def __init__(self, address: str | None = None) -> None:
        self._error: BaseException | None = None
        self._is_ours = False
        self._started = threading.Event()
        self._stopped = threading.Event()
        thread = threading.Thread(target=self._run, args=(address,), name="ray-start", daemon=True)
        thread.start()

    def _run(self, address: str | None) -> None:
        try:
            self._is_ours = start(address)
        except BaseException as error:  # handed to whoever enters the session
            self._error = error
        self._started.set()
        # Linux kills Ray's processes when the thread that started them ends (PR_SET_PDEATHSIG), so
        # this one lives as long as they are needed.
        self._stopped.wait()

    @contextmanager
    def session(self) -> Iterator[None]:
        """Wait for Ray; stop it at the end if it was started here."""
        try:
            self._started.wait()
            if self._error is not None:
                raise self._error
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """Stop what was started here; may be called when nothing was."""
        self._started.wait()
        if self._is_ours:
            stop()
        self._is_ours = False
        self._stopped.set()


def start(address: str | None = None) -> bool:
    """Join the cluster at `address` or RAY_ADDRESS, or start a local Ray.

    True where a Ray was started that its caller has to stop; False where one was joined, or was
    running in this process already. ConnectionError says how to go on where nothing answers.
    """
    set_environment()
    import ray

    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if address:
        _require_cluster(address)
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError) as error:
            raise _no_cluster(address, error) from None
    else:
        # This machine is not taken away with notice: one process less to start in each run.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        ray.init(**options)
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return not address


def stop() -> None:
    """Stop the local Ray that start() started."""
    import ray

    ray.shutdown()


def cluster_resources() -> Resources:
    import ray

    total = ray.cluster_resources()
    return Resources(total.get("CPU", 0.0), total.get("GPU", 0.0))


class Console:
    """Where a person reads. Everything else that this process prints goes to a log file.

    Ray's C++ core, gRPC and libraries write to file descriptors 1 and 2 directly, past Python's
    logging; so the descriptors themselves are turned to the log, and the console keeps a private
    copy of standard output.
    """

    def __init__(self, stream: IO[str], log: Path | None) -> None:
        self._stream = stream
        self.log = log
        self.is_terminal = stream.isatty()
        self._live = False

    def say(self, text: str = "") -> None:
        """Print lines that stay."""
        self._clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def live(self, text: str) -> None:
        """Show a line that the next one replaces; nothing where nobody watches."""
        if self.is_terminal:
            width = os.get_terminal_size(self._stream.fileno()).columns or 80
            self._stream.write("\r\x1b[K" + text[: width - 1])
            self._stream.flush()
            self._live = True

    def _clear(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[K")
            self._live = False


@contextmanager
def quiet_console(log: Path) -> Iterator[Console]:
    """Turn this process's standard output and error, native ones included, into a log file.

    `SELFRAY_VERBOSE=1` leaves them where they are.
    """
    if os.environ.get("SELFRAY_VERBOSE", "0") not in ("", "0"):
        yield Console(sys.stdout, None)
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace") as stream:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            yield Console(stream, log)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
