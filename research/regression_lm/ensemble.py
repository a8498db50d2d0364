"""Several models as one: the even mixture of their distributions.

Shapes by axis letter: M models, B texts, S draws a model, O objectives.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from research.predictors.calibration import Prediction
from research.predictors.examples import Example
from research.regression_lm import arguments
from research.regression_lm.api import RegressionLM


class Ensemble:
  """A mixture of models that predict the same objectives.

  Attributes:
    members: the models; their sizes, tokenizers and number formats may differ.
  """

  def __init__(self, members: Sequence[RegressionLM]):
    """Puts them together.

    Raises:
      InputError: there is none, or they predict other numbers of objectives.
    """
    self.members = list(members)
    counts = {lm.num_objectives for lm in self.members}
    if len(counts) != 1:
      raise InputError(
        f"an ensemble of {len(self.members)} models with {sorted(counts)} "
        "objectives: give models of one number of them"
      )

  def sample(
    self, xs: Sequence[Any], num_samples: int = 64, *, seed: int = 0, **options
  ) -> np.ndarray:
    """Draws (B, M S, O), S = `num_samples` of each model.

    Args:
      xs: B texts, or examples.
      num_samples: S.
      seed: of the draws; each model has its own.
      **options: of `RegressionLM.sample`.
    """
    xs, seed = arguments.listed("xs", xs), arguments.seed(seed)
    draws = [
      lm.sample(xs, num_samples, seed=seed * len(self.members) + m, **options)
      for m, lm in enumerate(self.members)
    ]
    return np.concatenate(draws, axis=1)

  def predict(
    self,
    xs: Sequence[Any],
    num_samples: int = 64,
    *,
    level: float = 0.9,
    seed: int = 0,
    **options,
  ) -> Prediction:
    """Mean, median, quantiles and interval of the mixture, from draws.

    Args:
      xs: B texts, or examples.
      num_samples: draws of each model.
      level: probability of the interval.
      seed: as for `sample`.
      **options: of `RegressionLM.sample`.

    Raises:
      InputError: a text or an option does not do.
    """
    level = arguments.level(level)
    return Prediction(self.sample(xs, num_samples, seed=seed, **options), level)

  def expected(self, xs: Sequence[Any], known: Sequence[Any], **options):
    """Mean (B, O) of the models' `RegressionLM.expected`."""
    xs, known = arguments.listed("xs", xs), arguments.listed("known", known)
    found = [lm.expected(xs, known, **options) for lm in self.members]
    return np.mean(found, axis=0)

  def log_prob(
    self, given: Sequence[Example], *, density: bool = False
  ) -> np.ndarray:
    """Log-probability (B,) of whole targets under the mixture.

    Models of different number formats round differently; compare their
    densities, not their probabilities.

    Args:
      given: examples.
      density: divide by the distances to the next numbers.
    """
    given = arguments.listed("given", given)
    parts = [
      lm.log_prob(given, density=density).sum(axis=1) for lm in self.members
    ]
    return np.logaddexp.reduce(parts, axis=0) - np.log(len(parts))
