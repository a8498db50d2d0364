import json

import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import InputError
from research.core import files, metrics


def test_json_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / "a.json"
  files.write_json(path, {"a": 1})
  with pytest.raises(ValueError, match="JSON"):
    files.write_json(path, {"a": float("nan")})
  assert json.loads(path.read_text()) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_arrays_and_non_finite_numbers_become_json():
  value = {
    "scalar": jnp.float32(0.5),
    "list": np.array([1.0, np.inf]),
    "nan": float("nan"),
    "text": "t",
    "flag": np.bool_(True),
  }
  assert metrics.to_json_value(value) == {
    "scalar": 0.5,
    "list": [1.0, None],
    "nan": None,
    "text": "t",
    "flag": True,
  }


def test_reopening_drops_later_and_torn_lines(tmp_path):
  path = tmp_path / "metrics.jsonl"
  log = metrics.MetricsLog(tmp_path, 0)
  for step in range(4):
    log.write(step, {"loss": np.float32(1 / (step + 1)), "v": np.ones(2)})
  log.close()
  before = path.read_bytes()
  path.write_bytes(before + b'{"step": 2, "lo')
  metrics.MetricsLog(tmp_path, 2).close()
  assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[:2])
  rows = metrics.read_jsonl(path)
  assert [row["step"] for row in rows] == [0, 1]
  assert rows[1] == {"step": 1, "loss": 0.5, "v": [1.0, 1.0]}
  assert any((tmp_path / "tensorboard").iterdir())


def test_reading_names_a_bad_line_and_takes_an_absent_file(tmp_path):
  path = tmp_path / "m.jsonl"
  assert metrics.read_jsonl(path) == []
  path.write_text('{"a": 1}\n[2]\n')
  with pytest.raises(InputError, match=r"m\.jsonl line 2"):
    metrics.read_jsonl(path)


def test_timing_keys_are_left_out():
  row = {"step": 1, "step_seconds": 2.0, "tokens_per_second": 3.0}
  assert metrics.without_timing(row) == {"step": 1}
