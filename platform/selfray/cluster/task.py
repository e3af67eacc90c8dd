"""What the driver tells each train worker."""

from dataclasses import dataclass

from selfray.data.shard_set import ShardSet


@dataclass(frozen=True)
class WorkerTask:
    """What a worker is told. Plain values, so that any process can unpickle it."""

    experiment: str
    """The Experiment as JSON."""
    shards: ShardSet
    run: str
    """The run's folder: an absolute path or a URI."""
    cpus: float
    """CPUs of each train worker."""
    data_cpus: float
    """CPUs for the data tasks of each worker: an elastic run's grow and shrink with it."""
    checkpoint_steps: frozenset[int]
    """At the end of which steps a checkpoint is written."""
    launch: str
    """Which start of the command this is: a failure of an earlier one is no reason to give up."""
    until_step: int | None = None
    """Where the run pauses, with a checkpoint; None goes to its end."""
    stop_file: str | None = None
    """The run ends, with a checkpoint, soon after this file appears."""
