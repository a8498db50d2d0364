"""What every model is outside this package: a config and a dict of arrays.

Code elsewhere keeps `(config, params)`, and uses `jax.jit`,
`jax.value_and_grad`, `jax.lax.scan` and optax on the parameters; `bind` makes
a module of them where the model is computed.
"""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from models import layers
from ops.quantized import Taps, is_quantized

Params = dict[str, Any]


class Model(nnx.Module):
  """A module that its config describes, made as `Model(config, rngs=rngs)`."""

  @classmethod
  def init(
    cls, config: Any, key: jax.Array, param_dtype: str | None = None
  ) -> Params:
    """Random parameters as a nested dict, stacked layers on axis 0.

    Args:
      config: of the model.
      key: of the draw.
      param_dtype: of all parameters; None for float32.
    """
    model = cls(config, rngs=nnx.Rngs(params=key))
    params = _without_absent(nnx.to_pure_dict(nnx.split(model)[1]))
    if param_dtype is None:
      return params
    return jax.tree.map(lambda x: x.astype(param_dtype), params)

  @classmethod
  def abstract_params(cls, config: Any) -> Params:
    """The shapes and dtypes of `init`, without its arrays."""
    return _without_absent(nnx.to_pure_dict(_abstract(cls, config)[1]))

  @classmethod
  def num_params(cls, config: Any) -> int:
    """Parameters of a model, a tied table counted once."""
    return num_params(_abstract(cls, config)[1])

  @classmethod
  def bind(cls, config: Any, params: Params) -> Self:
    """The module over `params`, a nested dict as `init` returns it."""
    return module_over(cls, config, params)


@dataclasses.dataclass(frozen=True)
class Layer:
  """Where one layer of a model is.

  Attributes:
    stack: path of the stacked parameters that it is a part of.
    index: in the stack.
    kind: what the layer is, for the function `layer` of the model's file.
  """

  stack: tuple[str | int, ...]
  index: int
  kind: str


def module_over(cls: type, config: Any, params: Params) -> Any:
  """The module `cls(config, rngs=...)` over parameters of its own."""
  graphdef, abstract = _abstract(cls, config)
  return nnx.merge(graphdef, _with_absent(params, nnx.to_pure_dict(abstract)))


@functools.lru_cache(maxsize=64)
def _abstract(cls, config) -> tuple[nnx.GraphDef, nnx.State]:
  """Structure and shapes of a model; allocates nothing."""
  make = lambda: cls(config, rngs=nnx.Rngs(params=jax.random.key(0)))
  return nnx.split(nnx.eval_shape(make))


def _without_absent(params: Params) -> Params:
  """Parameters without those that may be absent, whose values hold no arrays.

  Such a one is there in quantized models alone.
  """
  return {
    key: _without_absent(value) if isinstance(value, dict) else value
    for key, value in params.items()
    if jax.tree.leaves(value)
  }


def _with_absent(params: Params, abstract: Params) -> Params:
  """The inverse, with what `abstract` has in the place of what is absent."""
  found = dict(params)
  for key, value in abstract.items():
    if isinstance(value, dict) and isinstance(params.get(key), dict):
      found[key] = _with_absent(params[key], value)
    elif key not in params and not jax.tree.leaves(value):
      found[key] = value
  return found


def num_params(params: Any) -> int:
  """Numbers in a tree of weights in any format, or of their shapes."""
  is_leaf = lambda node: is_quantized(node) or isinstance(node, Taps)
  leaves = jax.tree.leaves(params, is_leaf=is_leaf)
  return sum(leaf.size for leaf in leaves if not isinstance(leaf, Taps))


class TokenModel(Model):
  """A model that scores tokens by the rows of its table or of a head.

  Attributes:
    config: has `vocab_size`, and `padded_vocab_size` rows in the tables.
    embed: the table (padded V, D).
    lm_head: the head, or None where the table is.
  """

  config: Any
  embed: layers.Embedding
  lm_head: layers.Linear | None

  def head(self) -> jax.Array:
    """The output matrix (padded V, D), as `ops.token_logprob` takes it."""
    if self.lm_head is None:
      return self.embed.dense()
    return self.lm_head.dense().T

  def logits(
    self, hidden: jax.Array, implementation: str | None = None
  ) -> jax.Array:
    """Maps hidden states (..., D) to float32 logits (..., V).

    The padding of the vocabulary is cut off, so that it has no probability.

    Args:
      hidden: (..., D).
      implementation: of the product with a table in a number format.
    """
    if self.lm_head is None:
      logits = self.embed.logits(hidden, implementation)
    else:
      logits = self.lm_head(hidden, out_dtype=jnp.float32)
    return logits[..., : self.config.vocab_size]
