"""`selfray doctor`: checks that this machine can train."""

import importlib.metadata
import ipaddress
import logging
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from selfray import __version__
from selfray.commands.flags import TrackingFlag
from selfray.commands.script import FAILED
from selfray.storage import Location, last_line

if TYPE_CHECKING:
    from selfray.console import Console

GIB = 2**30

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Doctor:
    """Check this machine: Python, packages, CPUs, memory, GPUs, disk, Ray, MLflow, S3. The exit
    code is 1 if a problem prevents training, else 0.
    $ selfray doctor
    """

    interrupted: ClassVar[str] = "some checks did not run"

    tracking: TrackingFlag = None

    def run(self, console: "Console") -> int:
        worst = 0
        checks: list[tuple[str, Callable[[], Finding]]] = [
            ("Python", _python),
            ("packages", _packages),
            ("CPUs", _cpus),
            ("memory", _memory),
            ("disk", _disk),
            ("S3", _s3),
            ("GPUs", _gpus),
            ("Ray", _ray),
            ("MLflow", lambda: _mlflow(self.tracking)),
        ]
        for name, check in checks:
            console.live(f"...   {name}")
            try:
                finding = check()
            except Exception as error:
                # Any error is a finding: the other checks still run.
                log.exception(name)
                finding = Finding("fail", f"{type(error).__name__}: {last_line(error)}")
            console.say(f"{finding.status:4}  {name:8}  {finding.text}")
            worst = max(worst, FAILED if finding.status == "fail" else 0)
        return worst


class Finding(NamedTuple):
    """The result of one check."""

    status: Literal["ok", "warn", "fail"]
    text: str
    """What was found and, unless ok, what to do about it."""


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info >= (3, 14):
        return Finding("warn", f"{version}: selfray is tested on 3.11 to 3.13; use one of them")
    return Finding("ok", f"{version}, selfray {__version__} in {Path(__file__).parents[1]}")


def _packages() -> Finding:
    from packaging.requirements import Requirement

    try:
        requirements = importlib.metadata.requires("selfray") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("warn", "selfray is on the path but not installed: pip install -e .")
    shown, missing, other = [], [], []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(requirement))
            continue
        shown.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            other.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if missing:
        return Finding("fail", f"missing: pip install {shlex.join(missing)}")
    if other:
        return Finding("warn", f"{'; '.join(other)}: pip install --upgrade selfray")
    return Finding("ok", ", ".join(shown))


def _cpus() -> Finding:
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if usable < 2:
        return Finding("warn", "1: training and data loading would share it; use two or more")
    return Finding("ok", f"{usable}")


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available < 2 * GIB:
        return Finding("warn", f"{text}: too little for Ray and training; close other programs")
    return Finding("ok", text)


def _disk() -> Finding:
    folder = Path("runs").absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    if not os.access(folder, os.W_OK):
        return Finding("fail", f"{folder} cannot be written: change folder, or give --output")
    text = f"{free:.1f} GiB free for ./runs"
    if free < 5:
        return Finding("warn", f"{text}: checkpoints may not fit; make room, or give --output")
    return Finding("ok", text)


def _s3() -> Finding:
    named = [n for n in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_ROLE_ARN") if os.environ.get(n)]
    if named:
        return Finding("ok", f"credentials from {', '.join(named)}")
    if Path("~/.aws/credentials").expanduser().exists():
        return Finding("ok", "credentials from ~/.aws/credentials")
    return Finding(
        "ok",
        "no credentials; only s3:// paths need them: set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role",
    )


def _gpus() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        sizes = [f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in names]
        return Finding("ok", f"{len(sizes)}: {', '.join(sizes)}; CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi"):
        return Finding(
            "warn",
            f"nvidia-smi is installed, but torch {torch.__version__} sees no GPU: install a CUDA "
            "build of torch that fits the driver (https://pytorch.org)",
        )
    return Finding("ok", "none: training will run on CPUs")


def _ray() -> Finding:
    from selfray.cluster import runtime

    started = time.monotonic()
    with runtime.session():
        seconds, cluster = time.monotonic() - started, runtime.cluster_resources()
        reach = exposure(runtime.node_addresses(), os.environ.get("RAY_AUTH_MODE") == "token")
    address = os.environ.get("RAY_ADDRESS")
    how = f"joined {address}" if address else "starts on this machine"
    text = f"{how} in {seconds:.1f} s: {cluster.cpus:g} CPUs, {cluster.gpus:g} GPUs"
    if seconds > 30:
        return Finding("warn", f"{text}; the machine is probably overloaded: see `uptime`")
    return Finding(reach.status, f"{text}; {reach.text}")


def exposure(addresses: Collection[str], has_token: bool) -> Finding:
    """Who can reach a Ray cluster, whose ports run any code for whoever gets in.

    Args:
        addresses: those of its nodes.
        has_token: whether this user's Ray asks for a token.
    """
    is_local = all(ipaddress.ip_address(address).is_loopback for address in addresses)
    shown = ", ".join(sorted(addresses)[:3]) + (" and more" if len(addresses) > 3 else "")
    if has_token:
        where = "from this machine alone" if is_local else f"at {shown}"
        return Finding("ok", f"reachable {where}, with its token")
    if is_local:
        return Finding(
            "warn",
            "every user of this machine can run code in it: set RAY_AUTH_MODE=token before "
            "`ray start`",
        )
    return Finding(
        "warn",
        f"whoever reaches {shown} can run code there: let only its own nodes in, or set "
        "RAY_AUTH_MODE=token on every node",
    )


def _mlflow(tracking: str | None) -> Finding:
    from selfray.cluster.mlflow_store import (
        count_mlflow_experiments,
        database_file,
        tracking_uri,
    )

    uri = tracking_uri(Location.of("runs"), tracking)
    database = database_file(uri)
    if database is not None and not Path(database).exists():
        return Finding("ok", f"{database} will be created by the first run")
    try:
        where, experiments = count_mlflow_experiments(uri)
    except OSError as error:
        return Finding("fail", str(error))
    return Finding("ok", f"{where} answers: {experiments} experiments")
