"""Pretrain an encoder by any recipe; every field of the recipe is a flag.

    python experiments/pretrain.py mae-imagenet --data.path s3://bucket/scans --workers 8
    python experiments/pretrain.py simclr-cifar10 --data.path cifar10/ --method.temperature 0.5

The same command started again continues where it stopped.
"""

import sys
import time

from recipes import cifar10, digits, imagenet

from selfray.cluster.command import run_experiment

RECIPES = digits.RECIPES | cifar10.RECIPES | imagenet.RECIPES

if __name__ == "__main__":
    started = time.time()
    sys.exit(run_experiment(RECIPES, __doc__ or "", started))
