"""Which mask ratio is best for these images? Pretrains with each, probes and ranks them.

    python experiments/sweep_mae.py                                  # the digits, 4 ratios
    python experiments/sweep_mae.py --seeds 3 --ratios 0.5 0.6 0.75 0.9
    python experiments/sweep_mae.py --search optuna --between 0.2 0.95 --samples 12
    python experiments/sweep_mae.py --recipe mae-cifar10 --data cifar10/ --epochs 100 --stop-worse

The same command, given again, resumes the sweep where it stopped. The runs are ranked by the linear
probe: kNN does not suit MAE's features, and losses at different mask ratios are not comparable.
"""

import sys

from selfray.commands.sweeps import SweepMAE, run

if __name__ == "__main__":
    sys.exit(run(SweepMAE, sys.argv[1:], __doc__ or "", "sweep_mae.py"))
