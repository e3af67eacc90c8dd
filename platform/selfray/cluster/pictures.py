"""The pictures of a run, drawn by a Ray task: in the process that probed it, which has torch, timm
and the encoder's libraries already, so that the driver loads none of them."""

import logging
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from selfray import config
from selfray.cluster.endings import root_cause
from selfray.cluster.placement import PROBE_CPUS
from selfray.cluster.tracking import Tracker
from selfray.console import Console
from selfray.data.data_sets import DataSets
from selfray.data.plan import ReadPlan
from selfray.data.source import Sample, Source
from selfray.experiment import Experiment
from selfray.report import live_map
from selfray.runs import checkpoint
from selfray.runs.checkpoint import Checkpoint
from selfray.runs.folder import ARTIFACTS
from selfray.runs.history import History
from selfray.storage import Location, last_line

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


def log_pictures(
    experiment: Experiment,
    run: Location,
    data: DataSets,
    plan: ReadPlan,
    history: History,
    tracker: Tracker,
    console: Console,
) -> None:
    """Draw the run's pictures and log them. A failure is reported and does not fail the run."""
    newest = checkpoint.latest(run)
    assert newest is not None
    console.live("drawing pictures")
    try:
        samples = data.samples(experiment.encoder.image_size, 5_000, 1_000)
        source = Source(data.train, plan, experiment.views, channels=data.channels)
        names = data.train.label_names
        # A sweep's trial runs in a placement group with almost no CPU: do not run this task in it.
        anywhere = PlacementGroupSchedulingStrategy(placement_group=None)  # type: ignore[arg-type]
        task: Any = ray.remote(num_cpus=PROBE_CPUS, scheduling_strategy=anywhere)(draw)
        text = config.dumps(experiment)
        drawn = task.remote(text, newest.location.uri, source, samples, names, history)
        made: dict[str, Image | dict[str, Any]] = ray.get(drawn)
    except Exception as error:
        log.exception("the pictures failed")
        cause = last_line(root_cause(error))
        console.say(f"the pictures could not be made ({cause}): the run itself is not affected")
        return
    for name, picture in made.items():
        if isinstance(picture, dict):
            tracker.log_json(picture, f"pictures/{name}")
        else:
            tracker.log_picture(picture, f"pictures/{name}")
    seen = [name for name in made if name not in (live_map.POINTS, live_map.THUMBNAILS)]
    console.say(f"pictures: {run / ARTIFACTS / 'pictures'}: {', '.join(seen)}")


def draw(
    experiment: str,
    newest: str,
    source: Source,
    samples: tuple[Sample, Sample],
    label_names: tuple[str, ...] | None,
    history: History,
) -> "dict[str, Image | dict[str, Any]]":
    """The pictures of a run by file name, as `run_pictures` gives them, and its curves."""
    from selfray.report import run_pictures  # matplotlib takes a second

    settings: Experiment = config.loads(experiment)
    found = Checkpoint.open(newest)
    made = run_pictures.run_pictures(settings, found, source, *samples, label_names)
    made["curves.png"] = run_pictures.curves({run_pictures.title_of(settings): history})
    return made
