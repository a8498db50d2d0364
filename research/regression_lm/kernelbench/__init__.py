"""KernelBench: times of PyTorch programs, by cross-validation over problems."""
