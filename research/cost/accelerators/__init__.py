"""Cycles and resources of accelerators, by models that can be checked."""
