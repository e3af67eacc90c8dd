"""Trains a run on Ray Train workers, and starts them again where Ray Train would not."""

import logging
import os
import time
from dataclasses import replace
from functools import partial
from typing import Any

from selfray.cluster import local_ray, runtime, waiting
from selfray.cluster.endings import (
    FAILURE,
    KilledForMemory,
    RunFailed,
    failure_of,
    recorded_failure,
)
from selfray.cluster.placement import Placement
from selfray.cluster.stream import keep_statistics_here
from selfray.cluster.task import WorkerTask
from selfray.cluster.worker import train_worker
from selfray.console import Console
from selfray.experiment import Experiment
from selfray.storage import Location

log = logging.getLogger(__name__)

RETRY_SECONDS = 10.0
"""Before starting again after workers were killed for memory: another program may end meanwhile."""


def fit(
    experiment: Experiment,
    run: Location,
    placement: Placement,
    task: WorkerTask,
    console: Console,
) -> None:
    """Train on Ray Train workers. Raises RunFailed with the cause if retrying is useless.

    Ray Train itself retries workers that are lost while they train; here those are retried that its
    memory monitor killed while they started.
    """
    for retries_left in range(experiment.max_failures, -1, -1):
        try:
            _attempt(experiment, run, placement, task, console)
            return
        except KilledForMemory as error:
            if not error.at_start or not retries_left:
                raise
            console.say(f"{error.short}: trying again (--max-failures {experiment.max_failures})")
            time.sleep(RETRY_SECONDS)


def _attempt(
    experiment: Experiment,
    run: Location,
    placement: Placement,
    task: WorkerTask,
    console: Console,
) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.v2.api.config import LoggingConfig

    from selfray.cluster.trainer import Trainer

    if not local_ray.is_running():
        keep_statistics_here()
    resources = placement.resources(experiment)
    launch_id = f"{time.time_ns()}"
    workers: Any = experiment.max_workers
    kind: Any = Trainer
    if experiment.is_elastic:
        from selfray.cluster import elastic

        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", elastic.START_SECONDS)
        workers = (experiment.min_workers, experiment.max_workers)
        kind = partial(elastic.ElasticTrainer, sizes=experiment.world_sizes, run=run.uri)
    trainer = kind(
        train_worker,
        train_loop_config={"task": replace(task, launch=launch_id)},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=placement.gpus_per_worker > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=runtime.CONSIDER_SECONDS,
        ),
        run_config=RunConfig(
            # A new name for each start: selfray resumes from its own checkpoints, which survive
            # a full disk and a crash between two polls of Ray's controller.
            name=f"{run.name}-{launch_id}",
            storage_path=ray_storage(run),
            failure_config=FailureConfig(max_failures=experiment.max_failures),
            logging_config=LoggingConfig("ERROR"),
        ),
    )
    console.live("starting the train workers, which load torch")
    try:
        with waiting.reporting(resources, experiment.min_workers, console):
            trainer.fit()
    except TrainingFailedError as error:
        log.exception("training failed")
        # The worker that failed first recorded its cause; others may only report a lost peer.
        recorded = recorded_failure(run / FAILURE, launch_id)
        raise (RunFailed(recorded) if recorded else failure_of(error)) from error
    failure = recorded_failure(run / FAILURE, launch_id)
    if failure is not None:
        raise RunFailed(failure)


def ray_storage(run: Location) -> str:
    """The folder for Ray Train's own bookkeeping, beside the checkpoints."""
    return (run / "ray").uri
