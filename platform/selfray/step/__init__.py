"""One optimizer step on a device: compilation, sharding, gradient caching and memory."""
