"""Logs numbers and pictures to a run's MLflow run after the run has ended."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from selfray.cluster.mlflow_store import experiment_name, mlflow_tags, named_store
from selfray.cluster.tracking import Tracker
from selfray.console import Console
from selfray.metrics import evaluation
from selfray.runs.folder import RUN_RECORD, SHIPPED, SPOOL, is_training
from selfray.runs.spool import SpoolWriter
from selfray.storage import Location, read_object

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_NAMES = 15
"""Largest number of metrics named on the console."""


def log_to_run(
    run: Location,
    images_seen: int,
    values: Mapping[str, float],
    tags: Mapping[str, str],
    tracking: str | None,
    console: Console,
    pictures: "Mapping[str, Image] | None" = None,
) -> bool:
    """Log values, tags and pictures to the MLflow run recorded in a run's folder.

    The status of the MLflow run does not change. If the run is still training, its own driver sends
    the numbers; if MLflow does not answer, they wait in the run's folder. Returns whether they
    reached MLflow.
    """
    pictures = pictures or {}
    if not (run / RUN_RECORD).exists():
        console.say("not logged: no MLflow run belongs to this checkpoint")
        return False
    writer = SpoolWriter(run / SPOOL, f"probe-{time.time_ns()}")
    writer.metrics(images_seen, dict(values))
    writer.tags(dict(tags))
    writer.close()
    if is_training(run):
        console.say("the run is still training: it sends these numbers to MLflow with its own")
        return False
    record = read_object(run / RUN_RECORD)
    try:
        uri = named_store(record, tracking, run.parent)
        # If the run is missing, a Tracker would create a second one.
        mlflow_tags(uri, str(record.get("run_id") or ""))
    except (ValueError, OSError) as error:
        console.say(f"not logged, but kept in {run / SPOOL}: {error}")
        return False
    shipped = read_object(run / SHIPPED)
    tracker = Tracker(uri, experiment_name(), run.name, run, {}, {}, say=console.say)
    console.live("logging to MLflow")
    tracker.start()
    for path, picture in pictures.items():
        tracker.log_picture(picture, path)
    # Logging a number does not change the status of the run.
    if not tracker.finish(shipped.get("status") or "KILLED"):
        return False
    main = [name for name in values if evaluation(name) is not None] or list(values)
    shown = main[:MOST_NAMES]
    rest = len(values) - len(shown)
    console.say(f"logged as {', '.join(shown)}" + (f" and {rest} more" if rest else ""))
    console.say(tracker.describe())
    return True
