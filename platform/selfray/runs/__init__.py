"""The folder of a run: its files, checkpoints, metrics and what can be read from them."""
