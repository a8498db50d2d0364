"""What the kernels of Hopper GPUs know of the machine."""

# Multiprocessors of an H100 or H200.
PROCESSORS = 132
# Bytes of shared memory that a thread block may have.
SHARED_MEMORY = 226 * 1024
