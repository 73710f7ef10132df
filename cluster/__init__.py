"""Where it runs: the store, the Ray cluster, the hardware."""
