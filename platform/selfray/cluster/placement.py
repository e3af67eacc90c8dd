"""Divides a cluster's resources among a run's train workers, data tasks and probes."""

from dataclasses import dataclass

from selfray.check import named_amounts
from selfray.cluster.runtime import Resources
from selfray.experiment import Experiment

PROBE_CPUS = 0.2
"""CPUs reserved for probes, which run during training and must not wait for training's CPUs."""
SMALLEST_DATA_CPUS = 0.5
DATA_CPUS_PER_WORKER = 8.0
"""Data CPUs that a run requests by default from an autoscaler; --data-cpus requests more."""


@dataclass(frozen=True)
class Placement:
    """The resources of each part of a run."""

    workers: int
    """Train workers; for an elastic run, as many as the cluster has room for."""
    cpus_per_worker: float
    gpus_per_worker: float
    data_cpus: float
    """CPUs for the data tasks of all these workers together."""

    def resources(self, experiment: Experiment) -> dict[str, float]:
        """The resources that Ray reserves for each train worker."""
        wanted = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        wanted |= named_amounts("worker_resources", experiment.worker_resources)
        return {name: amount for name, amount in wanted.items() if amount}


def place(experiment: Experiment, cluster: Resources) -> Placement:
    """Divide the cluster among train workers and data tasks. Raises ValueError for missing
    resources, for which Ray would wait forever.

    If an autoscaler adds nodes and its limits are unknown, the flags are not checked.
    """
    asked, least = experiment.max_workers, experiment.min_workers
    gpus = experiment.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.gpus >= 1 else 0.0
    if cluster.is_unknown:
        return _placement_from_flags(experiment, gpus)
    flag = f"--workers {experiment.workers}"
    workers = asked if not experiment.is_elastic else max(least, min(asked, cluster.holds(gpus)))
    if gpus * workers > cluster.gpus:
        raise ValueError(
            f"{flag} x --gpus-per-worker {gpus:g} need {gpus * workers:g} GPUs and "
            f"the cluster has {cluster.gpus:g}: give fewer workers, or add GPU nodes"
        )
    for name, amount in named_amounts("worker_resources", experiment.worker_resources).items():
        has = cluster.others.get(name, 0.0)
        # Ray knows a node's type of GPU only once the node exists.
        is_told_later = cluster.grows and name.startswith("accelerator_type:")
        if amount * workers > has and not is_told_later:
            raise ValueError(
                f"{flag} x --worker-resources {experiment.worker_resources} need "
                f"{amount * workers:g} of {name} and the cluster has {has:g}: give fewer workers, "
                "or add nodes with it"
            )
    cpus = experiment.cpus_per_worker
    if cpus is None:
        # Leave some for data tasks and probes, or workers would wait for them forever.
        spare = SMALLEST_DATA_CPUS + PROBE_CPUS
        # Without GPUs, training itself needs most of the CPUs.
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
    # Use all existing CPUs, but do not make an autoscaler buy all it could.
    bought = min(left, DATA_CPUS_PER_WORKER * workers)
    data_cpus = experiment.data_cpus or (bought if cluster.grows else left)
    if data_cpus > left:
        raise ValueError(
            f"--data-cpus {data_cpus:g} is more than the {left:g} CPUs that the train workers "
            f"leave of the cluster's {cluster.cpus:g}"
        )
    return Placement(workers, cpus, gpus, data_cpus)


def _placement_from_flags(experiment: Experiment, gpus: float) -> Placement:
    """The placement from the flags alone, for a cluster whose limits are unknown."""
    if experiment.gpus_per_worker is None or experiment.data_cpus is None:
        raise ValueError(
            "the cluster has no CPUs now and does not say what it can add: give "
            "--gpus-per-worker and --data-cpus, or state its limits with "
            "SELFRAY_CLUSTER=CPU=64,GPU=8"
        )
    cpus = experiment.cpus_per_worker or 1.0
    return Placement(experiment.max_workers, cpus, gpus, experiment.data_cpus)
