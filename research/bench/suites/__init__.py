"""Benchmark suites: the cases of ops, models and methods."""
