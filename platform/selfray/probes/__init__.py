"""Evaluation of encoders: frozen features, judged by named and versioned protocols."""
