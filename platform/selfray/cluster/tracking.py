"""The spool of a run -> MLflow, in a background thread of the driver.

Training writes to the spool (selfray/spool.py) and never waits for a tracking server. What has
been sent is remembered in `<run folder>/shipped.json` after each success. A metric that is sent
twice is stored once, since MLflow identifies a point by its name, value, step and time; so after
any failure the answer is to send again from the last known offset.

MLflow is imported by the thread, never by importing this module: that takes seconds.
"""

import fcntl
import getpass
import importlib.metadata
import io
import json
import logging
import os
import platform
import posixpath
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from selfray.check import require
from selfray.runs.spool import SpoolReader, SpoolWriter
from selfray.storage import Location

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from PIL.Image import Image

Status = Literal["FINISHED", "FAILED", "KILLED"]
Scalar = str | int | float

RUN_FILE = "run.json"
"""What a run is and how it stands; launch.py writes it."""
LOCK = "lock"
"""Held by the command that writes into a run's folder, where that is local."""
SPOOL = "spool"
ARTIFACTS = "artifacts"
RUN_RECORD = "mlflow.json"
"""{"tracking_uri", "experiment_id", "run_id"}: which MLflow run this run folder belongs to."""
SHIPPED = "shipped.json"
"""{"key", "run_id", "offsets", "artifacts", "status"}: what of the spool MLflow has by now."""

_METRICS_PER_REQUEST = (50, 1000)
"""Fewest and most; 1000 is MLflow's limit."""
_NAMES_PER_REQUEST = 100
_READ_BYTES = 128 * 1024
"""About 2000 points; what is sent is recorded after each such piece."""
_LOCAL_POLL_SECONDS = 0.5
_REMOTE_POLL_SECONDS = 5.0
_KEY_TAG = "selfray.run_key"
_VERSIONS_OF = ("selfray", "torch", "torchvision", "timm", "ray", "mlflow", "pyarrow")

QUIET_AND_QUICK = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The shipper waits and tries again by itself; MLflow's own seven retries block for minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}


def tracking_uri(output: Location | str, explicit: str | None = None) -> str:
    """Where to track: `explicit`, else MLFLOW_TRACKING_URI, else a SQLite file in `output`.

    SQLite needs a local disk: for an output on an object store the file lies in ./runs instead.
    """
    uri = explicit or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        folder = Location.of(output)
        return f"sqlite:///{os.path.join(folder.path if folder.is_local else _runs(), 'mlflow.db')}"
    database = database_file(uri)
    # Absolute, because other processes with other working directories read the recorded URI.
    return uri if database is None else f"sqlite:///{os.path.abspath(database)}"


def everything_shipped(run_folder: Location) -> bool:
    """Whether MLflow has all that this run folder's spool holds, and the run's final status.

    Needs no MLflow and no server: a cheap question before deciding to start a Tracker. OSError
    where the folder cannot be read.
    """
    shipped = _read_json(run_folder / SHIPPED)
    records, _ = SpoolReader(run_folder / SPOOL).read(shipped.get("offsets", {}))
    return shipped.get("status") is not None and not records and not shipped.get("artifacts")


