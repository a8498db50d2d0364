import math

import pytest

from research.cost import peaks


def test_data_sheets_and_how_float32_is_multiplied():
  half = peaks.known_ceilings("NVIDIA H200", "bfloat16")
  full = peaks.known_ceilings("NVIDIA H200", "float32")
  assert (half.flops, half.bytes) == (989.4e12, 4.8e12)
  assert (full.flops, full.bytes) == (989.4e12 / 2, 4.8e12)
  assert half.exps == full.exps == pytest.approx(4.18e12, rel=0.01)
  tpu = peaks.known_ceilings("TPU v5 lite", "float32")
  assert (tpu.flops, tpu.bytes, tpu.exps) == (197e12, 0.819e12, math.inf)


def test_every_name_is_found_by_itself():
  for name, (bandwidth, exps) in peaks._PEAKS.items():
    found = peaks.known_ceilings(name, "bfloat16")
    assert (found.bytes, found.exps) == (bandwidth, exps), name


def test_what_is_not_in_the_table_is_measured(monkeypatch):
  asked = []
  monkeypatch.setattr(
    peaks, "measure_ceilings", lambda *a: asked.append(a) or "found"
  )
  assert peaks.known_ceilings("cpu", "float32") is None
  assert peaks.ceilings("float32") == ("found", "measured")
  assert len(asked) == 1
