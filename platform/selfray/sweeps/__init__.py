"""Sweeps without Ray: the question, the choice of what to try next, and the answer."""
