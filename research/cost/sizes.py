"""Bytes that arrays and weights take, in whatever format they are kept."""

from typing import Any

import jax
import jax.numpy as jnp

from models import language_model
from models.module import Params
from ops.quantized import QTensor, QWeight

# The bytes of a number that is in no format, since models keep bfloat16.
_FLOAT_BYTES = 2


def nbytes(tree: Any) -> int:
  """Bytes of all arrays of a tree, or of their shapes."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def weight_bytes(config: language_model.Config, params: Params) -> int:
  """Bytes of a model's weights: of few bits as they are kept, else 16 bits.

  Scales count, and the padding of a token table does not.

  Args:
    config: of the model.
    params: of the model; arrays of integers, such as the packed blocks of
      another program, stand for weights of few bits, too.
  """
  rows = config.vocab_size
  params = params | {"embed": {"table": params["embed"]["table"][:rows]}}
  if "lm_head" in params:
    kernel = params["lm_head"]["kernel"][:, :rows]
    params = params | {"lm_head": {"kernel": kernel}}
  return kept_bytes(params)


def kept_bytes(tree: Any) -> int:
  """Bytes of any arrays: of few bits as they are kept, else 16 bits."""
  is_node = lambda leaf: isinstance(leaf, QTensor | QWeight)
  total = 0
  for leaf in jax.tree.leaves(tree, is_leaf=is_node):
    if isinstance(leaf, QWeight):
      total += kept_bytes(leaf.weight) + nbytes(leaf.input)
    elif isinstance(leaf, QTensor) or jnp.issubdtype(leaf.dtype, jnp.integer):
      total += nbytes(leaf)
    else:
      total += _FLOAT_BYTES * leaf.size
  return total
