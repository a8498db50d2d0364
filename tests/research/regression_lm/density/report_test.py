import numpy as np
import pytest

from models.errors import InputError
from models.numbers import Ieee
from research.regression_lm import RegressionLM
from research.regression_lm.density import report as density_report
from research.regression_lm.density import task as density_task


@pytest.fixture
def small(monkeypatch):
  """Fewer points, and two texts."""
  for name, value in (("_POINTS", 50), ("_GIVEN", 200), ("_DRAWS", 8)):
    monkeypatch.setattr(density_report, name, value)
  monkeypatch.setattr(density_task, "JUDGED", density_task.JUDGED[:2])


def test_a_model_that_knows_nothing_is_far_from_the_truth(small, tmp_path):
  lm = RegressionLM.from_scratch(
    size="tiny", numbers=Ieee(mantissa_digits=2), num_objectives=2
  )
  rows, clouds = density_report.evaluate(lm, num_samples=40, seed=0)
  assert [row["method"] for row in rows] == [
    "regression LM",
    "true density",
  ] * 2
  for ours, truth in zip(rows[::2], rows[1::2]):
    assert ours["text"] == truth["text"]
    assert ours["energy_distance"] > 10 * abs(truth["energy_distance"])
    for name in ("crps_1", "crps_2", "crps_2_given_1"):
      assert ours[name] > 3 * truth[name] > 0
  # The first number tells about the second.
  total = lambda name: sum(row[name] for row in rows[1::2])
  assert total("crps_2_given_1") < total("crps_2")
  density_report.plot(tmp_path / "plot.png", clouds)
  assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
  single = RegressionLM.from_scratch(size="tiny")
  with pytest.raises(InputError, match="predicts 1 numbers, the task has 2"):
    density_report.evaluate(single, num_samples=4, seed=0)


def test_conditional_draws_of_the_truth_are_its_neighbours():
  pool = np.stack([np.arange(1000.0), np.arange(1000.0) ** 2], 1)
  shuffled = np.random.default_rng(0).permutation(pool)
  found = density_report._nearest(shuffled, np.array([[500.0, 0], [-9.0, 0]]))
  half = density_report._DRAWS // 2
  assert found[0].min() == (500 - half) ** 2
  assert found[1].min() == 0 and found[1].max() == (2 * half - 1) ** 2
