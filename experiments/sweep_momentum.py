"""Which momentum schedule is best for the teacher? Varies its start and shape (BYOL, MoCo v3,
DINO).

    python experiments/sweep_momentum.py                             # BYOL on digits
    python experiments/sweep_momentum.py --recipe dino-digits --starts 0.99 0.996 --seeds 3
    python experiments/sweep_momentum.py --search population --between 0.8 0.999 --samples 6

A constant keeps its start value; linear and cosine end at 1, where the teacher no longer changes. A
population finds a schedule: the sequence of values that the surviving run went through.
The same command, given again, resumes the sweep where it stopped.
"""

import sys

from selfray.commands.sweeps import SweepMomentum, run

if __name__ == "__main__":
    sys.exit(run(SweepMomentum, sys.argv[1:], __doc__ or "", "sweep_momentum.py"))
