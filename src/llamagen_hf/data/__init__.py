"""Images, captions and codes for training."""
