"""Reports what a run waits for if there are no nodes for its train workers; it would look hung."""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from selfray.cluster.ray_internals import remove_orphaned_placement_groups
from selfray.console import Console

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
PATIENCE_SECONDS = 4.0
"""Grace period: Ray may still count a lost node, or not yet count a new one."""


@contextmanager
def reporting(wanted: Mapping[str, float], least: int, console: Console) -> Iterator[None]:
    """Inside, report when the nodes have no room for `least` workers with resources `wanted`
    each."""
    ended = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(wanted, least, console, ended), daemon=True, name="selfray-waiting"
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(0.5)  # not longer: it may be asking a cluster that is gone


def _watch(
    wanted: Mapping[str, float], least: int, console: Console, ended: threading.Event
) -> None:
    short_for, said = 0.0, -1
    while not ended.wait(POLL_SECONDS):
        try:
            remove_orphaned_placement_groups()
            room = room_for(wanted, (node["Resources"] for node in ray.nodes() if node["Alive"]))
        except Exception:  # Ray is shutting down or busy: ask again later
            log.exception("the nodes cannot be listed now")
            continue
        if room >= least:
            if said >= 0:
                console.say("the nodes are available: the train workers start")
            short_for, said = 0.0, -1
            continue
        short_for += POLL_SECONDS
        if room != said and short_for >= PATIENCE_SECONDS:
            said = room
            each = ", ".join(f"{name} {amount:g}" for name, amount in wanted.items())
            console.say(
                f"waiting for nodes: {least} train worker{'s' if least > 1 else ''} of {each} "
                f"each, but the cluster has room for {room}"
            )


def room_for(wanted: Mapping[str, float], nodes: Iterator[Mapping[str, float]]) -> int:
    """The number of workers that fit, where each needs all its resources on one node."""
    return sum(
        min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items())
        for node in nodes
    )
