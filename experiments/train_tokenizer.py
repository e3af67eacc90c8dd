"""Train the tokenizer whose tokens BEiT predicts; every field of the recipe is a flag.

    python experiments/train_tokenizer.py tokenizer-digits
    python experiments/pretrain.py beit-digits --method.tokenizer runs/tokenizer-digits-...

As in any run, there are probes, checkpoints and MLflow, and the same command resumes it. The
metrics are the reconstruction error, the share of the codebook in use and its perplexity; the
picture tokens.png shows images, tokens and reconstructions. The result is registered in MLflow as a
new version of the model with the recipe's name.
"""

import sys

from selfray.commands.pretrain import train_tokenizer

if __name__ == "__main__":
    sys.exit(train_tokenizer(sys.argv[1:], __doc__ or "", "train_tokenizer.py"))
