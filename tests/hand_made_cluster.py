"""A Ray cluster of several nodes on one machine, started by `ray start` as a user would.

It has ports and a folder of its own and leaves any other Ray of this machine alone. (Ray's own
`cluster_utils` writes its address where other sessions look for theirs, and `ray stop` ends all.)
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from helpers import wait_for
from selfray.runs.spool import SpoolReader
from selfray.storage import Location

CHECKOUT = Path(__file__).parents[1]
STORE = ("--object-store-memory", "150000000")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def _end_with_parent() -> None:
    """A test that is killed leaves no cluster behind: Linux ends its children with it."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def family_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A process, its children, and theirs; of one that has ended, nothing."""
    if process.poll() is not None:  # its number may be another's by now
        return []
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@dataclass
class HandMadeCluster:
    """A head, and nodes that come and go. `home` is the head's home folder."""

    home: Path
    head_flags: tuple[str, ...] = ("--num-cpus", "2")
    more_environment: Mapping[str, str] = field(default_factory=dict)
    port: int = field(default_factory=lambda: free_ports(1)[0])
    """Of the head's control service."""
    started: float = field(default_factory=time.monotonic)
    timeline: list[str] = field(default_factory=list)

    def __enter__(self) -> "HandMadeCluster":
        dashboard, agent, client = free_ports(3)
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        # The path of a socket has at most 107 bytes, and pytest's folders are long.
        self.folder = tempfile.mkdtemp(prefix="ray-")
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            # Compiled kernels are taken from there: compiling them takes 40 s.
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path("~/.cache").expanduser())),
            # As in an environment that is active.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray looks after lost nodes every 30 s.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            **self.more_environment,
        }
        self.environment.pop("MLFLOW_TRACKING_URI", None)
        ports = f"--port {self.port} --dashboard-port {dashboard} --ray-client-server-port {client}"
        self._start(
            "head",
            f"--head {ports} --dashboard-agent-listen-port {agent} --temp-dir {self.folder}",
            *self.head_flags,
        )
        return self

    def __exit__(self, *_: object) -> None:
        commands = [self.process] if hasattr(self, "process") else []
        for process in [*commands, *reversed(self.nodes.values())]:
            # All at once. Asked to end, Ray takes up to 20 s, and leaves an agent of each node that
            # looks for the head for a minute, with all of a core.
            kill_all(family_of(process))
            process.wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)
        print("\n".join(["", *self.timeline]))
        if hasattr(self, "said"):
            print(self.said.read_text())

    def add_node(self, name: str, cpus: int, **resources: float) -> None:
        flags = ("--num-cpus", str(cpus), "--resources", json.dumps(resources))
        self._start(name, f"--address {self.address}", *flags)
        self.note(f"node {name} added")

    def kill_node(self, name: str) -> None:
        """As when a machine is switched off: nothing of it says goodbye."""
        process = self.nodes.pop(name)
        kill_all(family_of(process))
        process.wait(20)
        self.note(f"node {name} killed")

    def _start(self, name: str, words: str, *flags: str) -> None:
        log = self.home / f"{name}.log"
        with log.open("w") as file:
            self.nodes[name] = process = subprocess.Popen(
                ["ray", "start", "--block", *STORE, *words.split(), *flags],
                env=self.environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

        def is_up() -> bool:
            assert process.poll() is None, log.read_text()
            return "Ray runtime started" in log.read_text()

        wait_for(f"Ray's {name}", is_up)

    @property
    def address(self) -> str:
        """Of the head's control service."""
        return f"{self.host}:{self.port}"

    @property
    def host(self) -> str:
        """Ray's nodes know one another by the machine's own address, never by localhost."""
        import ray.util

        return ray.util.get_node_ip_address()

    def note(self, text: str) -> None:
        self.timeline.append(f"{time.monotonic() - self.started:6.1f} s  {text}")

    # What a user does on it

    def job(self, command: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ray", "job", command, "--address", self.dashboard, *words],
            env=self.environment,
            cwd=CHECKOUT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
            check=False,
        )

    def submit(self, *words: str) -> str:
        """Submit; a head that has just started refuses for some seconds."""

        def submitted() -> subprocess.CompletedProcess[str] | None:
            done = self.job("submit", "--runtime-env", "experiments/runtime_env.yaml", *words)
            return None if "No available agent" in done.stdout else done

        done = wait_for("the head's agent", submitted)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def command(self, *words: str) -> subprocess.Popen[bytes]:
        """A script of experiments/, run on this machine against the cluster; `said` is the file of
        what it says."""
        environment = {
            **self.environment,
            "RAY_ADDRESS": self.address,
            "PYTHONPATH": str(CHECKOUT / "platform"),
        }
        self.said = self.home / "command.log"
        with self.said.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                env=environment,
                cwd=CHECKOUT,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        return self.process


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in a run's spool, in the order of time."""
    if not run.exists():
        return []
    records = SpoolReader(Location.of(run) / "spool").read({})[0]
    return sorted((r for r in records if r["kind"] == kind), key=lambda record: record["time"])
