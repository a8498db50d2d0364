"""Benchmarks of ops: cases, floors, peers and measurements."""
