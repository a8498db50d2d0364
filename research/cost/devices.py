"""What a device can at most, by its data sheet."""

from research.cost.roofline import Ceilings

# By the beginning of `jax.Device.device_kind`; the longer names stand first.
# Dense bfloat16 products in FLOP/s without sparsity, bytes/s of main memory,
# and exponentials/s (NVIDIA: multiprocessors * 16 * boost clock; infinity where
# the maker names none). Sources: NVIDIA's data sheets (their sparse figures
# halved) and CUDA's programming guide (throughput of native instructions),
# Google Cloud's TPU pages.
_PEAKS = {
  "NVIDIA B200": Ceilings(2250e12, 8.0e12, 148 * 16 * 1.965e9),
  "NVIDIA GB200": Ceilings(2500e12, 8.0e12),
  "NVIDIA GH200 144G": Ceilings(989.4e12, 4.9e12, 132 * 16 * 1.98e9),
  "NVIDIA GH200": Ceilings(989.4e12, 4.0e12, 132 * 16 * 1.98e9),
  "NVIDIA H200 NVL": Ceilings(835.5e12, 4.8e12, 132 * 16 * 1.785e9),
  "NVIDIA H200": Ceilings(989.4e12, 4.8e12, 132 * 16 * 1.98e9),
  "NVIDIA H100 PCIe": Ceilings(756e12, 2.0e12, 114 * 16 * 1.755e9),
  "NVIDIA H100 NVL": Ceilings(835.5e12, 3.9e12, 132 * 16 * 1.785e9),
  "NVIDIA H100": Ceilings(989.4e12, 3.35e12, 132 * 16 * 1.98e9),
  "NVIDIA A100-SXM4-40GB": Ceilings(312e12, 1.555e12, 108 * 16 * 1.41e9),
  "NVIDIA A100": Ceilings(312e12, 2.039e12, 108 * 16 * 1.41e9),
  "NVIDIA L40S": Ceilings(362e12, 0.864e12, 142 * 16 * 2.52e9),
  "NVIDIA L4": Ceilings(121e12, 0.3e12, 58 * 16 * 2.04e9),
  "TPU v6 lite": Ceilings(918e12, 1.64e12),
  "TPU v6e": Ceilings(918e12, 1.64e12),
  "TPU v5 lite": Ceilings(197e12, 0.819e12),
  "TPU v5e": Ceilings(197e12, 0.819e12),
  "TPU v5": Ceilings(459e12, 2.765e12),
  "TPU v4": Ceilings(275e12, 1.228e12),
}


def ceilings(device_kind: str, dtype: str) -> Ceilings | None:
  """What a device can by its data sheet, or None where it is not known.

  Args:
    device_kind: `jax.Device.device_kind`, such as "NVIDIA H200".
    dtype: "bfloat16", or "float32" for the fastest product that jax has for it:
      TensorFloat-32 at half the rate on NVIDIA's GPUs, one bfloat16 pass on
      TPUs.
  """
  for name, peaks in _PEAKS.items():
    if device_kind.startswith(name):
      half = dtype == "float32" and name.startswith("NVIDIA")
      flops = peaks.flops / 2 if half else peaks.flops
      return Ceilings(flops=flops, bytes=peaks.bytes, exps=peaks.exps)
  return None


def peak_flops(device_kind: str) -> float | None:
  """Dense bfloat16 FLOP/s of one device, or None; see `ceilings`."""
  found = ceilings(device_kind, "bfloat16")
  return None if found is None else found.flops
