"""Measures wall time, CPU time and memory from a command to its first step, over all its processes.

    python benchmarks/start.py --rounds 5 --output start.json
    python benchmarks/timeline.py start.json simclr-digits docs/start.png

selfray's commands take turns with a plain Ray `TorchTrainer` with a DataLoader on the same digits,
and with the same training in a plain process. On a machine with other work, CPU seconds are the
comparable figure. The table has medians.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import tyro

ROOT = Path(__file__).parents[1]
SAMPLE_SECONDS = 0.05
LONGEST_SECONDS = 600.0
SELFRAY = [
    sys.executable,
    "-c",
    "import sys; from selfray.commands.main import main; sys.exit(main())",
]

PLAIN = """
import sys, time
import torch, timm
from sklearn.datasets import load_digits
def loop():
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None].repeat(1, 3, 2, 2)
    data = torch.utils.data.DataLoader(images, 64, shuffle=True, num_workers=1)
    model = timm.create_model("resnet18", num_classes=128)
    optimizer = torch.optim.AdamW(model.parameters())
    for number, batch in enumerate(data):
        first, second = (torch.nn.functional.normalize(model(batch + 0.1 * torch.randn_like(batch)))
                         for _ in range(2))
        loss = torch.nn.functional.cross_entropy(first @ second.T / 0.1, torch.arange(len(batch)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number == 0:
            open(sys.argv[1] if len(sys.argv) > 1 else FIRST, "w").write(str(time.time()))
        if number == 17:
            return
"""
TRAINER = """
import ray, sys
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
FIRST = sys.argv[1]
ray.init(address="local")  # else it would wait for the cluster that was last on this machine
def worker(config):
    import sys
    sys.argv = ["", config["first"]]
    exec(config["code"] + "\\nloop()", {"FIRST": config["first"]})
TorchTrainer(
    worker, train_loop_config={"first": FIRST, "code": CODE},
    scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig(storage_path=sys.argv[2]),
).fit()
"""


@dataclass
class Process:
    """One process of a command."""

    name: str
    began: float
    """Wall seconds from the command."""
    ended: float = 0.0
    seconds: float = 0.0
    """CPU seconds."""
    memory_gib: float = 0.0
    """Peak proportional set size (PSS), in GiB."""
    course: list[tuple[float, float]] = field(default_factory=list)
    """(wall seconds, CPU seconds until then), once a second."""


@dataclass
class Measured:
    """The time and memory of one command."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Milestone -> wall seconds until then."""
    processor_seconds: dict[str, float] = field(default_factory=dict)
    """Milestone -> CPU seconds of all processes until then."""
    most_processes: int = 0
    """Peak number of processes."""
    memory_gib: float = 0.0
    """Peak PSS of all processes together, in GiB."""
    by_process: dict[str, float] = field(default_factory=dict)
    """Process name -> CPU seconds until the first step."""
    processes: list[Process] = field(default_factory=list)


class Tree:
    """A command and all processes that it starts."""

    def __init__(self, command: list[str], console: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        kept["PYTHONPATH"] = str(ROOT / "platform")
        self._file = console.open("w")
        self._started = time.time()
        self.process = subprocess.Popen(
            command, env=kept, stdout=self._file, stderr=self._file, cwd=ROOT
        )
        self._known: dict[tuple[int, float], Process] = {}

    def look(self) -> int:
        """Record the CPU time of each process so far, and return the number of live processes."""
        alive = 0
        try:
            root = psutil.Process(self.process.pid)
            family = [root, *root.children(recursive=True)]
        except psutil.Error:
            return 0
        for each in family:
            try:
                times, key, name = each.cpu_times(), (each.pid, each.create_time()), name_of(each)
            except psutil.Error:
                continue
            alive += 1
            found = self._known.setdefault(key, Process(name, self.seconds))
            if name != "idle":  # keep the name of its work
                found.name = name
            found.seconds, found.ended = times.user + times.system, self.seconds
        return alive

    def weigh(self) -> float:
        """Record the memory of each process, and return the present sum in GiB."""
        total = 0.0
        for (pid, _), found in self._known.items():
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                own = next(int(line.split()[1]) for line in text.splitlines() if "Pss:" in line)
            except (OSError, StopIteration):
                continue
            found.memory_gib = max(found.memory_gib, own / 2**20)
            found.course.append((round(self.seconds, 1), round(found.seconds, 2)))
            total += own / 2**20
        return total

    @property
    def seconds(self) -> float:
        return time.time() - self._started

    @property
    def processes(self) -> list[Process]:
        return list(self._known.values())

    @property
    def processor_seconds(self) -> float:
        return sum(each.seconds for each in self.processes)

    def by_process(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for each in self.processes:
            found[each.name] = round(found.get(each.name, 0.0) + each.seconds, 1)
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def name_of(process: psutil.Process) -> str:
    """A process by its work: `draw` for ray::MapBatches(Segment.draw), `idle` for a worker without
    any."""
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray::"):
        work = words[0].removeprefix("ray::").rstrip(")").split("(")[-1].split(".")[-1]
        return "idle" if work == "IDLE" else work
    scripts = [word for word in words[1:] if word.endswith(".py")]
    return Path((scripts or words)[0]).name


def measure(
    command: list[str], milestones: dict[str, Callable[[], bool]], console: Path
) -> Measured:
    """Run a command to its end and measure it. RuntimeError if it fails or takes too long."""
    tree, found, looked = Tree(command, console), Measured(), 0
    left = dict(milestones)
    while tree.process.poll() is None:
        found.most_processes = max(found.most_processes, tree.look())
        for name in [name for name, passed in left.items() if passed()]:
            del left[name]
            found.seconds[name] = tree.seconds
            found.processor_seconds[name] = tree.processor_seconds
            if name == "first step":
                found.by_process = tree.by_process()
        looked += 1
        if looked % 20 == 0:
            found.memory_gib = max(found.memory_gib, tree.weigh())
        if tree.seconds > LONGEST_SECONDS:
            tree.process.kill()
            raise RuntimeError(f"{command} took longer than {LONGEST_SECONDS:g} s")
        time.sleep(SAMPLE_SECONDS)
    if tree.process.returncode not in (0, 2):
        raise RuntimeError(f"{command} failed: {console.read_text()[-2000:]}")
    found.seconds["end"] = tree.seconds
    found.processor_seconds["end"] = tree.processor_seconds
    found.processes = tree.processes
    return found


def pretraining(recipe: str, folder: Path) -> Measured:
    """`pretrain.py` on the digits, two epochs."""
    output = folder / "runs"
    words = ["experiments/pretrain.py", recipe, "--epochs", "2", "--output", str(output)]

    def has(kind: str) -> bool:
        files = output.glob("*/spool/*")
        return any(f'"{kind}"' in file.read_text(errors="replace") for file in files)

    milestones = {
        "Ray up": lambda: any(output.glob("*/run.json")),
        "workers up": lambda: has("started"),
        "first step": lambda: has("progress"),
        "first probe": lambda: has("probe"),
    }
    return measure([sys.executable, *words], milestones, folder / "console")


def sweep(folder: Path) -> Measured:
    """Three runs of `selfray sweep temperature` on the digits, one epoch each."""
    output = folder / "runs"
    words = ["sweep", "temperature", "--epochs", "1", "--probes", "1", "--output", str(output)]
    words += ["--temperatures", "0.1", "0.2", "0.5", "--at-once", "1"]

    def ended(count: int) -> Callable[[], bool]:
        return lambda: len(list(output.glob("sweeps/*/trials/*.json"))) >= count

    milestones = {f"{count} of 3 runs": ended(count) for count in (1, 2, 3)}
    return measure([*SELFRAY, *words], milestones, folder / "console")


@cache
def trained() -> str:
    """The folder of a run of one epoch, for commands that need one."""
    output = Path(tempfile.mkdtemp(prefix="selfray-start-"))
    words = ["pretrain", "simclr-digits", "--epochs", "1", "--output", str(output)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    subprocess.run([*SELFRAY, *words], env=env, check=True, capture_output=True)
    return str(next(output.glob("*/run.json")).parent)


def peer(code: str, folder: Path) -> Measured:
    """Measure a script that writes a file at its first step."""
    first = folder / "first"
    (folder / "peer.py").write_text(code)
    command = [sys.executable, str(folder / "peer.py"), str(first), str(folder / "ray")]
    return measure(command, {"first step": first.exists}, folder / "console")


def on_trained(name: str, *words: str) -> Callable[[Path], Measured]:
    """A measurement of a sub-command of `selfray` on a trained run."""
    return lambda folder: measure([*SELFRAY, name, trained(), *words], {}, folder / "console")


def quick(*words: str) -> Callable[[Path], Measured]:
    """A measurement of a sub-command of `selfray` that only prints something."""
    return lambda folder: measure([*SELFRAY, *words], {}, folder / "console")


CASES: dict[str, Callable[[Path], Measured]] = {
    "simclr-digits": lambda folder: pretraining("simclr-digits", folder),
    "mae-digits": lambda folder: pretraining("mae-digits", folder),
    "TorchTrainer with a DataLoader": lambda folder: peer(f"CODE = {PLAIN!r}\n{TRAINER}", folder),
    "a plain process": lambda folder: peer(
        f"{PLAIN}\nif __name__ == '__main__':\n    loop()", folder
    ),
    "a sweep of three runs": sweep,
    "selfray probe": on_trained("probe", "--no-track"),
    "selfray compare": on_trained("compare"),
    "selfray --help": quick("--help"),
    "a flag error": quick("pretrain", "mae-digits", "--bath-size", "3"),
}


def main(
    rounds: int = 3, cases: tuple[str, ...] = tuple(CASES), output: Path | None = None
) -> None:
    """Measure the cases alternately, `rounds` times each, and print the medians."""
    found: dict[str, list[Measured]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name in cases:
            folder = Path(tempfile.mkdtemp(prefix="selfray-start-"))
            try:
                found[name].append(CASES[name](folder))
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    print(f"{'':32}{'milestone':14}{'wall s':>8}{'CPU s':>8}{'processes':>11}{'PSS GiB':>9}")
    for name, rows in found.items():
        for milestone in rows[0].seconds:
            wall = median(row.seconds.get(milestone) for row in rows)
            used = median(row.processor_seconds.get(milestone) for row in rows)
            line = f"{name:32}{milestone:14}{wall:8.1f}{used:8.1f}"
            if milestone == "end":
                line += f"{median(row.most_processes for row in rows):11.0f}"
                line += f"{median(row.memory_gib for row in rows):9.2f}"
            print(line)
        if rows[-1].by_process:
            shares = ", ".join(f"{n} {s:g}" for n, s in list(rows[-1].by_process.items())[:8])
            print(f"{'':32}to the first step, CPU s: {shares}")
    if output is not None:
        output.write_text(json.dumps({n: [asdict(r) for r in rows] for n, rows in found.items()}))


def median(values: Any) -> float:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else float("nan")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
