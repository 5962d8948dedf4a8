"""Checkpoints and adapters, from the Hub or a folder to where they work."""
