import json

import pytest

from models.errors import InputError
from research.bench import scaling_plot
from research.results import scaling


def _row(devices, rate, **more):
  return {
    "group": "weak",
    "kind": "lm",
    "model": "tiny",
    "case": "weak.lm=tiny",
    "batch": 4 * devices,
    "length": 16,
    "mesh": f"data:{devices}",
    "devices": devices,
    "ms": 2.0,
    "tokens_per_second": rate,
    "gib_per_device": 1.5,
  } | more


ROWS = (
  _row(1, 100.0),
  _row(4, 360.0, collective_ms=0.5, exposed_ms=0.25),
  _row(4, 300.0, mesh="fsdp:4"),
  _row(2, 50.0, group="long", kind="ssd", model="2x16x8"),
  {"case": "weak.lm=large", "failed": "RESOURCE_EXHAUSTED"},
)


def test_efficiency_is_the_rate_a_device_of_that_of_one():
  text = scaling.table(ROWS)
  lines = text.splitlines()
  assert [("90.0%" in line, "75.0%" in line) for line in lines[3:5]] == [
    (True, False),
    (False, True),
  ]
  # What one device has not done has no efficiency.
  assert "ssd 2x16x8" in lines[5] and "%" not in lines[5]
  assert "`weak.lm=large` failed: RESOURCE_EXHAUSTED" in lines
  assert "collectives, ms" in lines[0] and "TFLOP/s" not in text


def test_losses_have_a_table_of_their_own():
  row = {"model": "tiny", "mesh": "data:8", "moved_to": "data:4",
         "most_relative": 1e-6, "most_relative_moved": 2e-6}  # fmt: skip
  (*_, line) = scaling.losses([*ROWS, row]).splitlines()
  assert "data:8" in line and "data:4" in line and "2e-06" in line
  assert len(scaling.losses([*ROWS, row]).splitlines()) == 3


def test_the_picture_has_lines_of_what_one_device_did(tmp_path):
  source, path = tmp_path / "scaling.json", tmp_path / "scaling.png"
  write = lambda rows: source.write_text(
    json.dumps({"rows": rows, "device": "cpu x4"})
  )
  write([*ROWS, *(row | {"group": "strong"} for row in ROWS[:2])])
  scaling_plot.plot(path, source)
  assert path.read_bytes().startswith(b"\x89PNG")
  write(ROWS[1:])
  with pytest.raises(InputError, match="no row of several devices"):
    scaling_plot.plot(path, source)
