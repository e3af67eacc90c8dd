"""Who needs large batches? A method is pretrained with several batch sizes, probed and ranked.

    python experiments/study_batch.py                                # SimCLR on the digits
    python experiments/study_batch.py --recipe mocov2-digits --sizes 32 64 128 256 --seeds 3
    python experiments/study_batch.py --recipe simclr-cifar10 --data cifar10/ --epochs 100

All see the same number of images; the learning rate follows the batch by the recipe's rule. SimCLR
finds its negatives in the batch, MoCo in a queue. The same command goes on where it stopped.
"""

import sys

from selfray.commands.studies import StudyBatch
from selfray.commands.sweeps import run

if __name__ == "__main__":
    sys.exit(run(StudyBatch, sys.argv[1:], __doc__ or "", "study_batch.py"))
