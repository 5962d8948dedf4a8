"""Conditions of a generator: prompts and classes, as the states and ids that it reads."""
