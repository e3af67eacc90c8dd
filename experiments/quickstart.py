"""Pretrains and probes two methods on small images: `make quickstart`.

scikit-learn's handwritten digits (included, no download) go through the whole platform: Parquet
shards -> Ray Data -> Ray Train -> checkpoints -> probes -> MLflow. SimCLR and MAE are pretrained
without labels; then k nearest neighbours and a linear classifier on their frozen features are
compared with raw pixels and with the untrained encoder.

    python experiments/quickstart.py            # writes its results to runs/quickstart
    python experiments/quickstart.py --output /data/runs --seed 1
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from selfray.cluster import runtime
from selfray.commands.script import one_line_errors, with_console
from selfray.console import Console

if TYPE_CHECKING:
    from selfray.cluster.launch import RunResult
    from selfray.probes.features import ProbeResult


@dataclass(frozen=True)
class Quickstart:
    """Pretrain SimCLR and MAE on handwritten digits, probe them, and show the result."""

    output: str = "runs"
    """Folder of all output."""
    seed: int = 0


def main() -> int:
    started = time.time()
    settings = tyro.cli(Quickstart, description=__doc__)
    folder = Path(settings.output).expanduser().absolute() / "quickstart"
    ray = runtime.Starting()  # Ray's processes start while torch is imported
    return with_console(folder, lambda console: quickstart(settings, folder, console, ray, started))


def quickstart(
    settings: Quickstart, folder: Path, console: Console, ray: runtime.Starting, started: float
) -> int:
    from selfray.cluster.launch import baseline, launch
    from selfray.recipes import digits
    from selfray.report.run_pictures import curves

    console.say("selfray quickstart: SimCLR and MAE on 1,797 handwritten digits, labels unseen")
    with ray.session(console.say):
        changes = {"output": settings.output, "seed": settings.seed}
        simclr = replace(digits.SIMCLR, precision=fast_precision(), **changes)
        mae = replace(digits.MAE, **changes)
        simclr_result = launch(simclr, console, started=started)
        mae_result = launch(mae, console)
        pixels = baseline(simclr, console)
    untrained = simclr_result.probes[0]
    table = [
        row("raw-pixels", pixels),
        row("untrained", untrained),
        row("simclr", simclr_result.final_probe, simclr_result),
        row("mae", mae_result.final_probe, mae_result),
    ]
    (folder / "table.json").write_text(json.dumps(table, indent=1))
    histories = {"SimCLR": simclr_result.history, "MAE": mae_result.history}
    known = {"raw pixels, kNN": pixels.knn, "untrained, kNN": untrained.knn}
    baselines = {name: knn for name, knn in known.items() if knn is not None}
    curves(histories, baselines).save(folder / "curves.png")
    runs = [simclr_result, mae_result]
    show(console, table, folder, runs, pixels.test_images, time.time() - started)
    return 0


def fast_precision() -> Literal["float32", "bf16"]:
    """bf16 if the CPU has instructions for it, which train a ResNet about twice as fast."""
    import torch

    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "float32"


def row(method: str, probe: "ProbeResult | None", run: "RunResult | None" = None) -> dict[str, Any]:
    """A row of the table; None in columns that do not apply."""
    assert probe is not None
    return {
        "method": method,
        "knn": probe.knn,
        "linear": probe.linear,
        "images_per_second": run and round(run.images_per_second, 1),
        "seconds": run and round(run.seconds, 1),
        "protocols": probe.protocols,
    }


def show(
    console: Console,
    table: list[dict[str, Any]],
    folder: Path,
    runs: "list[RunResult]",
    tested: int,
    seconds: float,
) -> None:
    console.say()
    console.say(f"{'method':12}{'kNN':>8}{'linear':>9}{'images/s':>11}{'seconds':>10}")
    for line in table:
        speed, took = line["images_per_second"], line["seconds"]
        console.say(
            f"{line['method']:12}{line['knn']:8.1%}{line['linear']:9.1%}"
            f"{f'{speed:,.0f}' if speed else '-':>11}{f'{took:.0f}' if took else '-':>10}"
        )
    knn, linear = (table[0]["protocols"][name].split(" ")[0] for name in ("knn", "linear"))
    console.say(f"protocols {knn} and {linear}, on {tested} test images; {seconds:.0f} s in all")
    console.say()
    console.say(f"curves    {folder / 'curves.png'}")
    for run in runs:
        console.say(f"pictures  {run.folder}/artifacts/pictures/")
    console.say(f"full log  {console.log}")
    console.say("next      make ui                       # compare the two runs in MLflow")
    console.say(
        "          .venv/bin/python experiments/pretrain.py simclr-cifar10 --data.path YOUR_IMAGES"
    )


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
