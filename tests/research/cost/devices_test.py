import math

import pytest

from research.cost import devices


@pytest.mark.parametrize(
  "kind, tflops",
  [
    ("NVIDIA H200", 989.4),
    ("NVIDIA H100 80GB HBM3", 989.4),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA L4", 121),
    ("NVIDIA L40S", 362),
    ("TPU v5 lite", 197),
    ("TPU v5", 459),
  ],
)
def test_peaks_by_data_sheet(kind, tflops):
  assert devices.peak_flops(kind) == pytest.approx(1e12 * tflops)


def test_an_unknown_device_has_none():
  assert devices.peak_flops("cpu") is None


def test_data_sheets_and_how_float32_is_multiplied():
  half = devices.ceilings("NVIDIA H200", "bfloat16")
  full = devices.ceilings("NVIDIA H200", "float32")
  assert (half.flops, half.bytes) == (989.4e12, 4.8e12)
  assert (full.flops, full.bytes) == (989.4e12 / 2, 4.8e12)
  assert half.exps == full.exps == pytest.approx(4.18e12, rel=0.01)
  tpu = devices.ceilings("TPU v5 lite", "float32")
  assert (tpu.flops, tpu.bytes, tpu.exps) == (197e12, 0.819e12, math.inf)


def test_every_name_is_found_by_itself():
  for name, peaks in devices._PEAKS.items():
    assert devices.ceilings(name, "bfloat16") == peaks, name
