"""Train the tokenizer whose tokens BEiT predicts; every field of the recipe is a flag.

    python experiments/train_tokenizer.py tokenizer-digits
    python experiments/pretrain.py beit-digits --method.tokenizer runs/tokenizer-digits-...

The run is one like any other: probes, checkpoints, MLflow, and the same command continues it. Its
metrics are the pixels' error, the share of the codebook in use and its perplexity; its picture
tokens.png shows images, tokens and reconstructions. The result is a version of the model of the
recipe's name in MLflow's registry.
"""

import sys

from selfray.commands.pretrain import train_tokenizer

if __name__ == "__main__":
    sys.exit(train_tokenizer(sys.argv[1:], __doc__ or "", "train_tokenizer.py"))
