"""Image bytes to views: decoders, resampling and augmentation, compiled for speed."""
