"""Tracks a run: its metrics, tags, files and pictures go to its spool, and from there to MLflow.

Training writes to the spool (runs/spool.py) and never waits for a tracking server; shipping.py
sends it in a background thread of the driver.
"""

import io
import json
import os
import posixpath
import shlex
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfray.check import require
from selfray.cluster.mlflow_store import database_file, local_runs
from selfray.cluster.shipping import Shipper, Status, Tracked
from selfray.runs.folder import ARTIFACTS, SPOOL
from selfray.runs.ranking import run_page
from selfray.runs.spool import SpoolWriter
from selfray.storage import Location

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(eq=False, repr=False)
class Tracker(Tracked):
    """Sends one run's spool to one MLflow run, across restarts of the driver.

    If the run folder already has an MLflow run, it is continued. If the tracking server is down,
    `say` gets one line, and nothing else happens.

        tracker = Tracker(uri, "scans", "mae-1", run_folder, params, environment_tags())
        tracker.start()     # returns at once; best after `import ray`, so that imports do not race
        ...
        tracker.finish("FINISHED")
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._shipper = Shipper(self)
        self._is_started = False
        # One writer for each start of the driver: a predecessor that is not quite dead yet must
        # not write to the same file.
        self._writer = SpoolWriter(
            self.run_folder / SPOOL, f"driver-{int(time.time() * 1000)}-{uuid.uuid4().hex[:6]}"
        )

    # What the driver calls. Nothing here waits for the server, except wait_for_run and finish.

    def start(self) -> None:
        """Begin shipping in a daemon thread."""
        require(not self._is_started, "this Tracker was started before")
        self._is_started = True
        self._shipper.start()

    def describe_run(self, text: str) -> None:
        """Set the description at the top of the run's page in MLflow; the last text counts."""
        self.set_tags({"mlflow.note.content": text})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the MLflow run, as soon as the server answers."""
        self._writer.tags(tags)

    def log_artifact(self, local_path: str | os.PathLike[str], artifact_path: str = "") -> None:
        """Copy a local file into the run folder and send it to `artifact_path` (a folder).

        A failed copy (a full disk) is reported, not raised.
        """
        source = Path(local_path).absolute()
        name = posixpath.join(artifact_path, source.name)
        target = self.run_folder / ARTIFACTS / name
        try:
            if not (target.is_local and Path(target.path) == source):
                with source.open("rb") as file:
                    self._keep(name, file)
        except OSError as error:
            self.say(f"{source} could not be copied to {target} ({error}): training continues")
            return
        self._writer.event("artifact", path=name)

    def log_picture(self, image: "Image", path: str) -> None:
        """Store a picture as `path`, such as "attention/step_100.png", and send it.

        The suffix determines the format. A failure to write is reported, not raised.
        """
        data = io.BytesIO()
        image.save(data, format="JPEG" if path.lower().endswith((".jpg", ".jpeg")) else "PNG")
        data.seek(0)
        self._log(data, path)

    def log_json(self, value: Any, path: str) -> None:
        """Store a JSON value as `path` and send it, like a picture."""
        self._log(io.BytesIO(json.dumps(value).encode()), path)

    def _log(self, data: io.BytesIO, path: str) -> None:
        try:
            self._keep(path, data)
        except OSError as error:
            self.say(f"{path} could not be stored ({error}): training continues")
            return
        self._writer.event("artifact", path=path)

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None until the server has been reached."""
        return self._shipper.run_id

    def wait_for_run(self, seconds: float) -> str | None:
        """Wait for the MLflow run's id, which the children of a sweep need; None after
        `seconds`."""
        self._shipper.run_is_open.wait(seconds)
        return self.run_id

    @property
    def run_url(self) -> str | None:
        """The run's page on a tracking server; None for a database, or before the run exists."""
        if self.run_id is None or not self.uri.startswith(("http://", "https://")):
            return None
        return run_page(self._shipper.shown_uri, str(self._shipper.experiment_id), self.run_id)

    def describe(self) -> str:
        """One line for the console: the run's name in MLflow and how to open it."""
        where = f"experiment {self.experiment_name}, run {self.run_name}"
        database = database_file(self.uri)
        if database is None:
            return f"MLflow: {where}: {self.run_url or self._shipper.shown_uri}"
        if database == os.path.join(local_runs(), "mlflow.db"):
            return f"MLflow: {where}: look at it with `make ui`"
        command = f"mlflow ui --backend-store-uri {shlex.quote(self.uri)}"
        return f"MLflow: {where}: look at it with `{command}`"

    def finish(self, status: Status, seconds: float = 30.0) -> bool:
        """Send the rest and close the MLflow run within `seconds`; returns whether all was sent.

        A server that has been away for longer gets only one more attempt. The rest stays in the run
        folder, and the next Tracker for it continues from there.
        """
        require(self._is_started, "a Tracker must be started before it can finish")
        self._writer.close()
        complete = self._shipper.finish(status, seconds)
        if not complete:
            self.say(
                f"not everything was sent to {self._shipper.shown_uri}: the rest is kept in "
                f"{self.run_folder / SPOOL} and is sent at the next start of the command"
            )
        return complete

    def _keep(self, name: str, data: Any) -> None:
        target = self.run_folder / ARTIFACTS / name
        Location(target.filesystem, posixpath.dirname(target.path), "").make_folder()
        with target.filesystem.open_output_stream(target.path) as stream:
            shutil.copyfileobj(data, stream)
