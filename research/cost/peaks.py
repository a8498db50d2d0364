"""What a device can at most: by its data sheet, else measured."""

import math

import jax
import jax.numpy as jnp

from research.bench.timing import Ceilings, measure_ceilings
from research.cost import devices

# By the beginning of `jax.Device.device_kind`, longer names first: bytes/s of
# main memory, and exponentials/s (NVIDIA: multiprocessors * 16 * boost clock;
# Google names none). Sources: NVIDIA's data sheets and CUDA's programming guide
# (throughput of native instructions), Google Cloud's TPU pages.
_PEAKS = {
  "NVIDIA B200": (8.0e12, 148 * 16 * 1.965e9),
  "NVIDIA H200": (4.8e12, 132 * 16 * 1.98e9),
  "NVIDIA H100 PCIe": (2.0e12, 114 * 16 * 1.755e9),
  "NVIDIA H100 NVL": (3.9e12, 132 * 16 * 1.785e9),
  "NVIDIA H100": (3.35e12, 132 * 16 * 1.98e9),
  "NVIDIA A100-SXM4-40GB": (1.555e12, 108 * 16 * 1.41e9),
  "NVIDIA A100": (2.039e12, 108 * 16 * 1.41e9),
  "NVIDIA L40S": (0.864e12, 142 * 16 * 2.52e9),
  "NVIDIA L4": (0.3e12, 58 * 16 * 2.04e9),
  "TPU v6 lite": (1.64e12, math.inf),
  "TPU v6e": (1.64e12, math.inf),
  "TPU v5 lite": (0.819e12, math.inf),
  "TPU v5e": (0.819e12, math.inf),
  "TPU v5": (2.765e12, math.inf),
  "TPU v4": (1.228e12, math.inf),
}


def ceilings(dtype: str) -> tuple[Ceilings, str]:
  """What jax's default device can, and where the numbers are from.

  Args:
    dtype: "bfloat16", or "float32" for the fastest product that jax has for it:
      TensorFloat-32 at half the rate on NVIDIA's GPUs, one bfloat16 pass on
      TPUs.

  Returns:
    The ceilings, and "data sheet" or "measured".
  """
  device = jax.devices()[0]
  known = known_ceilings(device.device_kind, dtype)
  if known is not None:
    return known, "data sheet"
  size, copied = (
    (1024, 1 << 27) if device.platform == "cpu" else (8192, 1 << 31)
  )
  return measure_ceilings(jnp.dtype(dtype), size, copied), "measured"


def known_ceilings(device_kind: str, dtype: str) -> Ceilings | None:
  """Ceilings by the data sheet, or None; see `ceilings`."""
  flops = devices.peak_flops(device_kind)
  for name, (bandwidth, exps) in _PEAKS.items():
    if device_kind.startswith(name) and flops is not None:
      if dtype == "float32" and device_kind.startswith("NVIDIA"):
        flops /= 2
      return Ceilings(flops=flops, bytes=bandwidth, exps=exps)
  return None
