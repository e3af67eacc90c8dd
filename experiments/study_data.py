"""Does more unlabelled data still help? Nested shares of the images are pretrained on and ranked.

    python experiments/study_data.py                                 # MAE on the digits
    python experiments/study_data.py --recipe simclr-digits --batch-size 64 --seeds 3
    python experiments/study_data.py --recipe mae-cifar10 --data cifar10/ --shares 0.1 0.3 1

Each share is pretrained on twice: for as many epochs as the whole, and for as many images seen. All
are probed by the labels of the smallest share and by the same test images. The same command goes
on where it stopped.
"""

import sys

from selfray.commands.studies import StudyData
from selfray.commands.sweeps import run

if __name__ == "__main__":
    sys.exit(run(StudyData, sys.argv[1:], __doc__ or "", "study_data.py"))
