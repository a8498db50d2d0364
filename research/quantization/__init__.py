"""Quantization of language models: calibration, transformations, recipes."""
