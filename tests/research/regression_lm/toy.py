"""Small models for tests, and all that their grammar can say."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from models import regression_lm
from models.numbers import Ieee, TargetCodec
from models.regression_lm_config import RegressionLMConfig
from research.regression_lm.likelihood import Model

SMALL = Ieee(base=2, mantissa_digits=2, special=True)


def model(codec=None, **changes):
  codec = codec or TargetCodec(format=SMALL)
  config = RegressionLMConfig.tiny(
    target_vocab_size=len(codec.tokens), target_length=codec.length, **changes
  )
  return Model(config=config, codec=codec)


@functools.cache
def params(made, seed=0, scale=3.0):
  """Random, with a head so large that the distribution is not even.

  NumPy draws them, since a program that draws takes seconds to compile.
  """
  generator = np.random.default_rng(seed)

  def leaf(path, abstract):
    if path[-1].key == "scale":
      return jnp.ones(abstract.shape, abstract.dtype)
    # Products and tables keep the size of what they are given.
    rows = abstract.shape[-2] if path[-1].key == "kernel" else 1
    noise = generator.normal(size=abstract.shape) / rows**0.5
    return jnp.asarray(noise, abstract.dtype)

  abstract = regression_lm.abstract_params(made.config)
  found = jax.tree_util.tree_map_with_path(leaf, abstract)
  found["head"]["kernel"] = found["head"]["kernel"] * scale
  return found


def texts(rows, length=5, seed=0):
  generator = np.random.default_rng(seed)
  tokens = generator.integers(0, 50, (rows, length), dtype=np.int32)
  lengths = generator.integers(1, length + 1, rows).astype(np.int32)
  lengths[0] = length
  return tokens, lengths


def support(codec):
  """Every row of tokens (rows, T) that the grammar accepts."""
  grammar, rows = codec.grammar, [((), 0)]
  for _ in range(codec.length):
    rows = [
      ((*row, int(token)), int(grammar.next_state[state, token]))
      for row, state in rows
      for token in np.flatnonzero(grammar.allowed[state])
    ]
  return np.array([row for row, state in rows if state == 0], np.int32)


def targets(codec, rows, seed=0):
  """Rows drawn evenly from the support."""
  every = support(codec)
  chosen = np.random.default_rng(seed).integers(0, len(every), rows)
  return every[chosen]


def product(*parts):
  return list(itertools.product(*parts))
