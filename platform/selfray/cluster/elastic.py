"""Elastic training: the possible numbers of train workers, and when the number changes.

To change the number, Ray Train restarts all workers from the last checkpoint. Its own policy (Ray
2.60) takes any number that fits the nodes. This policy takes only numbers that divide the global
batch, and adds workers to a healthy run only right after a checkpoint, so that growing loses no
step. Losing workers needs no decision: the remaining ones restart.

A notice of preemption does not trigger a checkpoint, because asking Ray for it
(get_preemption_info) is a barrier of all workers in every step. A lost node costs the steps since
the last checkpoint (--checkpoint.minutes).
"""

import time
from typing import Any

from ray.train.v2.api.config import ScalingConfig

from selfray.cluster.ray_internals import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from selfray.cluster.trainer import Trainer
from selfray.runs import checkpoint
from selfray.storage import Location

START_SECONDS = "20"
"""How long a start with too many workers is tried, because Ray notices a lost node late."""


class WholeShares(ElasticScalingPolicy):
    """Ray's elastic policy, limited to numbers of workers in `sizes`; grows only after a
    checkpoint."""

    def __init__(self, scaling_config: ScalingConfig, sizes: tuple[int, ...], run: str) -> None:
        super().__init__(scaling_config)
        self._sizes = sizes
        self._run = run
        self._seen: int | None = None
        self._waits = False
        self._looked = float("-inf")

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        return max((size for size in self._sizes if size <= possible), default=0)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._waits = False
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        if not self._waits:
            decision = super().make_decision_for_running_worker_group(
                worker_group_state, worker_group_status
            )
            if isinstance(decision, ResizeDecision):
                self._waits, self._seen = True, self._newest_step()
            return NoopDecision()
        self._maybe_send_resource_request()
        if not self._has_new_checkpoint():
            return NoopDecision()
        self._waits = False
        reserved = self._get_reserved_resources()
        possible = 0 if reserved is None else self._count_possible_workers(reserved)
        if possible in (0, worker_group_state.num_workers):
            return NoopDecision()  # the additional nodes have disappeared again
        return self._get_resize_decision(possible)

    def _has_new_checkpoint(self) -> bool:
        if time.monotonic() - self._looked < 1:  # the folder may be on an object store
            return False
        self._looked = time.monotonic()
        return self._newest_step() != self._seen

    def _newest_step(self) -> int | None:
        try:
            found = checkpoint.all_of(Location.of(self._run))
        except OSError:  # the store may answer next time
            return self._seen
        return found[-1].step if found else None


class ElasticTrainer(Trainer):
    """A Trainer with the policy above."""

    def __init__(self, *arguments: Any, sizes: tuple[int, ...], run: str, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._sizes = sizes
        self._run = run

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        # Ray has no public way to set a custom policy.
        settings["scaling_policy"] = WholeShares(self.scaling_config, self._sizes, self._run)
        return super()._initialize_and_run_controller(**settings)
