"""What an encoder is worth: frozen features, judged by named and versioned protocols."""
