"""What benchmarks compare with, in the same run."""
