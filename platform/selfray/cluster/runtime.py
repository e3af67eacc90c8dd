"""All Ray settings in one place: starting or joining Ray, its resources, and a quiet console."""

import logging
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from selfray import plugins, signals
from selfray.check import named_amounts

NO_TELEMETRY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Libraries report to their makers otherwise; what selfray starts inherits it."""

# Set before ray is imported anywhere: ray reads some of these at import.
ENVIRONMENT = {
    **NO_TELEMETRY,
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "120",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_COLOR_PREFIX": "0",
    # The controller polls its workers this often; every start, end and restart waits for a poll.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Tune's own handler would take Ctrl-C for the end of the sweep and report it as done.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

CONSIDER_SECONDS = 10.0
"""Seconds between checks of a healthy elastic run whether the cluster has room for more workers."""


def set_environment() -> None:
    """Set defaults for variables that the user has not set. Call it before ray is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def lasting(output: str) -> str:
    """The real output folder: in a Ray job a relative path is put under ~/selfray.

    A job runs in a copy of the checkout, which Ray later removes and which gets another name after
    every edit. A run there would be lost, and the same command would not find it.
    """
    if "://" in output or os.path.isabs(os.path.expanduser(output)) or not _is_uploaded_job():
        return output
    return os.path.join(os.path.expanduser("~"), "selfray", output)


def _is_uploaded_job() -> bool:
    """Whether this process is the driver of a `ray job submit` with a working folder."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "working_dir_files" in os.getcwd()


@dataclass(frozen=True)
class Resources:
    """All resources that a cluster has or can get, in Ray's units."""

    cpus: float
    gpus: float
    others: Mapping[str, float] = field(default_factory=dict)
    """Custom resources by name."""
    largest_node_cpus: float = float("inf")
    grows: bool = False
    """Whether an autoscaler adds nodes on demand, which costs money."""
    is_unknown: bool = False
    """Whether there are no CPUs now and the limits of the autoscaler are unknown."""

    def holds(self, gpus_per_worker: float) -> int:
        """The number of train workers that fit."""
        return int(self.gpus / gpus_per_worker if gpus_per_worker else self.cpus)


@contextmanager
def session(address: str | None = None) -> Iterator[None]:
    """A Ray session: one that is given or already joined, else one that is started and stopped
    here."""
    is_ours = start(address)
    try:
        yield
    finally:
        if is_ours:
            stop()


