"""Sweeps as trials on Ray Tune."""
