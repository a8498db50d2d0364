import numpy as np
import pytest

from models.errors import InputError
from models.numbers import Ieee
from research.regression_lm import Ensemble, Example, RegressionLM

FORMAT = Ieee(base=2, mantissa_digits=2)
NUMBERS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


def member(seed):
  lm = RegressionLM.from_scratch(size="tiny", numbers=FORMAT, seed=seed)
  head = lm.params["head"]
  head["kernel"] = head["kernel"] * 3
  return lm


@pytest.fixture(scope="module")
def members():
  return [member(seed) for seed in range(2)]


def test_the_mixture_is_the_mean_of_probabilities(members):
  both = Ensemble(members)
  given = [Example("abc", sign * v) for v in NUMBERS for sign in (1, -1)]
  each = [np.exp(lm.log_prob(given).sum(1)) for lm in members]
  found = np.exp(both.log_prob(given))
  np.testing.assert_allclose(found, np.mean(each, axis=0), rtol=1e-6)
  assert 0 < found.sum() <= 1 + 1e-6
  dense = both.log_prob(given, density=True)
  widths = FORMAT.widths(np.array([FORMAT.encode(e.y) for e in given]))
  np.testing.assert_allclose(np.exp(dense) * widths, found, rtol=1e-5)


def test_draws_are_pooled_and_each_model_has_its_own(members):
  both = Ensemble([members[0], members[0]])
  draws = both.sample(["abc", "d"], 30)
  assert draws.shape == (2, 60, 1)
  assert (draws[:, :30] != draws[:, 30:]).any()
  np.testing.assert_array_equal(
    draws[:, :30], members[0].sample(["abc", "d"], 30)
  )
  found = both.predict(["abc", "d"], 30, level=0.5)
  np.testing.assert_array_equal(found.samples, draws)
  single = members[0].expected(["abc"], NUMBERS)
  np.testing.assert_allclose(both.expected(["abc"], NUMBERS), single)


def test_members_must_fit(members):
  other = RegressionLM.from_scratch(size="tiny", num_objectives=2)
  for group, words in [([], "0 models"), ([members[0], other], r"\[1, 2\]")]:
    with pytest.raises(InputError, match=words):
      Ensemble(group)
  with pytest.raises(InputError, match="level=2"):
    Ensemble(members).predict(["a"], level=2)
