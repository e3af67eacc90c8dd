"""A run's metrics, tags, files and pictures -> its spool, and from there to MLflow.

Training writes to the spool (runs/spool.py) and never waits for a tracking server; shipping.py
sends it in a background thread of the driver.
"""

import io
import json
import os
import posixpath
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
    """Ships one run's spool to one MLflow run, across restarts of the driver.

    A run folder that has an MLflow run already goes on with it. A tracking server that is down
    costs one line through `say` and nothing else.

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
        """What the run is, shown at the top of its page in MLflow; the last text counts."""
        self.set_tags({"mlflow.note.content": text})

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
            self.say(f"{source} could not be kept in {target} ({error}): training goes on")
            return
        self._writer.event("artifact", path=name)

    def log_picture(self, image: "Image", path: str) -> None:
        """Keep a picture as `path`, such as "attention/step_100.png", and send it.

        The suffix names the format. A failure to write is said, not raised.
        """
        data = io.BytesIO()
        image.save(data, format="JPEG" if path.lower().endswith((".jpg", ".jpeg")) else "PNG")
        data.seek(0)
        self._log(data, path)

    def log_json(self, value: Any, path: str) -> None:
        """Keep a JSON value as `path` and send it, as a picture."""
        self._log(io.BytesIO(json.dumps(value).encode()), path)

    def _log(self, data: io.BytesIO, path: str) -> None:
        try:
            self._keep(path, data)
        except OSError as error:
            self.say(f"{path} could not be kept ({error}): training goes on")
            return
        self._writer.event("artifact", path=path)

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None until the server has been reached."""
        return self._shipper.run_id

    def wait_for_run(self, seconds: float) -> str | None:
        """The MLflow run's id, waited for: a sweep's children need their parent's."""
        self._shipper.run_is_open.wait(seconds)
        return self.run_id

    @property
    def run_url(self) -> str | None:
        """The run's page on a tracking server; None for a database, or before the run exists."""
        if self.run_id is None or not self.uri.startswith(("http://", "https://")):
            return None
        return run_page(self._shipper.shown_uri, str(self._shipper.experiment_id), self.run_id)

    def describe(self) -> str:
        """One line for the console: what the run is called in MLflow and how to look at it."""
        where = f"experiment {self.experiment_name}, run {self.run_name}"
        database = database_file(self.uri)
        if database is None:
            return f"MLflow: {where}: {self.run_url or self._shipper.shown_uri}"
        if database == os.path.join(local_runs(), "mlflow.db"):
            return f"MLflow: {where}: look at it with `make ui`"
        return f"MLflow: {where}: look at it with `mlflow ui --backend-store-uri {self.uri}`"

    def finish(self, status: Status, seconds: float = 30.0) -> bool:
        """Send what is left and close the MLflow run, within `seconds`; whether all was sent.

        A server that has been away for longer gets one more attempt, no wait. What remains lies in
        the run folder, and the next Tracker on it goes on from there.
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
