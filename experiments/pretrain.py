"""Pretrain an encoder with any recipe; every field of the recipe is a flag.

    python experiments/pretrain.py mae-imagenet --data.path s3://bucket/scans --workers 8
    python experiments/pretrain.py simclr-cifar10 --data.path cifar10/ --method.temperature 0.5

The same command, given again, resumes the run where it stopped.
"""

import sys

from selfray.commands.pretrain import pretrain

if __name__ == "__main__":
    sys.exit(pretrain(sys.argv[1:], __doc__ or "", "pretrain.py"))
