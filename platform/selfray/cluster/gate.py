"""How far a stream runs ahead of its consumer, told to Ray Data as a backpressure policy.

Ray Data's own policies hold an execution back by estimates of memory, and one that is held back
spins (Ray 2.60), which takes the interpreter lock from the trainer. A `Gate` counts chunks, and
while nothing may be submitted and nothing runs, the execution's thread sleeps in it.
"""

import threading
from typing import Any

from ray.data import DataContext

from selfray.cluster.ray_internals import (
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
    MapOperator,
)

_GATE = "selfray.gate"


class GateClosed(Exception):  # noqa: N818 - it is no error
    """Ends an execution whose results nobody wants any more."""


class Gate:
    """Lets an execution submit its tasks in order, up to a number that the consumer raises, and so
    many at once."""

    def __init__(self, tasks: int, tasks_at_once: int) -> None:
        self.tasks = tasks
        self.tasks_at_once = tasks_at_once
        self._open_to = 0
        self._closed = False
        self._changed = threading.Condition()

    def open_to(self, tasks: int) -> None:
        """The first `tasks` tasks may be submitted."""
        with self._changed:
            self._open_to = tasks
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def admits(self, submitted: int, active: int) -> bool:
        """Whether one more may follow. GateClosed after `close`."""
        with self._changed:
            if submitted < self.tasks and not active:  # no result to wait for either
                self._changed.wait_for(lambda: self._closed or submitted < self._open_to)
            if self._closed:
                raise GateClosed
            return submitted < self._open_to and active < self.tasks_at_once

    def apply(self, context: DataContext) -> None:
        """Let this gate alone decide when the executions under `context` submit tasks."""
        context.set_config(_GATE, self)
        context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [GatePolicy])
        # Budgets for operators: a quarter of what the trainer's CPU does for a stream, for nothing.
        context.op_resource_reservation_enabled = False

    # It stays in the process of the execution: tasks that get the context get one without effect.

    def __deepcopy__(self, memo: dict[int, Any]) -> "Gate":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Gate, (self.tasks, self.tasks_at_once)


class GatePolicy(BackpressurePolicy):
    """Asks the context's gate before each task."""

    def can_add_input(self, op: Any) -> bool:
        if not isinstance(op, MapOperator):
            return True
        gate: Gate = self._data_context.get_config(_GATE)
        return gate.admits(op.metrics.num_tasks_submitted, op.num_active_tasks())
