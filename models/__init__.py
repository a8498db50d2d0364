"""Flax NNX modules and frozen configs."""
