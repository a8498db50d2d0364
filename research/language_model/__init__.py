"""Training of language models: Transformer, Mamba-1, Mamba-2, hybrids."""
