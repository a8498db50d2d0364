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
