"""The folder of a run: its files, checkpoints and metrics, and how to read and compare them."""
