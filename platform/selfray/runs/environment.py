"""Records the environment of a run: code, packages and machine."""

import getpass
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

_VERSIONS_OF = ("selfray", "torch", "torchvision", "timm", "ray", "mlflow", "pyarrow")


def environment_tags() -> dict[str, str]:
    """Tags of the code version, packages and machine of this process; unknown ones are left out."""
    tags = {
        "version.python": platform.python_version(),
        "machine.hostname": socket.gethostname(),
        "machine.processor": platform.processor() or platform.machine(),
        "machine.cpus": str(os.cpu_count()),
        "mlflow.source.name": os.path.relpath(sys.argv[0]) if sys.argv[0] else "python",
        "mlflow.source.type": "LOCAL",
    }
    with suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    tags["machine.memory_gib"] = f"{memory_bytes / 2**30:.1f}"
    # The checkout that contains this package, not the current folder.
    git = ("git", "-C", str(Path(__file__).parent))
    is_tracked = _output_of(*git, "ls-files", Path(__file__).name)
    commit = _output_of(*git, "rev-parse", "HEAD") if is_tracked else ""
    if commit:
        changes = _output_of(*git, "status", "--porcelain", "--untracked-files=no")
        tags["selfray.git_commit"] = commit + ("+dirty" if changes else "")
        tags["mlflow.source.git.commit"] = commit
    gpus = _output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if gpus:
        names = gpus.splitlines()
        tags["machine.gpu"] = names[0].strip()
        tags["machine.gpus"] = str(len(names))
    for package in _VERSIONS_OF:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # selfray runs from its folder, or an optional library is not installed
    return tags


def _output_of(*command: str) -> str:
    """A command's output; "" if it is absent, fails or takes longer than 5 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
