"""Every private API of Ray that selfray uses, with the reason. Checked with Ray 2.60.

Check this list with every new version of Ray: each entry says what to look at again. Names are
imported on first use, since most processes need only one of them and each costs seconds.
"""

import functools
import importlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfray.loops import run_to_its_end

if TYPE_CHECKING:
    from ray._private.state import state as cluster_state
    from ray.data._internal.execution.backpressure_policy import (
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
        BackpressurePolicy,
    )
    from ray.data._internal.execution.operators.map_operator import MapOperator
    from ray.data._internal.stats import get_or_create_stats_actor
    from ray.train.v2._internal.execution.scaling_policy import (
        ElasticScalingPolicy,
        NoopDecision,
        ResizeDecision,
        ScalingDecision,
    )

__all__ = [
    "ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY",
    "BackpressurePolicy",
    "ElasticScalingPolicy",
    "MapOperator",
    "NoopDecision",
    "ResizeDecision",
    "ScalingDecision",
    "cluster_state",
    "get_or_create_stats_actor",
]

_BACKPRESSURE = "ray.data._internal.execution.backpressure_policy"
_SCALING = "ray.train.v2._internal.execution.scaling_policy"

_HOMES = {
    # runtime: only Ray's control service knows what an autoscaler may add.
    "cluster_state": ("ray._private.state", "state"),
    # gate: Ray Data's own policies bound a stream by estimates of memory, and spin while they wait.
    "BackpressurePolicy": (_BACKPRESSURE, "BackpressurePolicy"),
    "ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY": (
        _BACKPRESSURE,
        "ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY",
    ),
    "MapOperator": ("ray.data._internal.execution.operators.map_operator", "MapOperator"),
    # stream: the statistics actor of Ray Data lives on the node that first uses it, to the end.
    "get_or_create_stats_actor": ("ray.data._internal.stats", "get_or_create_stats_actor"),
    # elastic: Ray Train takes any number of workers that fits; a global batch allows only divisors.
    # (elastic also overrides `_count_possible_workers` and `_initialize_and_run_controller`.)
    "ElasticScalingPolicy": (_SCALING, "ElasticScalingPolicy"),
    "NoopDecision": (_SCALING, "NoopDecision"),
    "ResizeDecision": (_SCALING, "ResizeDecision"),
    "ScalingDecision": (_SCALING, "ScalingDecision"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


# --- starting Ray on loopback

_SHORT_CUT = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")


def start_on_loopback(folder: Path, seconds: float, **options: Any) -> None:
    """Start a new Ray on 127.0.0.1 by ray.init, with only the processes that tasks need.

    `seconds` limits the raylet's start; Ray's own limit is 30. Raises the errors of ray.init.

    Reasons (Ray 2.60): ray.init replaces 127.0.0.1 by the machine's address, unless the constant
    ENABLE_RAY_CLUSTER is False, as on macOS; and every part of Ray listens on all interfaces unless
    its node is 127.0.0.1. include_dashboard=False still starts the API server, the log monitor and
    the autoscaler. The raylet waits 15 s for its dashboard agent to write its ports, and ends if
    that is late (ray#65983). That agent is not needed, so an idle process takes its place. The
    agent for runtime environments gets its port beforehand, so that nothing waits for it either.
    Ray blocks only SIGINT in its processes; with a process group of their own, no signal to the
    group of this command ends them before the command has said how to go on.
    """
    import ray
    from ray._private import node, ray_constants, services
    from ray._raylet import persist_port  # pyright: ignore[reportAttributeAccessIssue]

    class LoopbackNode(node.Node):
        def __init__(self, ray_params: Any, **more: Any) -> None:
            ray_params.include_log_monitor = False
            ray_params.no_monitor = True
            ray_params.runtime_env_agent_port = _reserve_port()
            super().__init__(ray_params, **more)

        def start_api_server(self, **_: Any) -> None:
            self._webui_url = ""

        def start_raylet(self, *arguments: Any, **more: Any) -> None:
            for name in _SHORT_CUT:
                persist_port(self._session_dir, self._node_id, name, -1)
            original = services.start_ray_process

            def with_other_agents(command: list[str], *others: Any, **named: Any) -> Any:
                return original([_other_agent(word) for word in command], *others, **named)

            services.start_ray_process = with_other_agents
            try:
                super().start_raylet(*arguments, **more)
            finally:
                services.start_ray_process = original

    usual, ask, run = node.Node, services.get_node, services.ConsolePopen

    def ask_patiently(*arguments: Any) -> Any:
        until = time.monotonic() + seconds
        while True:
            try:
                return ask(*arguments)
            except RuntimeError:  # it is not registered yet
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)

    ray_constants.ENABLE_RAY_CLUSTER = False
    node.Node = LoopbackNode
    services.get_node = ask_patiently
    services.ConsolePopen = functools.partial(run, process_group=0)
    try:
        ray.init(
            address="local",
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
            include_dashboard=False,
            **options,
        )
    finally:
        node.Node = usual
        services.get_node = ask
        services.ConsolePopen = run


def _other_agent(word: str) -> str:
    """A word of the raylet's command line, with the agents' commands replaced by ours."""
    stand_in = f"{sys.executable} -S -E {Path(__file__).with_name('ray_agent.py')}"
    if word.startswith("--dashboard_agent_command="):
        return f"--dashboard_agent_command={stand_in}"
    agent = "--runtime_env_agent_command="
    return f"{agent}{stand_in} {word.removeprefix(agent)}" if word.startswith(agent) else word


_reserved: list[socket.socket] = []


def _reserve_port() -> int:
    """A free port on loopback that is reserved: this process binds it, and Ray can listen on it."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    _reserved.append(held)
    return held.getsockname()[1]


def stop_loopback() -> None:
    """Undo the changes of `start_on_loopback` in this process."""
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = True
    while _reserved:
        _reserved.pop().close()


def own_processes() -> dict[str, int]:
    """The essential processes of the Ray started here: name -> process id."""
    from ray._private import worker

    started: Any = worker._global_node
    return {
        kind: processes[0].process.pid
        for kind, processes in (started.all_processes if started else {}).items()
    }


def read_token_again() -> None:
    """Make Ray read RAY_AUTH_MODE and the token again, because a second session has another token.
    Ray reads them only once per process."""
    if "ray" not in sys.modules:
        return
    from ray._raylet import (
        AuthenticationTokenLoader,  # pyright: ignore[reportAttributeAccessIssue]
        Config,  # pyright: ignore[reportAttributeAccessIssue]
    )

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def on_loopback_where_alone(address: str) -> Iterator[None]:
    """Inside, ray.init keeps 127.0.0.1 in `address` if nothing answers at the machine's own
    address, as for a Ray from `start_on_loopback`.

    Reason (Ray 2.60): ray.init replaces 127.0.0.1 by the machine's address, and then waits for a
    server that does not listen there.
    """
    from ray._private import ray_constants, services

    host, _, port = address.rpartition("://")[2].rpartition(":")
    usual = ray_constants.ENABLE_RAY_CLUSTER
    if host in ("127.0.0.1", "localhost") and port.isdigit():
        try:
            socket.create_connection((services.get_node_ip_address(), int(port)), 5).close()
        except OSError:
            ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = usual


def use_stored_token() -> None:
    """Use the user's stored Ray token if RAY_AUTH_MODE is not set, as `ray start` does;
    ray.init(address) does not."""
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def current_cluster() -> str | None:
    """The address of the cluster that this user or root last started on this machine; None if there
    is none. Notes of other users are ignored, because they may lead anywhere."""
    from ray._common.utils import get_ray_address_file

    note = Path(get_ray_address_file(None))
    try:
        if note.stat().st_uid not in (0, os.getuid()):
            return None
        return note.read_text().strip() or None
    except OSError:
        return None


# --- Ray Train without the processes that selfray does not need


def train_here(trainer: Any, settings: dict[str, Any], is_alone: bool) -> Any:
    """Do the work of DataParallelTrainer with `settings`, but with the controller in this process.

    `is_alone` says that no autoscaler serves this Ray. Returns the Result.

    Reasons (Ray 2.60): the controller, a barrier for `ray.train.report` (SynchronizationActor), a
    manager of data sets and a cleaner of placement groups are four processes, each of which imports
    Ray Train, 2 to 5 s of CPU. A run of selfray needs none of the last three: it reports nothing,
    its ranks open their own streams, and placement groups of this process end with its job. The
    cleaner also needs the dashboard, which a local Ray does not have.
    """
    from unittest import mock

    import ray
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )
    from ray.train.v2._internal.execution.controller.controller import TrainController
    from ray.train.v2._internal.execution.worker_group import state, worker_group
    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

    class OwnWorkerGroup(WorkerGroup):
        def _init_train_context_on_workers(
            self, workers: Any, sync_actor: Any, train_context_args: dict[str, list[Any]]
        ) -> None:
            ray.get(
                [
                    worker.actor.init_train_context.remote(
                        train_run_context=self._train_run_context,
                        distributed_context=worker.distributed_context,
                        synchronization_actor=None,
                        storage_context=self._storage_context,
                        worker_callbacks=self._worker_callbacks_to_propagate,
                        controller_actor=None,  # the controller is this process, not an actor
                        **{name: values[i] for name, values in train_context_args.items()},
                    )
                    for i, worker in enumerate(workers)
                ]
            )
            self._decorate_worker_log_file_paths(workers)

        @staticmethod
        def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
            environment = WorkerGroup._get_worker_runtime_env(custom_runtime_env)
            # With its own environment, a worker could not use a process that Ray already started.
            return {} if is_alone else environment

    class Controller(TrainController):
        worker_group_cls = OwnWorkerGroup

    unneeded = (DatasetsCallback, PlacementGroupCleanerCallback)
    settings["callbacks"] = [c for c in settings["callbacks"] if not isinstance(c, unneeded)]
    with (
        mock.patch.object(worker_group, "SynchronizationActor", _NoActor()),
        mock.patch.object(state, "_shutdown_sync_actor"),
    ):
        controller = Controller(**settings)
        try:
            run_to_its_end(controller.run())
        except BaseException:
            if controller._worker_group is not None:
                controller._worker_group.abort()
            raise
    return controller.get_result()


class _NoActor:
    """Replaces an actor class and starts nothing."""

    def options(self, **_: Any) -> "_NoActor":
        return self

    def remote(self, **_: Any) -> "_NoActor":
        return self


def fixed_policy(scaling_config: Any) -> Any:
    """Ray Train's policy for a fixed number of workers, without asking an autoscaler: asking starts
    an actor (AutoscalingCoordinator), and a local Ray has no autoscaler."""
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    class Alone(FixedScalingPolicy):
        def after_controller_start(self, train_run_context: Any) -> None:
            return

        def _maybe_send_resource_request(self) -> None:
            return

    return Alone(scaling_config)


def torch_backend() -> Any:
    """Ray Train's class that connects torch's ranks, as a base class."""
    from ray.train.torch.config import _TorchBackend

    return _TorchBackend


def session_folder() -> str:
    """The folder of the Ray session in use, on this node."""
    from ray._private import worker

    return worker._global_node.get_session_dir_path()  # type: ignore[union-attr]


# --- Ray Data without the processes that a local Ray does not need


def stream_alone() -> None:
    """Make executions of Ray Data in this process start no actors beside their tasks.

    Reasons (Ray 2.60): one actor collects statistics for the dashboard, another asks the
    autoscaler. Each is a process that imports Ray Data, 2 s of CPU, and a local Ray has neither
    dashboard nor autoscaler.
    """
    import uuid

    import ray
    from ray.data import ExecutionResources
    from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
    from ray.data._internal.execution import streaming_executor
    from ray.data._internal.stats import _StatsManager

    if getattr(_StatsManager, "is_silent", False):
        return

    class NoAutoscaler(ClusterAutoscaler):
        def try_trigger_scaling(self) -> None:
            return

        def on_executor_shutdown(self) -> None:
            return

        def get_total_resources(self) -> ExecutionResources:
            has = ray.cluster_resources()
            return ExecutionResources(
                cpu=has.get("CPU", 0.0),
                gpu=has.get("GPU", 0.0),
                memory=has.get("memory", 0.0),
                object_store_memory=has.get("object_store_memory", 0.0),
            )

    def nothing(*_: Any, **__: Any) -> None:
        return

    streaming_executor.create_cluster_autoscaler = lambda *_, **__: NoAutoscaler()
    for name in (
        "update_execution_metrics",
        "update_iteration_metrics",
        "register_dataset_to_stats_actor",
    ):
        setattr(_StatsManager, name, staticmethod(nothing))
    _StatsManager.gen_dataset_id_from_stats_actor = staticmethod(lambda: uuid.uuid4().hex)
    _StatsManager.is_silent = True  # type: ignore[attr-defined]


def remove_orphaned_placement_groups() -> int:
    """Remove this job's placement groups whose actor has died, and return their number.

    Ray removes a group only when both its job and its actor have ended, so that of a killed trial
    would hold its CPUs until the sweep ends.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import (
        PlacementGroupTableData,  # pyright: ignore[reportAttributeAccessIssue]
    )
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    removed = 0
    for raw in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(raw)
        if (
            group.creator_actor_dead
            and not ray.ActorID(group.creator_actor_id).is_nil()  # the driver's own
            and group.creator_job_id.hex() == job
            and group.state != PlacementGroupTableData.REMOVED
        ):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            removed += 1
    return removed
