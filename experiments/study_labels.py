"""How many labels does pretraining save? Compares fine-tuning with training from scratch.

    python experiments/study_labels.py                               # MAE on the digits
    python experiments/study_labels.py --recipe simclr-digits --labels 20 100 500 --subsets 1
    python experiments/study_labels.py --recipe mae-cifar10 --data cifar10/ --labels 500 5000

The encoder is pretrained without labels; then it, and the same network from random weights, learn
from the same labels by the same settings. A curve, a table and a sentence tell up to how many
labels pretraining pays. The same command, given again, resumes the study where it stopped.
"""

import sys

from selfray.commands.studies import run_labels

if __name__ == "__main__":
    sys.exit(run_labels(sys.argv[1:], __doc__ or ""))
