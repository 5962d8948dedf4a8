"""DALL-E 2 (unCLIP, arXiv 2204.06125): a CLIP, a prior from texts to its image embeddings, and a decoder of those."""
