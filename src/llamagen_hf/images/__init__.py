"""Images: read from anywhere in one way."""
