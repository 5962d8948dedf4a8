"""What the trainings of all families share: the trainer, its checkpoints, recipes and records."""
