"""The trainings of LlamaGen: its image tokenizer, the codes in between, its generator."""
