"""The task that the driver sends to each train worker."""

from dataclasses import dataclass

from selfray.data.shard_set import ShardSet


@dataclass(frozen=True)
class WorkerTask:
    """The input of a train worker. Plain values, so that any process can unpickle it."""

    experiment: str
    """The Experiment as JSON."""
    shards: ShardSet
    run: str
    """The run's folder: an absolute path or a URI."""
    cpus: float
    """CPUs of each train worker."""
    data_cpus: float
    """CPUs for the data tasks of each worker, so that an elastic run's total follows its size."""
    checkpoint_steps: frozenset[int]
    """Steps at whose end a checkpoint is written."""
    until_step: int | None = None
    """The step at which the run pauses, with a checkpoint; None trains to the end."""
    stop_file: str | None = None
    """The run ends, with a checkpoint, soon after this file appears."""
    launch: str = ""
    """Identifies this start of the workers: recorded failures of earlier ones do not count."""
