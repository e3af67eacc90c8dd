"""Which mask ratio is best for these images? Each is pretrained with, probed and ranked.

    python experiments/sweep_mae.py                                  # the digits, 4 ratios
    python experiments/sweep_mae.py --seeds 3 --ratios 0.5 0.6 0.75 0.9
    python experiments/sweep_mae.py --search optuna --between 0.2 0.95 --samples 12
    python experiments/sweep_mae.py --recipe mae-cifar10 --data cifar10/ --epochs 100 --stop-worse

The same command goes on where it stopped. MAE is judged by the linear probe: nearest neighbours do
not suit it, and losses do not compare across mask ratios.
"""

import sys

from selfray.commands.sweeps import SweepMAE, run

if __name__ == "__main__":
    sys.exit(run(SweepMAE, sys.argv[1:], __doc__ or "", "sweep_mae.py"))
