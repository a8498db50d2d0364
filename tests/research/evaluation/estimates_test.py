import math

import numpy as np
import pytest

from research.evaluation.estimates import estimate


def test_a_mean_has_the_harness_standard_error():
  values = [1.0, 0.0, 1.0, 1.0, 0.0]
  found = estimate("acc", values)
  assert found.value == pytest.approx(0.6)
  assert found.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
  assert found.low <= found.value <= found.high and found.items == 5
  assert estimate("acc", [1.0]).stderr is None


def test_a_perplexity_has_the_error_of_a_ratio():
  nll, tokens = np.asarray([9.0, 25.0, 11.0]), np.asarray([5, 10, 5])
  found = estimate("perplexity", nll, tokens, math.exp, lambda value: value)
  assert found.value == pytest.approx(math.exp(45 / 20))
  rest = nll - 45 / 20 * tokens
  expected = found.value * math.sqrt((rest**2).sum() * 3 / 2) / 20
  assert found.stderr == pytest.approx(expected)
  assert found.low <= found.value <= found.high
