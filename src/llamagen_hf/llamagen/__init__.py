"""LlamaGen (arXiv 2406.06525): a Llama writes an image code by code, a VQ decoder turns the codes into pixels."""
