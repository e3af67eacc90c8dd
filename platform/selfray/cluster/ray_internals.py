"""Every private API of Ray that selfray uses, with the reason. Read and run with Ray 2.60.

A new version of Ray is checked against this list: each entry says what has to be looked at again.
Names are imported on first use, since most processes need one of them and each costs seconds.
"""

import importlib
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
