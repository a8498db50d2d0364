"""What the kernels of Hopper GPUs know of the machine."""

# Multiprocessors of an H100 or H200.
PROCESSORS = 132
