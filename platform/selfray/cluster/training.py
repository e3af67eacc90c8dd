"""The training of one rank: build or resume the state, stream, train, record."""

import contextlib
import socket
from collections.abc import Iterator

import ray.train
import ray.train.torch
import torch

from selfray import config
from selfray.check import require
from selfray.cluster import stream
from selfray.cluster.stream import Stream
from selfray.cluster.task import WorkerTask
from selfray.data.broken import BrokenTally
from selfray.data.plan import Share
from selfray.data.source import BROKEN, REASON, source_of
from selfray.experiment import Experiment
from selfray.method import Batch
from selfray.runs import checkpoint, machine, starting
from selfray.runs.recorder import EndedEarly, Recorder
from selfray.storage import Location
from selfray.train import TrainState, train


def run(task: WorkerTask) -> None:
    """Train as one worker of a run, from start or resume to the end. Raises if the run must
    fail."""
    experiment: Experiment = config.loads(task.experiment)
    device = ray.train.torch.get_device()
    context = ray.train.get_context()
    mine = experiment.shared_by(context.get_world_size())
    share = Share(context.get_world_rank(), context.get_world_size(), mine.accumulate)
    if device.type == "cpu":
        # No more threads than reserved CPUs: OpenMP's threads wait for one another, so a step whose
        # second thread shares its core with a data task takes three times as long as a step on one
        # thread (measured).
        torch.set_num_threads(max(1, int(task.cpus)))
    run_folder = Location.of(task.run)
    require(
        run_folder.exists(),
        f"--output: {run_folder} does not exist on node {socket.gethostname()}: give storage that "
        "all nodes can reach (s3://, gs:// or a shared folder)",
    )
    source = source_of(experiment, task.shards)
    recorder = Recorder(
        experiment,
        run_folder,
        task.checkpoint_steps,
        share.rank == 0,
        task.until_step,
        None if task.stop_file is None else Location.of(task.stop_file),
    )
    found = checkpoint.latest(run_folder)
    if found is None:
        state = starting.state(experiment, run_folder, source.plan.total_images, device)
    else:
        state = TrainState.start(experiment, source.plan.total_images, device)
        state.load_state_dict(found.state())
    recorder.started(state, device)

    local, everywhere = context.get_local_world_size(), context.get_world_size()
    batches = Stream(
        source,
        share,
        state.progress.step,
        task.data_cpus,
        task.until_step,
        stream.chunk_room(local, everywhere),
    )
    checked = _checked(batches, experiment, recorder)
    watching = machine.watched(
        recorder.spool,
        lambda: state.progress.images_seen,
        node="" if local == everywhere else socket.gethostname(),
        with_cpu=context.get_local_rank() == 0,
        gpu=context.get_local_rank() if device.type == "cuda" else None,
    )
    with watching, contextlib.suppress(EndedEarly):
        train(state, checked, mine, lambda step: recorder.on_step(state, step), device)
    recorder.finished(state)


def _checked(batches: Stream, experiment: Experiment, recorder: Recorder) -> Iterator[Batch]:
    """The stream as tensors. Broken images are reported by name; too many of them end the run."""
    tally = BrokenTally(experiment.data.max_broken_fraction)
    for arrays in batches:
        new = tally.see(arrays[BROKEN], arrays[REASON])
        if new:
            recorder.broken_images(new, tally.broken)
        yield stream.to_tensors(arrays, experiment.views)
