"""Train the tokenizer whose tokens BEiT predicts; every field of the recipe is a flag.

    python experiments/train_tokenizer.py tokenizer-digits
    python experiments/pretrain.py beit-digits --method.tokenizer runs/tokenizer-digits-...

The run is one like any other: probes, checkpoints, MLflow, and the same command continues it. Its
metrics are the pixels' error, the share of the codebook in use and its perplexity; its picture
tokens.png shows images, tokens and reconstructions. The result is a version of the model of the
recipe's name in MLflow's registry.
"""

import sys
import time

from selfray.cluster import runtime


def main() -> int:
    started = time.time()
    ray = runtime.Starting()  # Ray's processes come up while torch is imported
    from selfray.cluster.registry import register_tokenizer
    from selfray.commands.script import run_experiment
    from selfray.recipes import every
    from selfray.tokenizer import TokenizerConfig

    recipes = {name: r for name, r in every().items() if isinstance(r.method, TokenizerConfig)}
    return run_experiment(recipes, __doc__ or "", ray, started, register_tokenizer)


if __name__ == "__main__":
    sys.exit(main())
