"""What MLflow and run.json record about a run beside metrics: settings, origin, description."""

import posixpath
from collections.abc import Mapping
from typing import TYPE_CHECKING

from selfray import config, recipes
from selfray.cluster.mlflow_store import DataSetInput, experiment_name, tracking_uri
from selfray.cluster.monitor import Monitor
from selfray.cluster.tracking import Tracker
from selfray.console import Console
from selfray.data.data_sets import DataSets
from selfray.data.plan import ReadPlan
from selfray.experiment import Experiment
from selfray.runs.environment import environment_tags
from selfray.storage import Location

if TYPE_CHECKING:
    from selfray.cluster.launch import PartOf


def tracker_of(
    experiment: Experiment,
    run: Location,
    plan: ReadPlan,
    data: DataSets,
    used: Mapping[str, str],
    tracking: str | None,
    part: "PartOf",
    console: Console,
) -> Tracker:
    params = {k: v for k, v in config.flatten(config.to_json(experiment)).items() if v is not None}
    return Tracker(
        tracking_uri(Location.of(experiment.output), tracking),
        experiment_name(),
        part.title or run.name,
        run,
        params | dict(part.params),
        {
            **environment_tags(),
            "method": experiment.method.name,
            "recipe": experiment.name,
            "augmentation.backend": _augmentation_backend(),
            "data.images": str(plan.rows),
            "run.folder": run.uri,
            "mlflow.note.content": description(experiment, plan),
            **used,
        },
        parent_run_id=part.parent_run_id,
        say=console.say,
        data_set=DataSetInput(
            posixpath.basename(experiment.data.path.rstrip("/")) or experiment.data.path,
            data.train.digest,
            experiment.data.path,
            {"images": plan.rows, "classes": len(data.train.label_names or ())},
        ),
    )


def description(experiment: Experiment, plan: ReadPlan, result: str = "") -> str:
    """One paragraph for the run's MLflow page: what is trained, on which images, and the result."""
    encoder = experiment.encoder
    text = (
        f"{experiment.method.name} pretrains {encoder.name} at {encoder.image_size} pixels on "
        f"{plan.rows:,} images of {experiment.data.path}: {experiment.epochs:,} epochs of batch "
        f"{experiment.batch_size:,} by the recipe {experiment.name}."
    )
    return f"{text} {result}".strip()


def outcome(monitor: Monitor) -> str:
    """The result of the probes, for the run's description."""
    if not monitor.probes:
        return ""
    last, first = monitor.probes[max(monitor.probes)], monitor.probes.get(0)
    before = f" (untrained: {first.described})" if first is not None and first != last else ""
    return f"Result: {last.described}{before}."


def given_by_user(experiment: Experiment) -> list[str]:
    """The dotted names of fields that a flag or file set to values other than the recipe's."""
    recipe = recipes.every().get(experiment.name)
    if recipe is None:
        return []
    theirs, ours = (config.flatten(config.to_json(one)) for one in (recipe, experiment))
    return sorted(
        name
        for name in ours
        if name not in ("name", "data.measured") and ours[name] != theirs.get(name)
    )


def chosen(experiment: Experiment) -> list[str] | None:
    """Like `given_by_user`; None if the experiment is not based on a recipe, so that all is
    chosen."""
    return given_by_user(experiment) if experiment.name in recipes.every() else None


def _augmentation_backend() -> str:
    from selfray.pixels.augment import BACKEND

    return BACKEND
