"""Every private API of Ray that selfray uses, with the reason. Read and run with Ray 2.60.

A new version of Ray is checked against this list: each entry says what has to be looked at again.
Names are imported on first use, since most processes need one of them and each costs seconds.
"""

import importlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    # runtime: what an autoscaler may add is known to Ray's control service alone.
    "cluster_state": ("ray._private.state", "state"),
    # gate: Ray Data's own policies bound a stream by estimates of memory, and spin while they wait.
    "BackpressurePolicy": (_BACKPRESSURE, "BackpressurePolicy"),
    "ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY": (
        _BACKPRESSURE,
        "ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY",
    ),
    "MapOperator": ("ray.data._internal.execution.operators.map_operator", "MapOperator"),
    # stream: the actor that counts for Ray Data lives on the node that asks first, and to the end.
    "get_or_create_stats_actor": ("ray.data._internal.stats", "get_or_create_stats_actor"),
    # elastic: Ray Train takes any number of workers that fits; a global batch divides among some.
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
    """ray.init of a new Ray whose node is 127.0.0.1, with no more processes than tasks need.

    `seconds`: how long the raylet may take; Ray's own limit is 30. Raises what ray.init raises.

    Reasons (Ray 2.60): ray.init replaces 127.0.0.1 by the machine's address, unless this constant
    says that there are no clusters, as on macOS; and every part of Ray listens on all interfaces
    unless its node is 127.0.0.1. include_dashboard=False still starts the API server, the log
    monitor and the autoscaler. The raylet waits 15 s for its dashboard agent to write its ports,
    and ends if that is late (ray#65983): nothing here needs that agent, so a process that waits
    stands in for it. The agent for runtime environments gets a port beforehand: then nothing waits
    for it either.
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

    usual, ask = node.Node, services.get_node

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


def _other_agent(word: str) -> str:
    """A word of the raylet's command line, with the agents' commands as they are to be."""
    stand_in = f"{sys.executable} -S -E {Path(__file__).with_name('ray_agent.py')}"
    if word.startswith("--dashboard_agent_command="):
        return f"--dashboard_agent_command={stand_in}"
    agent = "--runtime_env_agent_command="
    return f"{agent}{stand_in} {word.removeprefix(agent)}" if word.startswith(agent) else word


_reserved: list[socket.socket] = []


def _reserve_port() -> int:
    """A free port of loopback that stays ours: bound here, and free to be listened on."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    _reserved.append(held)
    return held.getsockname()[1]


def stop_loopback() -> None:
    """Undo what `start_on_loopback` changed in this process."""
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = True
    while _reserved:
        _reserved.pop().close()


def read_token_again() -> None:
    """Ray reads RAY_AUTH_MODE and the token once in a process: a second session has another one."""
    if "ray" not in sys.modules:
        return
    from ray._raylet import (
        AuthenticationTokenLoader,  # pyright: ignore[reportAttributeAccessIssue]
        Config,  # pyright: ignore[reportAttributeAccessIssue]
    )

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def use_stored_token() -> None:
    """Where the user has a token of Ray's and RAY_AUTH_MODE is not set, check with it, as
    `ray start` does; ray.init(address) does not."""
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def current_cluster() -> str | None:
    """The address of the cluster that this user, or root, last started on this machine; None where
    there is none. Another user's note of one is not followed: it may lead anywhere."""
    from ray._common.utils import get_ray_address_file

    note = Path(get_ray_address_file(None))
    try:
        if note.stat().st_uid not in (0, os.getuid()):
            return None
        return note.read_text().strip() or None
    except OSError:
        return None
