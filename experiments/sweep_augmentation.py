"""Which augmentations matter for these images? Each one is left out in turn.

    python experiments/sweep_augmentation.py                         # SimCLR on digits
    python experiments/sweep_augmentation.py --recipe simclr-cifar10 --data cifar10/ --epochs 100

What the recipe does not use is not tried. The literature says that crops together with colour
jitter are what matters (SimCLR, arXiv:2002.05709, section 3): the last line leaves both out. The
same command goes on where it stopped.
"""

import sys

from selfray.commands.sweeps import SweepAugmentation, run

if __name__ == "__main__":
    sys.exit(run(SweepAugmentation, sys.argv[1:], __doc__ or "", "sweep_augmentation.py"))
