"""What a device can at most, by its data sheet."""

# Dense bfloat16 products in FLOP/s, without sparsity, by the beginning of
# `jax.Device.device_kind`; the longer names stand first. Sources: NVIDIA's data
# sheets (their sparse figures halved) and Google Cloud's TPU pages.
_PEAK_FLOPS = {
  "NVIDIA B200": 2250e12,
  "NVIDIA GB200": 2500e12,
  "NVIDIA GH200": 989.4e12,
  "NVIDIA H200 NVL": 835.5e12,
  "NVIDIA H200": 989.4e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835.5e12,
  "NVIDIA H100": 989.4e12,
  "NVIDIA A100": 312e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA L4": 121e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v4": 275e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Dense bfloat16 FLOP/s of one device, or None where it is not known.

  Args:
    device_kind: `jax.Device.device_kind`, such as "NVIDIA H200".
  """
  for name, flops in _PEAK_FLOPS.items():
    if device_kind.startswith(name):
      return flops
  return None
