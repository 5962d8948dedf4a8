"""Continuous batching of LlamaGen: what the server's engine runs."""
