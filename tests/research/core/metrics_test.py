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


def test_the_timer_measures():
  with metrics.Timer() as timer:
    pass
  assert 0 < timer.seconds < 1


def test_bootstrap_intervals_cover_as_often_as_they_say():
  generator = np.random.default_rng(0)
  runs, covered, widths = 400, 0, []
  for seed in range(runs):
    sample = generator.normal(0.3, 2.0, size=60)
    mean, low, high = metrics.paired_bootstrap(
      sample, num_samples=500, seed=seed
    )
    assert low < mean < high
    np.testing.assert_allclose(mean, sample.mean())
    covered += low <= 0.3 <= high
    widths.append(high - low)
  # Three standard deviations of a binomial share, below the nominal 95% by
  # what the percentile interval of 60 draws loses (its width has no t-factor).
  assert 0.935 - 3 * np.sqrt(0.95 * 0.05 / runs) < covered / runs < 0.985
  expected = 2 * 1.96 * 2.0 / np.sqrt(60)
  np.testing.assert_allclose(np.mean(widths), expected, rtol=0.05)


def test_windows_are_the_unit_and_tokens_the_weight():
  nll, tokens = np.array([10.0, 60.0, 5.0]), np.array([10, 20, 10])
  ratio = metrics.ratio_bootstrap(nll, tokens, num_samples=200)
  assert ratio.value == 75 / 40
  same = metrics.paired_bootstrap(nll / tokens, tokens, num_samples=200)
  np.testing.assert_allclose(same, ratio)
  assert 0.5 <= ratio.low < ratio.high <= 3.0


def test_the_bootstrap_is_seeded_and_does_not_depend_on_chunks():
  delta = np.random.default_rng(1).normal(size=30_000)
  first = metrics.paired_bootstrap(delta, num_samples=300, seed=5)
  assert first == metrics.paired_bootstrap(delta, num_samples=300, seed=5)
  assert first != metrics.paired_bootstrap(delta, num_samples=300, seed=6)
  half = 1.96 / np.sqrt(30_000)
  np.testing.assert_allclose(first.high - first.value, half, rtol=0.25)


@pytest.mark.parametrize(
  "delta, weights",
  [([], None), ([1.0, np.nan], None), ([1.0], [1.0, 2.0]), ([1.0], [0.0])],
)
def test_bootstrap_refuses_what_has_no_mean(delta, weights):
  with pytest.raises(ValueError):
    metrics.paired_bootstrap(delta, weights)