def is_training(run: Location) -> bool:
    """Whether a command is writing into the run's folder now; where that is no local one, whether
    its record says so, which is not taken back by a command that is killed."""
    if not run.is_local:
        return _read_json(run / RUN_FILE).get("status") == "running"
    try:
        with open(Path(run.path) / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


class Tracker:
    """Ships one run's spool to one MLflow run, across restarts of the driver.

    A run folder that has an MLflow run already goes on with it. A tracking server that is down
    costs one line through `say` and nothing else. `say` is called from the shipping thread.

        tracker = Tracker(uri, "scans", "mae-1", run_folder, params, environment_tags())
        tracker.start()     # returns at once; best after `import ray`, so that imports do not race
        ...
        tracker.finish("FINISHED")
    """

    def __init__(
        self,
        uri: str,
        experiment_name: str,
        run_name: str,
        run_folder: Location,
        params: Mapping[str, Scalar],
        tags: Mapping[str, str],
        parent_run_id: str | None = None,
        say: Callable[[str], None] = print,
        retry_seconds: tuple[float, float] = (1.0, 30.0),
    ) -> None:
        """`retry_seconds`: the first and the longest pause between attempts at a dead server."""
        require(experiment_name != "", "experiment_name must not be empty")
        require(
            0 < retry_seconds[0] <= retry_seconds[1],
            f"retry_seconds must be 0 < first <= longest, got {retry_seconds}",
        )
        self.uri = uri
        self.experiment_name = experiment_name
        self.run_name = run_name
        self.run_folder = run_folder
        self.parent_run_id = parent_run_id
        self._params = {_name(key): str(value) for key, value in params.items()}
        self._tags = {_name(key): str(value) for key, value in tags.items()}
        self._say = say
        self._retry_seconds = retry_seconds
        self._run_id: str | None = None
        self._experiment_id: str | None = None
        self._run_is_open = threading.Event()
        self._thread: threading.Thread | None = None
        self._finish = threading.Event()
        self._status: Status = "FINISHED"
        self._finish_seconds = 0.0
        self._give_up_at = 0.0
        self._complete = False
        # One writer for each start of the driver: a predecessor that is not quite dead yet must
        # not write to the same file.
        self._writer = SpoolWriter(
            run_folder / SPOOL, f"driver-{int(time.time() * 1000)}-{uuid.uuid4().hex[:6]}"
        )
        # Used by the shipping thread alone.
        self._reader = SpoolReader(run_folder / SPOOL)
        self._client: MlflowClient | None = None
        self._shipped: dict[str, Any] = {}
        self._said: set[str] = set()
        self._artifacts_retry_at = 0.0
        self._metrics_per_request = _METRICS_PER_REQUEST[1]

    # What the driver calls. Nothing here waits for the server, except wait_for_run and finish.

    def start(self) -> None:
        """Begin shipping in a daemon thread."""
        require(self._thread is None, "this Tracker was started before")
        for name, value in QUIET_AND_QUICK.items():
            os.environ.setdefault(name, value)
        self._thread = threading.Thread(
            target=self._ship_until_finished, name="mlflow", daemon=True
        )
        self._thread.start()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the MLflow run, as soon as the server is there."""
        self._writer.tags(tags)

    def log_artifact(self, local_path: str | os.PathLike[str], artifact_path: str = "") -> None:
        """Keep a local file in the run folder and send it to `artifact_path` (a folder).

        A copy that fails (a full disk) is said, not raised.
        """
        source = Path(local_path).absolute()
        name = posixpath.join(artifact_path, source.name)
        target = self.run_folder / ARTIFACTS / name
        try:
            if not (target.is_local and Path(target.path) == source):
                with source.open("rb") as file:
                    self._keep(name, file)
        except OSError as error:
            self._say(f"{source} could not be kept in {target} ({error}): training goes on")
            return
        self._writer.event("artifact", path=name)

    def log_picture(self, image: "Image", path: str) -> None:
        """Keep a picture as `path`, such as "attention/step_100.png", and send it.

        The suffix names the format. A failure to write is said, not raised.
        """
        data = io.BytesIO()
        image.save(data, format="JPEG" if path.lower().endswith((".jpg", ".jpeg")) else "PNG")
        data.seek(0)
        try:
            self._keep(path, data)
        except OSError as error:
            self._say(f"the picture {path} could not be kept ({error}): training goes on")
            return
        self._writer.event("artifact", path=path)

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None until the server has been reached."""
        return self._run_id

    def wait_for_run(self, seconds: float) -> str | None:
        """The MLflow run's id, waited for: a sweep's children need their parent's."""
        self._run_is_open.wait(seconds)
        return self._run_id

    @property
    def run_url(self) -> str | None:
        """The run's page on a tracking server; None for a database, or before the run exists."""
        if self._run_id is None or not self.uri.startswith(("http://", "https://")):
            return None
        page = f"#/experiments/{self._experiment_id}/runs/{self._run_id}"
        return f"{self._shown_uri.rstrip('/')}/{page}"

    def describe(self) -> str:
        """One line for the console: what the run is called in MLflow and how to look at it."""
        where = f"experiment {self.experiment_name}, run {self.run_name}"
        database = database_file(self.uri)
        if database is None:
            return f"MLflow: {where}: {self.run_url or self._shown_uri}"
        if database == os.path.join(_runs(), "mlflow.db"):
            return f"MLflow: {where}: look at it with `make ui`"
        return f"MLflow: {where}: look at it with `mlflow ui --backend-store-uri {self.uri}`"

    def finish(self, status: Status, seconds: float = 30.0) -> bool:
        """Send what is left and close the MLflow run, within `seconds`; whether all was sent.

        A server that has been away for longer gets one more attempt, no wait. What remains lies in
        the run folder, and the next Tracker on it goes on from there.
        """
        require(self._thread is not None, "a Tracker must be started before it can finish")
        self._writer.close()
        self._status = status
        self._finish_seconds = seconds
        self._give_up_at = time.monotonic() + seconds
        self._finish.set()
        if self._thread is not None:
            self._thread.join(seconds)
        if not self._complete:
            self._say(
                f"not everything was sent to {self._shown_uri}: the rest is kept in "
                f"{self.run_folder / SPOOL} and is sent at the next start of the command"
            )
        return self._complete

    def _keep(self, name: str, data: Any) -> None:
        target = self.run_folder / ARTIFACTS / name
        Location(target.filesystem, posixpath.dirname(target.path), "").make_folder()
        with target.filesystem.open_output_stream(target.path) as stream:
            shutil.copyfileobj(data, stream)

    # The shipping thread.

    def _ship_until_finished(self) -> None:
        poll_seconds = _LOCAL_POLL_SECONDS if self.run_folder.is_local else _REMOTE_POLL_SECONDS
        first_pause, longest_pause = self._retry_seconds
        pause = first_pause
        away_since: float | None = None
        while True:
            finishing = self._finish.is_set()
            try:
                if self._client is None:
                    self._client = self._open_run()
                if self._ship_records(self._client):
                    continue
                artifacts_left = self._ship_artifacts(self._client, finishing)
                self._metrics_per_request = _METRICS_PER_REQUEST[1]
                if away_since is not None:
                    self._say(f"{self._shown_uri} is back: all that was kept has been sent")
                    away_since, pause = None, first_pause
                if finishing:
                    self._close_run(self._client, self._status)
                    self._complete = not artifacts_left
                    return
            except Exception as error:
                # Whatever fails, in MLflow, its database, the network or the run folder, the answer
                # is the same: keep everything, and try again from a fresh connection.
                self._client = None
                # A slow server that timed out on a large request may manage a smaller one.
                self._metrics_per_request = max(
                    _METRICS_PER_REQUEST[0], self._metrics_per_request // 2
                )
                now = time.monotonic()
                if away_since is None:
                    away_since = now
                    self._say(
                        f"tracking server {self._shown_uri} cannot be reached or used "
                        f"({self._cause(error)}): training goes on, everything is kept in "
                        f"{self.run_folder / SPOOL} and is sent when it is back, or at the next "
                        "start of the command"
                    )
                if finishing:
                    if now >= self._give_up_at or now - away_since >= self._finish_seconds:
                        return
                    time.sleep(min(pause, 1.0))
                else:
                    self._finish.wait(pause)
                    pause = min(2 * pause, longest_pause)
            else:
                self._finish.wait(poll_seconds)

    def _open_run(self) -> "MlflowClient":
        """Connect, and find or create the experiment and the run; sends parameters and tags."""
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH

        _quiet_logs()
        self.run_folder.make_folder()
        # Two processes that meet in a fresh SQLite file break each other's migrations.
        with _locked(database_file(self.uri)):
            client = MlflowClient(tracking_uri=self.uri)
            client.get_experiment_by_name(self.experiment_name)

        self._shipped = _read_json(self.run_folder / SHIPPED)
        if "key" not in self._shipped:
            self._save_shipped(key=uuid.uuid4().hex)
        run = self._recorded_run(client) or self._new_run(client)
        info = run.info
        if info.lifecycle_stage != "active":
            raise _DeletedRunError(
                f"run {info.run_id} was deleted in MLflow: restore it there, or remove "
                f"{self.run_folder / RUN_RECORD} to begin another"
            )
        self._run_id, self._experiment_id = info.run_id, info.experiment_id
        (self.run_folder / RUN_RECORD).write_json(
            {
                "tracking_uri": self._shown_uri,
                "experiment_id": info.experiment_id,
                "run_id": info.run_id,
            }
        )
        if self._shipped.get("run_id") != info.run_id:
            # Another store than last time, or the first time: it has nothing yet.
            self._save_shipped(run_id=info.run_id, offsets={}, artifacts=[], status=None)
        elif self._shipped.get("status") is not None:
            self._save_shipped(status=None)
        if info.status != "RUNNING":
            client.update_run(info.run_id, status="RUNNING")
        self._run_is_open.set()

        known = run.data.params
        params = {key: _cut(value, MAX_PARAM_VAL_LENGTH) for key, value in self._params.items()}
        tags = dict(self._tags)
        # MLflow never lets a parameter change, so what a restart was given instead is a tag.
        tags |= {
            f"resumed_with.{key}": value
            for key, value in params.items()
            if known.get(key, value) != value
        }
        self._send(
            client,
            "params",
            [Param(key, value) for key, value in params.items() if key not in known],
        )
        self._send(
            client,
            "tags",
            [RunTag(key, _cut(value, MAX_TAG_VAL_LENGTH)) for key, value in tags.items()],
        )
        return client

    def _recorded_run(self, client: "MlflowClient") -> "Run | None":
        from mlflow.exceptions import MlflowException

        run_id = _read_json(self.run_folder / RUN_RECORD).get("run_id")
        if run_id is None:
            return None
        try:
            return client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _new_run(self, client: "MlflowClient") -> "Run":
        experiment_id = self._find_or_create_experiment(client)
        key = self._shipped["key"]
        # A slow server may have created the run and its answer been lost: look before creating.
        found = client.search_runs([experiment_id], f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
        if found:
            return found[0]
        tags = {_KEY_TAG: key}
        if self.parent_run_id is not None:
            tags["mlflow.parentRunId"] = self.parent_run_id
        return client.create_run(experiment_id, tags=tags, run_name=self.run_name)

    def _find_or_create_experiment(self, client: "MlflowClient") -> str:
        from mlflow.exceptions import MlflowException

        # Not mlflow.set_experiment: losing the race to create, it leaves the run in "Default".
        experiment = client.get_experiment_by_name(self.experiment_name)
        if experiment is not None:
            return experiment.experiment_id
        try:
            return client.create_experiment(
                self.experiment_name, artifact_location=self._artifact_root()
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(self.experiment_name)
        assert experiment is not None
        return experiment.experiment_id

    def _artifact_root(self) -> str | None:
        """Where MLflow keeps files: a server decides by itself; a database would take ./mlruns."""
        if self.uri.startswith(("sqlite:", "postgresql", "mysql", "mssql")):
            database = database_file(self.uri)
            output = (
                posixpath.dirname(self.run_folder.uri)
                if database is None
                else (os.path.dirname(database))
            )
            return posixpath.join(output, "mlartifacts")
        return None

    def _ship_records(self, client: "MlflowClient") -> bool:
        """Send the next piece of the spool; whether there was one."""
        from mlflow.entities import Metric, RunTag
        from mlflow.utils.validation import MAX_TAG_VAL_LENGTH

        offsets = self._shipped["offsets"]
        records, reached = self._reader.read(offsets, _READ_BYTES)
        if reached == offsets:
            return False
        metrics, tags, artifacts = [], {}, list(self._shipped["artifacts"])
        for record in records:
            match record:
                case {
                    "kind": "metrics",
                    "time": int(at),
                    "images_seen": int(step),
                    "values": dict(),
                }:
                    metrics += [
                        Metric(_name(key), float(value), at, step)
                        for key, value in record["values"].items()
                        if isinstance(value, int | float)
                    ]
                case {"kind": "tags", "values": dict(values)}:
                    tags |= {
                        _name(key): _cut(str(value), MAX_TAG_VAL_LENGTH)
                        for key, value in values.items()
                    }
                case {"kind": "artifact", "path": str(path)} if path not in artifacts:
                    artifacts.append(path)
        self._send(client, "metrics", metrics)
        self._send(client, "tags", [RunTag(key, value) for key, value in tags.items()])
        self._save_shipped(offsets=reached, artifacts=artifacts)
        return True

    def _send(
        self,
        client: "MlflowClient",
        what: Literal["metrics", "params", "tags"],
        items: Sequence[Any],
    ) -> None:
        """Send in batches. An item that MLflow refuses is said once and left out: it must not
        hold up the rest for ever."""
        from mlflow.exceptions import MlflowException

        assert self._run_id is not None
        batch_size = self._metrics_per_request if what == "metrics" else _NAMES_PER_REQUEST
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            try:
                match what:
                    case "metrics":
                        client.log_batch(self._run_id, metrics=batch)
                    case "params":
                        client.log_batch(self._run_id, params=batch)
                    case "tags":
                        client.log_batch(self._run_id, tags=batch)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                if client.get_run(self._run_id).info.lifecycle_stage != "active":
                    raise _DeletedRunError(f"run {self._run_id} was deleted in MLflow") from None
                if len(batch) > 1:
                    middle = len(batch) // 2
                    self._send(client, what, batch[:middle])
                    self._send(client, what, batch[middle:])
                else:
                    self._say_once(
                        f"{what} {batch[0].key}",
                        f"MLflow refuses {what} {batch[0].key!r}: {self._cause(error)}",
                    )

    def _ship_artifacts(self, client: "MlflowClient", finishing: bool) -> bool:
        """Send files that wait; whether some had to stay.

        Apart from metrics, because an artifact store may be out of reach (no credentials, a path
        of the server's machine) while the tracking server is well.
        """
        assert self._run_id is not None
        waiting = self._shipped["artifacts"]
        if not waiting or (time.monotonic() < self._artifacts_retry_at and not finishing):
            return bool(waiting)
        while waiting:
            try:
                self._send_artifact(client, waiting[0])
            except FileNotFoundError as error:
                self._say_once(waiting[0], f"{waiting[0]} was not sent to MLflow: {error}")
            except Exception as error:  # each artifact store's client raises its own
                client.get_run(self._run_id)  # raises where it is the server that is away
                self._say_once(
                    "artifacts",
                    f"{self._shown_uri} takes metrics but no files ({self._cause(error)}): they "
                    f"are kept in {self.run_folder / ARTIFACTS}",
                )
                self._artifacts_retry_at = time.monotonic() + self._retry_seconds[1]
                return True
            waiting = waiting[1:]
            self._save_shipped(artifacts=waiting)
        return False

    def _send_artifact(self, client: "MlflowClient", name: str) -> None:
        assert self._run_id is not None
        source = self.run_folder / ARTIFACTS / name
        folder = posixpath.dirname(name) or None
        if source.is_local:
            if not source.exists():
                raise FileNotFoundError(f"{source} does not exist")
            client.log_artifact(self._run_id, source.path, folder)
            return
        with tempfile.TemporaryDirectory() as local:
            copy = os.path.join(local, source.name)
            with (
                source.filesystem.open_input_stream(source.path) as stream,
                open(copy, "wb") as file,
            ):
                shutil.copyfileobj(stream, file)
            client.log_artifact(self._run_id, copy, folder)

    def _close_run(self, client: "MlflowClient", status: Status) -> None:
        assert self._run_id is not None
        client.set_terminated(self._run_id, status=status)
        self._save_shipped(status=status)

    def _save_shipped(self, **changes: Any) -> None:
        changed = {**self._shipped, **changes}
        (self.run_folder / SHIPPED).write_json(changed)
        self._shipped = changed

    @property
    def _shown_uri(self) -> str:
        return without_password(self.uri)

    def _say_once(self, subject: str, line: str) -> None:
        if subject not in self._said:
            self._said.add(subject)
            self._say(line)

    def _cause(self, error: Exception) -> str:
        """The part of an error that tells a user something, on one line."""
        text = " ".join(str(error).split()) or type(error).__name__
        if caused_by := re.search(r"Caused by \w+\([\"']?(.*?)[\"']?\)\)?$", text):
            text = caused_by[1].rpartition("): ")[2]
        if "timed out" in text:
            text = f"no answer within {os.environ['MLFLOW_HTTP_REQUEST_TIMEOUT']} s"
        return _cut(text.replace(self.uri, self._shown_uri), 300)


class _DeletedRunError(Exception):
    """The MLflow run was deleted by its user, who decides what happens next."""


def flatten(value: Any, prefix: str = "") -> dict[str, Scalar]:
    """Nested dicts as dotted names: {"method": {"momentum": 0.9}} -> {"method.momentum": 0.9}.

    A list that holds dicts is numbered (`views.0.size`), any other list becomes JSON text.
    """
    if isinstance(value, Mapping) and value:
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        items = [(str(index), item) for index, item in enumerate(value)]
    elif isinstance(value, Mapping | list | tuple):
        return {prefix: json.dumps(value, default=str)}
    else:
        return {prefix: value if isinstance(value, str | int | float) else str(value)}
    flat: dict[str, Scalar] = {}
    for key, item in items:
        flat |= flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat


def environment_tags() -> dict[str, str]:
    """What code, packages and machine a run had, as tags; what is unknown is left out."""
    tags = {
        "version.python": platform.python_version(),
        "machine.hostname": socket.gethostname(),
        "machine.processor": platform.processor() or platform.machine(),
        "machine.cpus": str(os.cpu_count()),
        "mlflow.source.name": os.path.relpath(sys.argv[0]) if sys.argv[0] else "python",
        "mlflow.source.type": "LOCAL",
    }
    with suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    tags["machine.memory_gib"] = f"{memory_bytes / 2**30:.1f}"
    commit = _output_of("git", "rev-parse", "HEAD")
    if commit:
        changes = _output_of("git", "status", "--porcelain", "--untracked-files=no")
        tags["selfray.git_commit"] = commit + ("+dirty" if changes else "")
        tags["mlflow.source.git.commit"] = commit
    gpus = _output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if gpus:
        names = gpus.splitlines()
        tags["machine.gpu"] = names[0].strip()
        tags["machine.gpus"] = str(len(names))
    for package in _VERSIONS_OF:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # selfray run from its folder, or a library that this machine does without
    return tags


def _output_of(*command: str) -> str:
    """What a command prints, "" where it is absent, fails or takes longer than 5 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _quiet_logs() -> None:
    """MLflow may have been imported before the environment asked it to be quiet."""
    if os.environ["MLFLOW_LOGGING_LEVEL"] == QUIET_AND_QUICK["MLFLOW_LOGGING_LEVEL"]:
        for name in ("mlflow", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _locked(database: str | None) -> Iterator[None]:
    """One process at a time, for a SQLite file; anything else guards itself."""
    if database is None:
        yield
        return
    Path(database).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def database_file(uri: str) -> str | None:
    """The file of a sqlite URI, None for any other."""
    match = re.fullmatch(r"sqlite:///([^?]+?)(\?.*)?", uri)
    return None if match is None or match[1] == ":memory:" else match[1]


def _runs() -> str:
    return os.path.abspath("runs")


def without_password(uri: str) -> str:
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)


def _name(name: str) -> str:
    """A name that MLflow accepts: its letters, no path tricks, at most 250 characters."""
    clean = posixpath.normpath(re.sub(r"[^\w\-. /:]", "_", name))
    return clean.lstrip("./")[:250] or "_"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _read_json(location: Location) -> dict[str, Any]:
    """The dict in a file, {} where there is none or it is damaged."""
    if not location.exists():
        return {}
    try:
        value = location.read_json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
