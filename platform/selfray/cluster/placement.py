"""How a run shares the cluster: train workers, data tasks and probes."""

from dataclasses import dataclass

from selfray.check import named_amounts
from selfray.cluster.runtime import Resources
from selfray.experiment import Experiment

PROBE_CPUS = 0.2
"""Probes run beside training and must never wait for a CPU that training holds."""
SMALLEST_DATA_CPUS = 0.5
DATA_CPUS_PER_WORKER = 8.0
"""What a run asks for by itself where an autoscaler adds nodes; --data-cpus asks for more."""


@dataclass(frozen=True)
class Placement:
    """What each part of a run gets of the cluster."""

    workers: int
    """Train workers: as many of an elastic run's as the cluster holds."""
    cpus_per_worker: float
    gpus_per_worker: float
    data_cpus: float
    """For the data tasks of all these workers together."""

    def resources(self, experiment: Experiment) -> dict[str, float]:
        """What Ray reserves for each train worker."""
        wanted = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        wanted |= named_amounts("worker_resources", experiment.worker_resources)
        return {name: amount for name, amount in wanted.items() if amount}


def place(experiment: Experiment, cluster: Resources) -> Placement:
    """Share the cluster among train workers and data tasks. ValueError says what is missing.

    Ray would wait forever for a worker that fits nowhere. Where nodes come when they are asked
    for and nobody says how many, what the flags say is believed.
    """
    asked, least = experiment.max_workers, experiment.min_workers
    gpus = experiment.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.gpus >= 1 else 0.0
    if cluster.is_unknown:
        return _believed(experiment, gpus)
    flag = f"--workers {experiment.workers}"
    workers = asked if not experiment.is_elastic else max(least, min(asked, cluster.holds(gpus)))
    if gpus * workers > cluster.gpus:
        raise ValueError(
            f"{flag} x --gpus-per-worker {gpus:g} need {gpus * workers:g} GPUs and "
            f"the cluster has {cluster.gpus:g}: give fewer workers, or add GPU nodes"
        )
    for name, amount in named_amounts("worker_resources", experiment.worker_resources).items():
        has = cluster.others.get(name, 0.0)
        # Ray knows a node's kind of GPU when the node is there.
        is_told_later = cluster.grows and name.startswith("accelerator_type:")
        if amount * workers > has and not is_told_later:
            raise ValueError(
                f"{flag} x --worker-resources {experiment.worker_resources} need "
                f"{amount * workers:g} of {name} and the cluster has {has:g}: give fewer workers, "
                "or add nodes that have it"
            )
    cpus = experiment.cpus_per_worker
    if cpus is None:
        # Data tasks and probes need some too, or the workers would wait for them forever.
        spare = SMALLEST_DATA_CPUS + PROBE_CPUS
        # Where there is no GPU, training itself is what takes the CPUs.
        owned = gpus or experiment.worker_resources or cluster.grows
        most = min(0.7 * cluster.cpus / workers, cluster.largest_node_cpus)
        wanted = 1 if owned else max(1, int(most))
        cpus = min(wanted, int((cluster.cpus - spare) / workers * 100) / 100)
        if cluster.cpus < workers:
            raise ValueError(
                f"{flag} need {workers} CPUs and the cluster has {cluster.cpus:g}: "
                f"give --workers {max(1, int(cluster.cpus))} or fewer, or add nodes"
            )
    left = round(cluster.cpus - cpus * workers - PROBE_CPUS, 2)
    if left < SMALLEST_DATA_CPUS:
        raise ValueError(
            f"{flag} x --cpus-per-worker {cpus:g} leave {max(0.0, left):g} of the "
            f"cluster's {cluster.cpus:g} CPUs to read the data, which needs "
            f"{SMALLEST_DATA_CPUS}: give less of either"
        )
    # All that is there, but not all that could be bought.
    bought = min(left, DATA_CPUS_PER_WORKER * workers)
    data_cpus = experiment.data_cpus or (bought if cluster.grows else left)
    if data_cpus > left:
        raise ValueError(
            f"--data-cpus {data_cpus:g} is more than the {left:g} CPUs that the train workers "
            f"leave of the cluster's {cluster.cpus:g}"
        )
    return Placement(workers, cpus, gpus, data_cpus)


def _believed(experiment: Experiment, gpus: float) -> Placement:
    """What the flags say, for a cluster that tells nothing of itself."""
    if experiment.gpus_per_worker is None or experiment.data_cpus is None:
        raise ValueError(
            "the cluster has no CPUs now and does not tell what it can add: give "
            "--gpus-per-worker and --data-cpus, or say what it can have with "
            "SELFRAY_CLUSTER=CPU=64,GPU=8"
        )
    cpus = experiment.cpus_per_worker or 1.0
    return Placement(experiment.max_workers, cpus, gpus, experiment.data_cpus)
