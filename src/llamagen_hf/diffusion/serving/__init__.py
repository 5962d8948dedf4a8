"""What serves pixel diffusion: the frontend, and the batch that an engine runs."""
