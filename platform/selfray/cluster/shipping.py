"""Sends a run's spool to its MLflow run, in a background thread.

After each success the offsets are saved in `<run folder>/shipped.json`. MLflow identifies a point
by name, value, step and time, so a metric that is sent twice is stored once. Therefore, after any
failure, everything from the last saved offset is simply sent again.

The thread imports MLflow, not this module, because that takes seconds.
"""

import os
import posixpath
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from selfray.check import require
from selfray.cluster.mlflow_store import (
    QUIET_AND_QUICK,
    DataSetInput,
    artifact_root,
    as_input,
    database_file,
    locked,
    quiet_logs,
    remove_stray_folder,
)
from selfray.masking import masked
from selfray.runs.folder import ARTIFACTS, RUN_RECORD, SHIPPED, SPOOL
from selfray.runs.spool import SpoolReader
from selfray.storage import Location, read_object

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Scalar = str | int | float
Status = Literal["FINISHED", "FAILED", "KILLED"]

_METRICS_PER_REQUEST = (50, 1000)
"""(fewest, most); 1000 is MLflow's limit."""
_NAMES_PER_REQUEST = 100
_READ_BYTES = 128 * 1024
"""About 2000 points; offsets are saved after each piece of this size."""
_LOCAL_POLL_SECONDS = 0.5
_REMOTE_POLL_SECONDS = 5.0
_KEY_TAG = "selfray.run_key"


@dataclass(eq=False, repr=False)
class Tracked:
    """A run's entry in MLflow: its store, names, parameters and tags."""

    uri: str
    """URI of the MLflow store."""
    experiment_name: str
    run_name: str
    run_folder: Location
    params: Mapping[str, Scalar]
    tags: Mapping[str, str]
    parent_run_id: str | None = None
    say: Callable[[str], None] = print
    """Called from the shipping thread."""
    retry_seconds: tuple[float, float] = (1.0, 30.0)
    """The first and the longest pause between attempts at a dead server."""
    data_set: DataSetInput | None = None

    def __post_init__(self) -> None:
        require(self.experiment_name != "", "experiment_name must not be empty")
        require(
            0 < self.retry_seconds[0] <= self.retry_seconds[1],
            f"retry_seconds must be 0 < first <= longest, got {self.retry_seconds}",
        )


