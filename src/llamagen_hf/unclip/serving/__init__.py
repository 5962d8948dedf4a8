"""Serving of a prior and its decoder."""
