"""Which temperature is best for these images? SimCLR's and MoCo's, or the one of DINO's teacher.

    python experiments/sweep_temperature.py                          # SimCLR on digits
    python experiments/sweep_temperature.py --recipe mocov2-digits --temperatures 0.07 0.2 0.5
    python experiments/sweep_temperature.py --search optuna --between 0.03 1.0 --stop-worse
    python experiments/sweep_temperature.py --recipe dino-digits --temperatures 0.02 0.04 0.07

The same command goes on where it stopped. Losses do not compare across temperatures; probes do.
"""

import sys

from selfray.commands.sweeps import SweepTemperature, run

if __name__ == "__main__":
    sys.exit(run(SweepTemperature, sys.argv[1:], __doc__ or "", "sweep_temperature.py"))
