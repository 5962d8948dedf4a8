"""Serving of a cascade."""
