"""Pretrains three small encoders on a subset of CIFAR-10, and runs `selfray evaluate` on them.

    python benchmarks/cifar10_encoders.py --images cifar10/ --seed 0

The seed chooses 5,000 train and 2,000 test images of CIFAR-10 (a folder with train-*.parquet and
test-*.parquet). SimCLR, MAE and DINO are pretrained on the train images without labels, each for
a few minutes of one core. A table for each compares it with its untrained network and with the
same network from scratch, and a curve shows accuracies by the number of labels. The commands are
printed; run again, they go on where they stopped.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SIZES = {"train": 5000, "test": 2000}
# The stem for photographs, though the images are small: it makes a step eight times faster.
RESNET = "--encoder.no-small-stem --encoder.layers 1 1 1 1 --encoder.channels 32 64 128 256"
ADAMW = "--optimizer.name adamw --optimizer.base-learning-rate 2e-3 --precision bf16"
METHODS = {
    "simclr": f"{RESNET} {ADAMW} --epochs 20 --batch-size 256",
    # A teacher that follows within 380 steps: the recipe's is meant for 1,000 epochs.
    "dino": f"{RESNET} {ADAMW} --epochs 20 --batch-size 256 --method.prototypes 1024 "
    "--method.momentum.start 0.99 --method.teacher-temperature.start 0.04 "
    "--method.teacher-temperature.end 0.04",
    "mae": "--encoder.width 96 --encoder.depth 4 --encoder.heads 4 --method.decoder-width 64 "
    "--method.decoder-depth 2 --epochs 15 --batch-size 128 --optimizer.base-learning-rate 2e-3",
}
"""Flags after `selfray pretrain METHOD-cifar10`."""
OFTEN = "--probe.times 2 --checkpoint.times 2"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", required=True, help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--labels", default="100 500 2000", help="of the label-efficiency curve")
    parser.add_argument("--output", default="runs/cifar10-encoders")
    settings = parser.parse_args()
    output = Path(settings.output).absolute() / f"seed-{settings.seed}"
    data = output / "cifar10-subset"
    for part, size in SIZES.items():
        write_subset(Path(settings.images), data / f"{part}.parquet", part, size, settings.seed)
    for method in settings.methods:
        run(
            f"pretrain {method}-cifar10 --data.path {data} --output {output / method} "
            f"--seed {settings.seed} {OFTEN} {METHODS[method]}"
        )
        (record,) = (output / method).glob(f"{method}-cifar10-*/run.json")
        shared = f"--data {data} --pictures {output / 'pictures'}"
        run(
            f"evaluate {record.parent} untrained --by knn linear logistic low-shot finetune "
            f"--finetune.epochs 4 --json {output / method}.json {shared}"
        )
        run(
            f"evaluate {record.parent} --by logistic --labels {settings.labels} --subsets 1 "
            f"--low-shot-by logistic finetune --json {output / method}-labels.json {shared}"
        )
    return 0


def write_subset(images: Path, file: Path, part: str, size: int, seed: int) -> None:
    """Write `size` random images of a part (train or test), in the order of the files, unless the
    file exists."""
    if file.exists():
        return
    table = pa.concat_tables(pq.read_table(f) for f in sorted(images.glob(f"{part}-*.parquet")))
    chosen = np.random.default_rng(seed).choice(len(table), size, replace=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.take(np.sort(chosen)), file, row_group_size=500)


def run(command: str) -> None:
    print(f"$ selfray {command}", flush=True)
    program = Path(sys.executable).with_name("selfray")
    subprocess.run([program, *shlex.split(command)], check=True)


if __name__ == "__main__":
    sys.exit(main())
