"""Pretrain an encoder by any recipe; every field of the recipe is a flag.

    python experiments/pretrain.py mae-imagenet --data.path s3://bucket/scans --workers 8
    python experiments/pretrain.py simclr-cifar10 --data.path cifar10/ --method.temperature 0.5

The same command started again continues where it stopped.
"""

import sys
import time

from selfray.cluster import runtime


def main() -> int:
    started = time.time()
    ray = runtime.Starting()  # Ray's processes come up while torch is imported
    from selfray.commands.script import run_experiment
    from selfray.recipes import every

    return run_experiment(every(), __doc__ or "", ray, started)


if __name__ == "__main__":
    sys.exit(main())
