"""Made-up numbers of counted things: draws of a Gaussian process.

Tasks to learn from before few numbers of a real one. A draw is a smooth
function of counts, so that what a model learns from many draws is which texts
are alike: those whose counts differ little. Nothing measured is in it.

Axis letters: N rows, F counts, K draws.
"""

import numpy as np

from models.errors import InputError

# Waves that make up a draw.
_WAVES = 512


def columns(counts: np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
  """Draws of Gaussian processes with an RBF kernel on the roots of counts.

  Roots, because one thing more matters most where there were none (the
  Hellinger distance of counts). Lengths of the kernels are log-uniform in
  [1, 4]; a draw is a sum of random waves (Rahimi & Recht 2007).

  Args:
    counts: (N, F) non-negative.
    draws: K.
    seed: of the draws.

  Returns:
    (N, K) float64.

  Raises:
    InputError: a count is negative or not finite.
  """
  if not (np.isfinite(counts).all() and (counts >= 0).all()):
    raise InputError("made-up numbers are of counts: a feature is below 0")
  generator = np.random.default_rng((seed, 53))
  roots = np.sqrt(counts)
  found = np.empty((len(counts), draws))
  for draw in range(draws):
    length = np.exp(generator.uniform(0, np.log(4)))
    waves = generator.normal(size=(counts.shape[1], _WAVES)) / length
    phases = generator.uniform(0, 2 * np.pi, _WAVES)
    weights = generator.normal(size=_WAVES) * np.sqrt(2 / _WAVES)
    found[:, draw] = np.cos(roots @ waves + phases) @ weights
  return found
