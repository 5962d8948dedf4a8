"""Loading of checkpoints and adapters, and offloading of their weights."""
