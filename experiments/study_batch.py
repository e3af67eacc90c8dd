"""Does a method need large batches? Pretrains it with several batch sizes, probes and ranks them.

    python experiments/study_batch.py                                # SimCLR on the digits
    python experiments/study_batch.py --recipe mocov2-digits --sizes 32 64 128 256 --seeds 3
    python experiments/study_batch.py --recipe simclr-cifar10 --data cifar10/ --epochs 100

All runs see the same number of images; the learning rate scales with the batch by the recipe's
rule. SimCLR takes its negatives from the batch, MoCo from a queue. The same command, given again,
resumes the study where it stopped.
"""

import sys

from selfray.commands.studies import StudyBatch
from selfray.commands.sweeps import run

if __name__ == "__main__":
    sys.exit(run(StudyBatch, sys.argv[1:], __doc__ or "", "study_batch.py"))