def _require_cluster(address: str) -> None:
    """Raise ConnectionError if nothing answers; Ray itself would try a dead address for ten
    minutes."""
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
        self._said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._started = threading.Event()
        thread = threading.Thread(target=self._run, args=(address,), name="ray-start", daemon=True)
        thread.start()

    def _run(self, address: str | None) -> None:
        try:
            self._is_ours = start(address, self._said.put)
        except BaseException as error:  # raised by `session`
            self._error = error
        self._started.set()
        self._said.put(None)
        # Linux kills Ray's processes when the thread that started them ends (PR_SET_PDEATHSIG), so
        # this one lives as long as they are needed.
        self._stopped.wait()

    @contextmanager
    def session(self, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
        """Wait for Ray and report by `say` if it is slow; stop it at the end if it was started
        here.
        """
        try:
            while (line := self._said.get()) is not None:
                say(line)
            self._said.put(None)  # so that another call of `session` does not wait
            signals.catch()
            if self._error is not None:
                raise self._error
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """Stop Ray if it was started here; otherwise do nothing."""
        if signals.were_received():  # this process ends now, and Ray's processes with it
            return
        self._started.wait()
        if self._is_ours:
            stop()
        self._is_ours = False
        self._stopped.set()


def start(address: str | None = None, say: Callable[[str], None] = lambda _: None) -> bool:
    """Join the cluster at `address`, at RAY_ADDRESS or on this machine, or start a local Ray.

    Returns True if a Ray was started, which the caller must stop; False if one was joined or was
    already running in this process. Raises ConnectionError, with the way out, if a named cluster
    does not answer. `say` reports a slow start.
    """
    set_environment()
    import ray

    from selfray.cluster import local_ray, ray_internals

    if ray.is_initialized():
        return False
    named = address or os.environ.get("RAY_ADDRESS") or None  # an empty one names none
    address = named or ray_internals.current_cluster()
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if plugins.named():
        # Workers read configs too, and allow only the plugins that the user named.
        options["runtime_env"] = {"env_vars": {plugins.VARIABLE: ",".join(plugins.named())}}
    joined = address is not None and _join(address, options, named is not None, say)
    if not joined:
        local_ray.start(options, say)
    # Ray's core has its own handler of SIGTERM, which would abort a command.
    if signals.are_caught():
        signals.catch()
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return not joined


def _join(
    address: str, options: dict[str, Any], is_named: bool, say: Callable[[str], None]
) -> bool:
    """Join a cluster with its owner's settings. Returns False if an unnamed cluster does not
    answer."""
    import ray

    from selfray.cluster import ray_internals

    try:
        _require_cluster(address)
        ray_internals.use_stored_token()
        with ray_internals.on_loopback_where_alone(address):
            joined = ray.init(address=address, **options)
    except (ConnectionError, RuntimeError) as error:
        if not is_named:
            return False
        if isinstance(error, ConnectionError) and str(error).startswith("no Ray cluster answers"):
            raise
        raise _no_cluster(address, error) from None
    if joined.dashboard_url:
        say(f"on the Ray cluster with the dashboard http://{joined.dashboard_url}")
    return True


def stop() -> None:
    """Stop the local Ray that start() started."""
    from selfray.cluster import local_ray

    local_ray.stop()


def node_addresses() -> list[str]:
    """The addresses of the cluster's nodes that are alive."""
    import ray

    return [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]


def cluster_resources() -> Resources:
    """The resources that the cluster has or, with an autoscaler, can get.

    Ray itself counts only current nodes. The limits come from the user in SELFRAY_CLUSTER
    (CPU=64,GPU=8), from Ray's control service if the autoscaler reports them, or from the settings
    file of an autoscaler on this machine: jobs run beside it, on the head node.
    """
    import ray

    from selfray.cluster.ray_internals import cluster_state

    total: dict[str, float] = dict(ray.cluster_resources())
    limits = named_amounts("SELFRAY_CLUSTER", os.environ.get("SELFRAY_CLUSTER", ""))
    limits = limits or cluster_state.get_max_resources_from_cluster_config() or {}
    if not limits and (file := _autoscaling_file(ray.get_runtime_context().gcs_address)):
        limits = largest_cluster(yaml.safe_load(file.read_text()))
    for name, amount in limits.items():
        total[name] = max(total.get(name, 0.0), float(amount))
    own = {"CPU", "GPU", "memory", "object_store_memory"}
    now = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return Resources(
        total.get("CPU", 0.0),
        total.get("GPU", 0.0),
        {name: amount for name, amount in total.items() if name not in own},
        largest_node_cpus=float("inf") if limits else max(now, default=0.0),
        grows=bool(limits),
        is_unknown=not total.get("CPU") and not limits,
    )


def largest_cluster(settings: Mapping[str, Any]) -> dict[str, float]:
    """The resources of a cluster with all nodes that its autoscaler's settings allow."""
    most = settings.get("max_workers", 0)
    found: dict[str, float] = {}
    for name, kind in settings.get("available_node_types", {}).items():
        is_head = name == settings.get("head_node_type")
        nodes = 1 if is_head else min(most, kind.get("max_workers", most))
        for resource, amount in kind.get("resources", {}).items():
            found[resource] = found.get(resource, 0.0) + nodes * amount
    return found


def _autoscaling_file(gcs_address: str) -> Path | None:
    """The settings file of the autoscaler of the cluster at this address; None if it runs on
    another machine or there is none."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        flags = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if flags.get("--gcs-address") == gcs_address and "--autoscaling-config" in flags:
            return Path(flags["--autoscaling-config"]).expanduser()
    return None
