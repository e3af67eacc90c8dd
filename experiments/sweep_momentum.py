"""How should the teacher follow? Start values and shapes of its momentum, for BYOL, MoCo v3, DINO.

    python experiments/sweep_momentum.py                             # BYOL on digits
    python experiments/sweep_momentum.py --recipe dino-digits --starts 0.99 0.996 --seeds 3
    python experiments/sweep_momentum.py --search population --between 0.8 0.999 --samples 6

A constant stays at its start; the line and the cosine end at 1, where the teacher stands still. A
population finds a schedule of its own: what its survivor went through.
The same command goes on where it stopped.
"""

import sys

from selfray.commands.sweeps import SweepMomentum, run

if __name__ == "__main__":
    sys.exit(run(SweepMomentum, sys.argv[1:], __doc__ or "", "sweep_momentum.py"))
