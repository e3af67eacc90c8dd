"""The README's commands for a cluster and a job, pasted into a fresh shell of a new user."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def block_with(command: str) -> str:
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (found,) = [block for block in blocks if command in block]
    return found


@pytest.mark.long
def test_the_readmes_cluster_and_job_work_in_a_fresh_shell(tmp_path: Path) -> None:
    # Ports and processes of its own: the README's ports may be taken on this machine, and
    # everything that is started ends with the shell.
    apart = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--mount-proc"]
    if subprocess.run(
        [*apart, "ip", "link", "set", "lo", "up"], capture_output=True, check=False
    ).returncode:
        pytest.skip("this machine allows no namespaces")
    pasted = tmp_path / "pasted.sh"
    pasted.write_text(f"set -e\n{block_with('ray start --head')}")
    shell = subprocess.run(
        [*apart, "bash", "-c", f"ip link set lo up && exec bash {pasted}"],
        cwd=ROOT,
        env={
            "HOME": str(tmp_path),
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin",
            # Compiled kernels are taken from there: compiling them takes 40 s.
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path("~/.cache").expanduser())),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert shell.returncode == 0, shell.stdout
    assert re.search("Job .* succeeded", shell.stdout)
    assert "on the Ray cluster with the dashboard http://127.0.0.1:8265" in shell.stdout
    assert "[2 of 2]" in shell.stdout
    assert "Traceback" not in shell.stdout
    assert list((tmp_path / "selfray" / "runs" / "sweeps").glob("*/outcomes.json"))
