"""Which augmentations matter for these images? Leaves out one at a time.

    python experiments/sweep_augmentation.py                         # SimCLR on digits
    python experiments/sweep_augmentation.py --recipe simclr-cifar10 --data cifar10/ --epochs 100

Augmentations that the recipe does not use are skipped. SimCLR's authors found that the combination
of crops and colour jitter matters most (arXiv:2002.05709, section 3), so the last variant leaves
out both. The same command, given again, resumes the sweep where it stopped.
"""

import sys

from selfray.commands.sweeps import SweepAugmentation, run

if __name__ == "__main__":
    sys.exit(run(SweepAugmentation, sys.argv[1:], __doc__ or "", "sweep_augmentation.py"))