class Shipper:
    """Sends the records of a run's spool, also those added later, until `finish` is called."""

    def __init__(self, tracked: Tracked) -> None:
        self.tracked = tracked
        self.shown_uri = masked(tracked.uri)
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self.run_is_open = threading.Event()
        self._params = {accepted(key): masked(str(value)) for key, value in tracked.params.items()}
        self._tags = {accepted(key): masked(str(value)) for key, value in tracked.tags.items()}
        self._thread = threading.Thread(
            target=self._ship_until_finished, name="mlflow", daemon=True
        )
        self._finish = threading.Event()
        self._status: Status = "FINISHED"
        self._finish_seconds = 0.0
        self._give_up_at = 0.0
        self._complete = False
        # The following attributes are used only by the thread.
        self._reader = SpoolReader(tracked.run_folder / SPOOL)
        self._client: MlflowClient | None = None
        self._shipped: dict[str, Any] = {}
        self._said: set[str] = set()
        self._artifacts_retry_at = 0.0
        self._metrics_per_request = _METRICS_PER_REQUEST[1]

    def start(self) -> None:
        for name, value in QUIET_AND_QUICK.items():
            os.environ.setdefault(name, value)
        self._thread.start()

    def finish(self, status: Status, seconds: float) -> bool:
        """Send the rest and close the MLflow run within `seconds`; returns whether all was sent."""
        self._status = status
        self._finish_seconds = seconds
        self._give_up_at = time.monotonic() + seconds
        self._finish.set()
        self._thread.join(seconds)
        return self._complete

    # The thread.

    def _ship_until_finished(self) -> None:
        poll_seconds = (
            _LOCAL_POLL_SECONDS if self.tracked.run_folder.is_local else _REMOTE_POLL_SECONDS
        )
        first_pause, longest_pause = self.tracked.retry_seconds
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
                    self.tracked.say(f"{self.shown_uri} is back: everything kept has been sent")
                    away_since, pause = None, first_pause
                if finishing:
                    self._close_run(self._client, self._status)
                    self._complete = not artifacts_left
                    return
            except Exception as error:
                # For any failure, in MLflow, its database, the network or the run folder: keep
                # everything, and try again with a new connection.
                self._client = None
                # A slow server that timed out on a large request may handle a smaller one.
                self._metrics_per_request = max(
                    _METRICS_PER_REQUEST[0], self._metrics_per_request // 2
                )
                now = time.monotonic()
                if away_since is None:
                    away_since = now
                    self.tracked.say(
                        f"tracking server {self.shown_uri} cannot be reached or used "
                        f"({self._cause(error)}): training continues, everything is kept in "
                        f"{self.tracked.run_folder / SPOOL} and is sent when it is back, or at the "
                        "next start of the command"
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

        quiet_logs()
        self.tracked.run_folder.make_folder()
        # Two processes that open a new SQLite file at once break each other's migrations.
        with locked(database_file(self.tracked.uri)):
            client = MlflowClient(tracking_uri=self.tracked.uri)
            client.get_experiment_by_name(self.tracked.experiment_name)
            remove_stray_folder(self.tracked.uri)

        self._shipped = read_object(self.tracked.run_folder / SHIPPED)
        if "key" not in self._shipped:
            self._save_shipped(key=uuid.uuid4().hex)
        run = self._recorded_run(client) or self._new_run(client)
        info = run.info
        if info.lifecycle_stage != "active":
            raise _DeletedRunError(
                f"run {info.run_id} was deleted in MLflow: restore it there, or remove "
                f"{self.tracked.run_folder / RUN_RECORD} to start a new one"
            )
        self.run_id, self.experiment_id = info.run_id, info.experiment_id
        (self.tracked.run_folder / RUN_RECORD).write_json(
            {
                "tracking_uri": self.shown_uri,
                "experiment_id": info.experiment_id,
                "run_id": info.run_id,
            }
        )
        if self._shipped.get("run_id") != info.run_id:
            # A new store, which has nothing yet.
            self._save_shipped(run_id=info.run_id, offsets={}, artifacts=[], status=None)
        elif self._shipped.get("status") is not None:
            self._save_shipped(status=None)
        if info.status != "RUNNING":
            client.update_run(info.run_id, status="RUNNING")
        self.run_is_open.set()

        known = run.data.params
        params = {key: _cut(value, MAX_PARAM_VAL_LENGTH) for key, value in self._params.items()}
        tags = dict(self._tags)
        # MLflow parameters cannot change, so different values of a restart become tags.
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
        if self.tracked.data_set is not None and not (run.inputs and run.inputs.dataset_inputs):
            client.log_inputs(info.run_id, [as_input(self.tracked.data_set)])
        return client

    def _recorded_run(self, client: "MlflowClient") -> "Run | None":
        from mlflow.exceptions import MlflowException

        run_id = read_object(self.tracked.run_folder / RUN_RECORD).get("run_id")
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
        # A slow server may have created the run although its answer was lost: look first.
        found = client.search_runs([experiment_id], f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
        if found:
            return found[0]
        tags = {_KEY_TAG: key}
        if self.tracked.parent_run_id is not None:
            tags["mlflow.parentRunId"] = self.tracked.parent_run_id
        return client.create_run(experiment_id, tags=tags, run_name=self.tracked.run_name)

    def _find_or_create_experiment(self, client: "MlflowClient") -> str:
        from mlflow.exceptions import MlflowException

        if self.tracked.parent_run_id is not None:
            return client.get_run(self.tracked.parent_run_id).info.experiment_id
        # Not mlflow.set_experiment: if another process creates it first, that picks "Default".
        experiment = client.get_experiment_by_name(self.tracked.experiment_name)
        if experiment is not None:
            return experiment.experiment_id
        try:
            return client.create_experiment(
                self.tracked.experiment_name,
                artifact_location=artifact_root(self.tracked.uri, self.tracked.run_folder.uri),
                # Without it, MLflow shows a language-model page where the runs are not visible.
                tags={"mlflow.experimentKind": "custom_model_development"},
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(self.tracked.experiment_name)
        assert experiment is not None
        return experiment.experiment_id

    def _ship_records(self, client: "MlflowClient") -> bool:
        """Send the next piece of the spool; returns whether there was one."""
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
                        Metric(accepted(key), float(value), at, step)
                        for key, value in record["values"].items()
                        if isinstance(value, int | float)
                    ]
                case {"kind": "tags", "values": dict(values)}:
                    tags |= {
                        accepted(key): _cut(masked(str(value)), MAX_TAG_VAL_LENGTH)
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
        """Send items in batches. An item that MLflow refuses is reported once and left out, so that
        it does not block the rest forever."""
        from mlflow.exceptions import MlflowException

        assert self.run_id is not None
        batch_size = self._metrics_per_request if what == "metrics" else _NAMES_PER_REQUEST
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            try:
                match what:
                    case "metrics":
                        client.log_batch(self.run_id, metrics=batch)
                    case "params":
                        client.log_batch(self.run_id, params=batch)
                    case "tags":
                        client.log_batch(self.run_id, tags=batch)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                if client.get_run(self.run_id).info.lifecycle_stage != "active":
                    raise _DeletedRunError(f"run {self.run_id} was deleted in MLflow") from None
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
        """Send waiting files; returns whether some are left.

        Separate from metrics, because an artifact store may be unreachable (no credentials, a path
        on the server's machine) while the tracking server works.
        """
        assert self.run_id is not None
        waiting = self._shipped["artifacts"]
        if not waiting or (time.monotonic() < self._artifacts_retry_at and not finishing):
            return bool(waiting)
        while waiting:
            try:
                self._send_artifact(client, waiting[0])
            except FileNotFoundError as error:
                self._say_once(waiting[0], f"{waiting[0]} was not sent to MLflow: {error}")
            except Exception as error:  # each artifact store's client raises its own
                client.get_run(self.run_id)  # raises if the tracking server itself is away
                self._say_once(
                    "artifacts",
                    f"{self.shown_uri} takes metrics but no files ({self._cause(error)}): they "
                    f"are kept in {self.tracked.run_folder / ARTIFACTS}",
                )
                self._artifacts_retry_at = time.monotonic() + self.tracked.retry_seconds[1]
                return True
            waiting = waiting[1:]
            self._save_shipped(artifacts=waiting)
        return False

    def _send_artifact(self, client: "MlflowClient", name: str) -> None:
        assert self.run_id is not None
        source = self.tracked.run_folder / ARTIFACTS / name
        folder = posixpath.dirname(name) or None
        if source.is_local:
            if not source.exists():
                raise FileNotFoundError(f"{source} does not exist")
            client.log_artifact(self.run_id, source.path, folder)
            return
        with tempfile.TemporaryDirectory() as local:
            copy = os.path.join(local, source.name)
            with (
                source.filesystem.open_input_stream(source.path) as stream,
                open(copy, "wb") as file,
            ):
                shutil.copyfileobj(stream, file)
            client.log_artifact(self.run_id, copy, folder)

    def _close_run(self, client: "MlflowClient", status: Status) -> None:
        assert self.run_id is not None
        client.set_terminated(self.run_id, status=status)
        self._save_shipped(status=status)

    def _save_shipped(self, **changes: Any) -> None:
        changed = {**self._shipped, **changes}
        (self.tracked.run_folder / SHIPPED).write_json(changed)
        self._shipped = changed

    def _say_once(self, subject: str, line: str) -> None:
        if subject not in self._said:
            self._said.add(subject)
            self.tracked.say(line)

    def _cause(self, error: Exception) -> str:
        """The part of an error that is useful for a user, in one line."""
        text = " ".join(str(error).split()) or type(error).__name__
        if caused_by := re.search(r"Caused by \w+\([\"']?(.*?)[\"']?\)\)?$", text):
            text = caused_by[1].rpartition("): ")[2]
        if "timed out" in text:
            text = f"no answer within {os.environ['MLFLOW_HTTP_REQUEST_TIMEOUT']} s"
        return _cut(masked(text), 300)


class _DeletedRunError(Exception):
    """Raised if a user deleted the MLflow run; the user must decide what to do."""


def accepted(name: str) -> str:
    """Turn a name into one that MLflow accepts: allowed characters, no .., at most 250 long."""
    clean = posixpath.normpath(re.sub(r"[^\w\-. /:]", "_", name))
    return clean.lstrip("./")[:250] or "_"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
