"""Which temperature is best for these images? That of SimCLR or MoCo, or of DINO's teacher.

    python experiments/sweep_temperature.py                          # SimCLR on digits
    python experiments/sweep_temperature.py --recipe mocov2-digits --temperatures 0.07 0.2 0.5
    python experiments/sweep_temperature.py --search optuna --between 0.03 1.0 --stop-worse
    python experiments/sweep_temperature.py --recipe dino-digits --temperatures 0.02 0.04 0.07

The same command, given again, resumes the sweep where it stopped. The runs are ranked by probes,
since losses at different temperatures are not comparable.
"""

import sys

from selfray.commands.sweeps import SweepTemperature, run

if __name__ == "__main__":
    sys.exit(run(SweepTemperature, sys.argv[1:], __doc__ or "", "sweep_temperature.py"))
