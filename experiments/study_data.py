"""Does more unlabelled data still help? Pretrains on nested subsets of the images and ranks them.

    python experiments/study_data.py                                 # MAE on the digits
    python experiments/study_data.py --recipe simclr-digits --batch-size 64 --seeds 3
    python experiments/study_data.py --recipe mae-cifar10 --data cifar10/ --shares 0.1 0.3 1

Each subset has two runs: one with as many epochs as the whole data, one with as many images seen.
All are judged on the same labelled images. The same command, given again, resumes the study where
it stopped.
"""

import sys

from selfray.commands.studies import StudyData
from selfray.commands.sweeps import run

if __name__ == "__main__":
    sys.exit(run(StudyData, sys.argv[1:], __doc__ or "", "study_data.py"))
