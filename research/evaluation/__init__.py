"""Evaluation of language models: likelihoods, perplexity, tasks."""
