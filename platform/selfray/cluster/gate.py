"""Limits how far a stream runs ahead of its consumer, as a backpressure policy of Ray Data.

Ray Data's own policies hold an execution back by estimates of memory, and a held execution spins
(Ray 2.60), which takes the interpreter lock from the trainer. A `Gate` counts chunks instead, and
the execution's thread sleeps in it while nothing may be submitted and nothing runs.
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


class GateClosed(Exception):  # noqa: N818 - not an error
    """Ends an execution whose results are no longer needed."""


class Gate:
    """Lets an execution submit tasks in order: in total up to a number that the consumer raises,
    and at most `tasks_at_once` at a time."""

    def __init__(self, tasks: int, tasks_at_once: int) -> None:
        self.tasks = tasks
        self.tasks_at_once = tasks_at_once
        self._open_to = 0
        self._closed = False
        self._changed = threading.Condition()

    def open_to(self, tasks: int) -> None:
        """Allow the first `tasks` tasks to be submitted."""
        with self._changed:
            self._open_to = tasks
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def admits(self, submitted: int, active: int) -> bool:
        """Whether one more task may be submitted; may sleep. Raises GateClosed after `close`."""
        with self._changed:
            if submitted < self.tasks and not active:  # no result to wait for either
                self._changed.wait_for(lambda: self._closed or submitted < self._open_to)
            if self._closed:
                raise GateClosed
            return submitted < self._open_to and active < self.tasks_at_once

    def apply(self, context: DataContext) -> None:
        """Make this gate the only policy for executions under `context`."""
        context.set_config(_GATE, self)
        context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [GatePolicy])
        # Budgets for operators are useless here and take a quarter of a stream's CPU time.
        context.op_resource_reservation_enabled = False

    # A gate works only in the execution's process: tasks that receive the context get a new one.

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
